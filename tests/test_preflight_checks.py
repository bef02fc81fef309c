"""The checks of preflight one by one, at their limits. test_preflight.py breaks whole folders.

Run: python -m pytest tests/test_preflight_checks.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import CHAT, edit, make_chat_folder
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from test_preflight import Told, ToldOutside, check, config_of, found, word_level
from tokenizers import Regex, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, PreTrainedTokenizerFast

from nanolapo import preflight
from nanolapo.config import PromptConfig, UserError
from nanolapo.data.load import Data, load_data
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import Prompter, outside_guidance
from nanolapo.evaluation import passes
from nanolapo.evaluation.passes import Model
from nanolapo.grader import Grader
from nanolapo.methods.base import Method
from nanolapo.model import folder
from nanolapo.model.folder import load_model, load_tokenizer
from nanolapo.model.precision import seconds_of_product
from nanolapo.policy import Policy
from nanolapo.preflight import (
    end_of_turn,
    ids_of_the_model,
    known_tokens,
    names_and_shapes,
    place_of_guidance,
    reference_answers,
    tokenizer_ids,
    trial_export,
)
from nanolapo.provenance import model_identity, weight_files
from nanolapo.samplers.vllm_fit import checkpoint_shapes, local_folder, vllm_objection

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_folder(tmp_path_factory.mktemp("good") / "model")


def test_a_length_that_tokenizer_json_cuts_or_pads_to_is_not_used(tmp_path: Path) -> None:
    """Neither by transformers nor by the check."""
    folder = make_chat_folder(tmp_path / "model")
    edit(folder / "tokenizer.json", lambda c: c.update(
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "</s>"},
    ))  # fmt: skip
    texts = ["Add 3.", "Add 3. " * 30]
    found = tokenizer_ids(str(folder), "key", load_tokenizer(str(folder)), texts)
    assert found == "2 prompts get the ids of tokenizers.Tokenizer.from_file"


def test_an_unknown_token_in_a_hundred_is_let_through_and_a_prompt_without_tokens_is_not(good: Path) -> None:
    tokenizer = load_tokenizer(str(good))
    tokenizer.unk_token = "?"
    unknown = tokenizer.unk_token_id
    assert known_tokens("key", tokenizer, [[unknown], [5] * 99]) == "1 of 100 tokens are unknown"
    for prompts in ([[unknown] * 2, [5] * 98], [[5] * 100, []]):
        with pytest.raises(UserError, match="^key: the tokenizer cannot write the prompts"):
            known_tokens("key", tokenizer, prompts)


def test_the_largest_id_has_an_embedding() -> None:
    assert ids_of_the_model("key", [[1], [5, 2]], LlamaConfig(vocab_size=6)) == "largest id 5, vocab_size 6"
    with pytest.raises(UserError, match="^key: .* makes the id 5, but the model's vocab_size is 5"):
        ids_of_the_model("key", [[1], [5, 2]], LlamaConfig(vocab_size=5))


@pytest.mark.parametrize(("asked", "times"), [("m['content'][:9]", 0), ("m['content'] + m['content']", 2)])
@pytest.mark.parametrize("method", [Told, ToldOutside])
def test_a_template_that_cuts_or_repeats_the_question(
    tmp_path: Path, asked: str, times: int, method: type[Told]
) -> None:
    """A length inside the thought does not depend on a question that stands twice."""
    written = f"{asked} if m['role'] == 'user' else m['content']"
    template = make_chat_folder(tmp_path / "model") / "chat_template.jinja"
    template.write_text(CHAT.replace("m['content']", written))
    if times == 0:
        with pytest.raises(UserError, match="^prompt: the chat template leaves the question out; mend it"):
            check(config_of(tmp_path / "model"), method)
    elif method is Told:
        assert "60 tokens." in found(check(config_of(tmp_path / "model"), method))["place of guidance"]
    else:
        with pytest.raises(UserError, match=f"stands {times} times in .*; mend the chat template"):
            check(config_of(tmp_path / "model"), method)


def test_a_token_of_any_spelling_may_close_a_turn(good: Path) -> None:
    tokenizer = load_tokenizer(str(good))
    tokenizer.add_tokens(["EndOfTurn"])
    tokenizer.chat_template = CHAT.replace("<|im_end|>", "EndOfTurn")
    data = Data([], Prompter(tokenizer, PromptConfig(style="chat")))
    new = tokenizer.convert_tokens_to_ids("EndOfTurn")
    assert end_of_turn("key", data, [new]).startswith(f"'EndOfTurn' ({new}) closes a turn")
    with pytest.raises(UserError, match="^key: the chat template closes an assistant's turn with 'EndOfTurn'"):
        end_of_turn("key", data, [3])


def word_reader(pieces: pre_tokenizers.PreTokenizer) -> Callable[..., str]:
    """The check with a tokenizer that decodes with blanks between its words. It knows no digits but 1 and 2."""
    words = word_level(["\\boxed", "\\", "boxed", "{", "}", "1", "2", ","])
    words.pre_tokenizer = pieces
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="end")
    prompter = Prompter(tokenizer, PromptConfig(style="raw", template="{question}"))

    def read(*answers: str) -> str:
        problems = [Problem(str(i), "1", answer, None, "set") for i, answer in enumerate(answers)]
        return reference_answers("key", Data(problems, prompter))

    return read


def test_answers_that_are_read_back_with_other_blanks_count_and_half_of_them_may_be_lost() -> None:
    read = word_reader(pre_tokenizers.Split(Regex(r"\\boxed|."), "isolated"))
    assert read("1", "1,2", "7", "8") == "2 of 4 are read back, the first as '1'"
    with pytest.raises(
        UserError, match=r"^key: the tokenizer cannot write the answers: .*boxed\{7\}.* is read back as"
    ):
        read("1", "7", "8")


def test_a_box_that_is_read_back_as_two_words_is_found_by_no_grader() -> None:
    with pytest.raises(
        UserError, match=r"^key: the tokenizer cannot write the answers: .*is read back as .*\\ boxed {"
    ):
        word_reader(pre_tokenizers.Whitespace())("1", "2")


@pytest.mark.parametrize(
    ("written", "system", "words"),
    [
        ("{% for p in m['content'] %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}", "", "the question"),
        ("{{ m['text'] }}", "", "the question"),
        ("{{ m['content'][:20] }}", "", "the question"),
        ("{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}", "Be good.", "prompt.system"),
        ("{{ m['content'] | trim }}", "Be good.", ""),
    ],
)
def test_a_template_writes_the_question_and_the_system_prompt(
    tmp_path: Path, written: str, system: str, words: str
) -> None:
    frame = "{% for m in messages %}{{ m['role'] }}: " + written + "\n{% endfor %}"
    folder = make_chat_folder(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(frame + "{% if add_generation_prompt %}assistant:{% endif %}")
    config = config_of(folder, prompt={"style": "chat", "instruction": "", "system": system})
    if words:
        with pytest.raises(UserError, match=f"^prompt: the chat template leaves {words} out; mend it"):
            check(config, Method)
    else:
        assert found(check(config, Method))["place of question"] == "6 prompts have it"


@pytest.mark.parametrize(
    ("written", "system", "remedy"),
    [
        (
            "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}",
            "",
            r"mend it, or give",
        ),
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}", "Be good.", 'system=""$'),
        ("{{ messages[0].thinking.strip() }}", "", "mend it"),
        ("{{ messages + 1 }}", "", "mend it"),
    ],
)
def test_a_template_that_refuses_the_prompt_is_one_line(tmp_path: Path, written: str, system: str, remedy: str) -> None:
    folder = make_chat_folder(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(written + CHAT)
    with pytest.raises(UserError, match=f"^the chat template of .* refuses this prompt .*{remedy}"):
        check(config_of(folder, prompt={"style": "chat", "instruction": "", "system": system}))


def test_a_template_that_takes_no_answers_does_not_say_what_closes_a_turn(tmp_path: Path) -> None:
    folder = make_chat_folder(tmp_path / "model")
    single = "{% if m['role'] == 'assistant' %}{{ raise_exception('one turn') }}{% endif %}"
    (folder / "chat_template.jinja").write_text("{% for m in messages %}" + single + "{% endfor %}" + CHAT)
    assert "no template says" in found(check(config_of(folder)))["end of turn"]
    (folder / "chat_template.jinja").write_text(
        CHAT.replace("m['content']", "m['content'] if m['role'] == 'user' else ''")
    )
    assert "no template says" in found(check(config_of(folder)))["end of turn"]


AWQ, GPTQ = ({"quantization_config": {"quant_method": method, "bits": 4}} for method in ("awq", "gptq"))
UNKNOWN_ROPE = {"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}


@pytest.mark.parametrize("change", [AWQ, GPTQ, UNKNOWN_ROPE, {"hidden_act": "foo"}])
def test_a_folder_that_transformers_cannot_build_is_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = make_chat_folder(tmp_path / "model")
    edit(folder / "config.json", lambda c: c.update(change))
    with pytest.raises(UserError, match="^model.path='.*': cannot be loaded") as caught:
        load_model(str(folder), torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_called_so(tmp_path: Path) -> None:
    folder = make_chat_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="its log-probs are not finite: a weight is nan or inf"):
        Policy(config_of(folder), torch.device("cpu"))


def test_a_question_may_have_the_words_of_the_guidance(good: Path) -> None:
    prompter, guidance = Prompter(load_tokenizer(str(good)), config_of(good).prompt), outside_guidance(60)
    question = f"What is meant by {prompter.placed(guidance).outside.strip()!r}"
    assert place_of_guidance(prompter, [(question, guidance)]).startswith("before the thought")


def set_another_rope(out: Path) -> None:
    edit(out / "config.json", lambda c: c.update(rope_parameters={"rope_type": "default", "rope_theta": 77.0}))


def set_another_end(out: Path) -> None:
    edit(out / "generation_config.json", lambda c: c.update(eos_token_id=[3, 9]))


def set_another_template(out: Path) -> None:
    (out / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def lose_a_file(out: Path) -> None:
    (out / "config.json").unlink()


@pytest.mark.parametrize(
    ("loses", "words"),
    [(set_another_rope, "other settings: rope_parameters"), (set_another_end, "other settings: tokenizer, end tokens"),
     (set_another_template, "other settings: tokenizer, end tokens"), (lose_a_file, "could not be saved")],
)  # fmt: skip
def test_an_export_that_is_read_back_otherwise_is_refused(
    good: Path, monkeypatch: pytest.MonkeyPatch, loses: Callable[[Path], None], words: str
) -> None:
    """The fault is put into the written folder, which transformers then reads."""
    right = preflight.write_whole

    def faulty(model: Any, weights: Any, dtype: Any, tokenizer: Any, out: Path) -> None:
        right(model, weights, dtype, tokenizer, out)
        loses(out)

    monkeypatch.setattr(preflight, "write_whole", faulty)
    with pytest.raises(UserError, match=f"^key: the trained model .*{words}"):
        trial_export("key", load_model(str(good), torch.device("meta")), torch.float32, load_tokenizer(str(good)))


def test_the_trial_export_is_published_as_a_run_does_it(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its modes, its flush and its final name: a fault there must not wait for the end of the run."""
    model, tokenizer = load_model(str(good), torch.device("meta")), load_tokenizer(str(good))
    modes: dict[str, int] = {}
    flush = folder.sync

    def flush_and_look(path: Path) -> None:
        flush(path)
        modes[path.name] = path.stat().st_mode & 0o777

    monkeypatch.setattr(folder, "sync", flush_and_look)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages }}{{ tools }}"}
    assert trial_export("key", model, torch.float32, tokenizer).endswith("read back the same")
    assert modes["additional_chat_templates"] & 0o500 == 0o500 and "tool_use.jinja" in modes
    monkeypatch.setattr(folder.os, "fsync", lambda descriptor: descriptor / 0)
    with pytest.raises(UserError, match="^key: the trained model could not be saved .*division"):
        trial_export("key", model, torch.float32, tokenizer)


def test_weights_of_another_shape_are_named(good: Path) -> None:
    model = load_model(str(good), torch.device("meta"))
    model.model.norm.weight = torch.nn.Parameter(torch.empty(33, device="meta"))
    with pytest.raises(UserError, match=r"model.norm.weight is \(33,\) in the model, \(32,\) in the files \(1 such\)"):
        names_and_shapes(str(good), "key", model)


@pytest.fixture
def shards(good: Path, tmp_path: Path) -> Path:
    """A folder like Mistral's: several files and an index, and all weights once more under other names."""
    model = load_model(str(good), torch.device("cpu"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    load_tokenizer(str(good)).save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    save_file({"tok_embeddings.weight": torch.ones(3, 2)}, tmp_path / "shards/consolidated.safetensors")
    return tmp_path / "shards"


@pytest.mark.parametrize("also", ["", "model.safetensors"])
def test_weights_are_those_that_transformers_loads(shards: Path, also: str) -> None:
    """Also where there are a single file and an index: transformers reads the single one."""
    if also:
        tensors = load_model(str(shards), torch.device("cpu")).state_dict()
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, shards / also, {"format": "pt"})
    model = load_model(str(shards), torch.device("cpu"))
    assert checkpoint_shapes(shards) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert vllm_objection(model.config, str(shards)) is None
    assert names_and_shapes(str(shards), "key", model) == f"{len(model.state_dict())} tensors as in the files"
    stored: dict[str, torch.Tensor] = {}
    for file in weight_files(shards):
        stored |= load_file(file)
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    before = model_identity(str(shards))
    (shards / "consolidated.safetensors").unlink()
    assert model_identity(str(shards)) == before
    used = weight_files(shards)[0]
    used.write_bytes(used.read_bytes()[:-1] + b"x")
    assert model_identity(str(shards)) != before


def test_weights_that_are_not_there_or_damaged_are_one_line(shards: Path) -> None:
    second = shards / sorted(set(json.loads((shards / INDEX).read_text())["weight_map"].values()))[1]
    second.write_bytes(b"x" * 9)
    with pytest.raises(UserError, match=f"{second} is damaged .*: fetch or save the model again"):
        checkpoint_shapes(shards)
    second.unlink()
    with pytest.raises(UserError, match=f"{INDEX} names {second.name}, which is not there: fetch or save"):
        checkpoint_shapes(shards)
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        (shards / INDEX).write_text(text)
        with pytest.raises(UserError, match=f"{INDEX} is damaged .*: fetch or save the model again"):
            model_identity(str(shards))


def test_a_hub_model_is_fetched_without_weights_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of Mistral-7B-Instruct-v0.3; consolidated.safetensors alone has 14 GB."""
    wanted = ["config.json", "tokenizer.json", "model-00001-of-00003.safetensors", INDEX]
    there = [*wanted, "consolidated.safetensors", "README.md", "pytorch_model.bin"]

    def fetched(name: str, **patterns: Any) -> str:
        return ",".join(filter_repo_objects(there, **patterns))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert str(local_folder("mistralai/some-model")).split(",") == wanted


@pytest.mark.parametrize(
    ("dtype", "times", "noted"), [("bfloat16", 1.9, False), ("bfloat16", 2.1, True), ("float32", 2.1, False)]
)
def test_a_cpu_that_is_slow_in_bfloat16_is_told(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, times: float, noted: bool
) -> None:
    """By trainings, before any weights are loaded; by evaluations, once for all models; and by what only writes a model."""
    seconds = {torch.float32: 0.5, torch.bfloat16: 0.5 * times}
    monkeypatch.setattr(preflight, "seconds_of_product", seconds.__getitem__)
    text = f"on this CPU a product in bfloat16 takes {times} times as long as in float32"
    told = [f"speed of dtype: {text}; set model.dtype=float32"] if noted else []
    config = config_of(good, model={"path": str(good), "dtype": dtype}, evaluate={"max_new_tokens": 32})
    trained = check(config)
    assert trained.lines()[1:] == told
    assert noted or found(trained)["speed of dtype"] == (text if dtype == "bfloat16" else "float32 needs no trial here")
    with Grader(workers=1) as grader:
        data = load_data(config, grader)
    models = [Model("one", str(good), config.prompt), Model("other", str(good), config.prompt)]
    assert [c.lines()[1:] for c in passes.preflight(config, models, [data, data])] == [told, []]
    slow = replace(config, model=replace(config.model, dtype="float32"), rollout=replace(config.rollout, dtype=dtype))
    told_of_sampler = [line.replace("model.dtype", "rollout.dtype") for line in told]
    assert passes.preflight(slow, models, [data, data])[0].lines()[1:] == told_of_sampler
    model, kind = load_model(str(good), torch.device("cpu")), getattr(torch, dtype)
    assert preflight.before_writing("key", model, kind, data.tokenizer).lines()[1:] == told


@pytest.mark.parametrize(
    ("rank", "model", "rollout", "rate", "remedy"),
    [
        (4, "bfloat16", "", 1e-6, "model.dtype=float32"),
        (4, "bfloat16", "float32", 1e-5, "model.dtype=float32"),  # the export is rounded
        (4, "float32", "bfloat16", 1e-5, "rollout.dtype=float32"),  # the sampler's weights are
        (4, "bfloat16", "bfloat16", 9e-5, "model.dtype=float32 rollout.dtype=float32"),
        (4, "bfloat16", "", 1e-4, None),
        (4, "float32", "", 1e-6, None),
        (4, "float32", "float32", 1e-6, None),
        (0, "bfloat16", "", 1e-6, None),
    ],
)
def test_a_lora_whose_steps_bfloat16_would_round_away_is_told(
    good: Path, monkeypatch: pytest.MonkeyPatch, rank: int, model: str, rollout: str, rate: float, remedy: str | None
) -> None:
    monkeypatch.setattr(preflight, "seconds_of_product", lambda dtype: 1.0)
    sections = {"model": {"dtype": model, "lora_rank": rank}, "rollout": {"dtype": rollout}}
    checked = check(config_of(good, **sections, train={"learning_rate": rate}))
    assert ("rounding of lora" in found(checked)) == bool(rank)
    text = (
        "rounding of lora: sampler or export hold bfloat16, which loses most of what LoRA adds at "
        f"train.learning_rate={rate:g}; set train.learning_rate=0.0001 or more, as is usual for LoRA, or {remedy}"
    )
    assert checked.lines()[1:] == ([text] if remedy else [])


class Products(TorchDispatchMode):
    """The dtypes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.dtypes += [args[0].dtype] if func is torch.ops.aten.mm.default else []
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_seconds_of_a_product_are_of_its_dtype(dtype: torch.dtype) -> None:
    with Products() as seen:
        assert 0 < seconds_of_product(dtype) < 1
    assert seen.dtypes == [dtype] * 4
