"""Preflight: what a run rests on is tried on the folder itself; ten folders broken by hand are refused, each by its check.

Run: python -m pytest tests/test_preflight.py
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_family
from folders import CHAT, edit, make_chat_folder
from safetensors.torch import load_file, save_file
from tiny import make_config, tiny_qwen
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedTokenizerFast,
)

from nanolapo.checks import Preflight
from nanolapo.config import Config, UserError
from nanolapo.data.load import load_data
from nanolapo.data.prompts import Guidance, exact_guidance, outside_guidance
from nanolapo.demo.pretrain import make_tokenizer
from nanolapo.grader import Grader
from nanolapo.methods.base import Method
from nanolapo.model.folder import load_model, load_tokenizer, position_limit, read_settings, save_model
from nanolapo.policy import Policy
from nanolapo.preflight import after_loading, before_training
from nanolapo.samplers.torch_sampler import TorchSampler, end_token_ids

ROOT = Path(__file__).parents[1]


class Told(Method):
    """States a length where `form` puts it."""

    form: Callable[[float], Guidance] = staticmethod(exact_guidance)

    def guidance(self, problem: Any, rollout_index: int, step: int) -> Guidance:
        return self.form(60)


class ToldOutside(Told):
    form = staticmethod(outside_guidance)


def config_of(folder: Path, **sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "data": {"sources": [{"name": "demo", "path": "demo", "count": 6, "levels": [1]}]},
        "prompt": {"style": "chat", "instruction": ""},
        "rollout": {"max_new_tokens": 64, "prompts_per_step": 2, "group_size": 2, "engine": "torch"},
    }
    return make_config(folder, **{name: values.get(name, {}) | sections.get(name, {}) for name in values | sections})


def check(config: Config, method: type[Method] = Told) -> Preflight:
    with Grader(workers=1) as grader:
        data, made = load_data(config, grader), method(config)
        made.start(data.problems)
        return before_training(config, data, made)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_folder(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of the good folder, to be broken."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def found(checked: Preflight) -> dict[str, str]:
    return {name: what for name, _, what in checked.rows}


def test_a_good_folder_passes_and_every_check_says_what_it_found(good: Path) -> None:
    checked = check(config_of(good))
    told = found(checked)
    assert checked.lines() == [f"preflight: {len(told)} checks, {checked.seconds:.1f} s"] and checked.seconds < 5
    assert all(proves[0].isupper() and len(proves) > 30 for _, proves, _ in checked.rows)
    assert told["end of turn"] == "'<|im_end|>' (3) closes a turn; answers end at '<|im_end|>' (3)"
    assert told["place of guidance"].endswith("<think>\\nI will answer the question with 60 tokens.'")
    assert told["longest position"].endswith("the model was made for 512")
    assert told["reference answers"].startswith("6 of 6 are read back")
    assert told["names and shapes"] == "12 tensors as in the files"


def test_the_trial_of_packed_rows_counts_with_its_time(good: Path) -> None:
    """It is made where the policy is made, which takes longer than the trial alone."""
    started = time.monotonic()
    policy = Policy(config_of(good, model={"path": str(good), "dtype": "bfloat16"}), torch.device("cpu"))
    assert 0 < policy.packed_seconds < time.monotonic() - started
    before = time.monotonic()
    checked = after_loading(Preflight(rows=[("a", "b", "c")], seconds=1.0), policy)
    assert checked.lines() == [f"preflight: 2 checks, {checked.seconds:.1f} s"]
    assert 0 < checked.seconds - 1.0 - policy.packed_seconds < time.monotonic() - before
    assert re.fullmatch("float32: off by .*, allowed 1.0e-03; bfloat16: off by .*, allowed 2.3e-02", checked.rows[1][2])


# ----------------------------------------------------------------------------------- folders broken by hand


def add_a_token_to_the_settings(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.update(extra_special_tokens=["add"]))


def take_a_tokenizer_of_other_words(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda c: c.update(json.loads(word_level(["Start", "at"]).to_str())))
    edit(folder / "tokenizer_config.json", lambda c: c.update(unk_token="?", eos_token="end", chat_template=None))


def word_level(words: list[str]) -> Tokenizer:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", "end", *words])}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return core


def enlarge_the_tokenizer(folder: Path) -> None:
    smaller = make_chat_folder(folder.parent / "smaller", vocab_size=300)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(smaller / name, folder)


def shorten_the_positions(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(max_position_embeddings=128))


def take_another_end_token(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.update(eos_token="</s>"))
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, lambda c: c.update(eos_token_id=1))


def let_the_model_open_its_thought(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHAT.replace("<think>\n", ""))


def swallow_backslashes(folder: Path) -> None:
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.normalizer = normalizers.Replace("\\", "")
    core.save(str(folder / "tokenizer.json"))


def rename_the_weights(folder: Path) -> None:
    """As the decoder alone writes them. transformers loads them all the same."""
    weights = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def contradict_the_generation_config(folder: Path) -> None:
    edit(folder / "generation_config.json", lambda c: c.update(do_sample=False, temperature=0.6, top_p=0.9))


def be_of_a_kind_without_a_sampler(folder: Path) -> None:
    tiny_family("gpt2", vocab_size=600).save_pretrained(folder)


def leave_the_config_empty(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def leave_the_generation_config_empty(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[]")


BROKEN = [
    (add_a_token_to_the_settings, "has other ids than tokenizer.json's.*must not add tokens"),
    (take_a_tokenizer_of_other_words, "cannot write the prompts.*are unknown"),
    (enlarge_the_tokenizer, "vocab_size is 300"),
    (shorten_the_positions, r"lower rollout.max_new_tokens by \d+"),
    (take_another_end_token, r"closes an assistant's turn with '<\|im_end\|>' \(3\).*Add 3 to eos_token_id"),
    (let_the_model_open_its_thought, "belongs into the thought, but none is open.*prompt.think_prefix"),
    (swallow_backslashes, "cannot write the answers"),
    (rename_the_weights, r"model.embed_tokens.weight is \(\d+, 32\) in the model, missing in the files \(11 such\)"),
    (contradict_the_generation_config, "could not be saved.*temperature"),
    (be_of_a_kind_without_a_sampler, "docs/MODELS.md"),
    (leave_the_config_empty, "no config.json or a damaged"),
    (leave_the_generation_config_empty, "damaged generation_config.json"),
]


@pytest.mark.parametrize(("breaks", "words"), BROKEN, ids=[breaks.__name__ for breaks, _ in BROKEN])
def test_a_folder_broken_by_hand_is_refused_in_one_line(
    folder: Path, breaks: Callable[[Path], None], words: str
) -> None:
    breaks(folder)
    raw = {"prompt": {"style": "raw", "template": "{question} <think>", "instruction": ""}}
    config = config_of(folder, **(raw if breaks is take_a_tokenizer_of_other_words else {}))
    with pytest.raises(UserError, match=words) as caught:
        check(config)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


# ----------------------------------------------------------------------------------- the tokenizer (case 1)

TEXT = "Find the value of  3+4, please.\n<think> é"


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "NoSuchTokenizer", None])
def test_ids_are_those_of_tokenizer_json_whatever_class_is_named(folder: Path, kind: str, named: str | None) -> None:
    """transformers 5 rebuilds the tokenizer as the named class does it: a Llama class lets blanks vanish here."""
    edit(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class=named, add_bos_token=True))
    edit(folder / "config.json", lambda c: c.update(model_type=kind))
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer(TEXT)["input_ids"] == plain.encode(TEXT).ids and tokenizer.decode(plain.encode(TEXT).ids) == TEXT
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|im_end|>", CHAT)


def test_a_byte_level_llama_is_exported_with_its_own_tokenizer(folder: Path, tmp_path: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class="LlamaTokenizerFast"))
    assert "rebuilds" not in found(check(config_of(folder)))["trial export"]
    model, tokenizer = load_model(str(folder), torch.device("cpu")), load_tokenizer(str(folder))
    save_model(model, torch.float32, tokenizer, tmp_path / "out")
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for read in (load_tokenizer(str(tmp_path / "out")), AutoTokenizer.from_pretrained(tmp_path / "out")):
        assert read(TEXT)["input_ids"] == plain.encode(TEXT).ids and read.chat_template == CHAT
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows no TokenizersBackend


def test_a_word_level_qwen2_folder_trains_on_its_words_and_the_note_says_how_to_read_it(tmp_path: Path) -> None:
    """AutoTokenizer takes the words for pieces of bytes there, or drops them."""
    tokenizer = make_tokenizer()
    tiny_qwen(vocab=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.decode(theirs("Start at 7")["input_ids"]) != "Start at 7"
    checked = check(config_of(tmp_path, prompt={"style": "raw", "template": "{question} <think>"}))
    assert found(checked)["tokenizer ids"].startswith("6 prompts get the ids")
    assert (
        len(checked.lines()) == 2
        and "read that of the trained model with PreTrainedTokenizerFast" in checked.lines()[1]
    )


def test_a_folder_without_tokenizer_json_is_told(folder: Path) -> None:
    core = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(core["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in core["model"]["merges"]))
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class="GPT2Tokenizer"))
    assert found(check(config_of(folder)))["tokenizer ids"].startswith("no tokenizer.json")


# ------------------------------------------------------------------------------------------- positions (case 4)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "dynamic", "factor": 2.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),  # already written out
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0}, 512),
    ],
)  # fmt: skip
def test_the_longest_position_with_stretched_rotary_embeddings(rope: dict[str, Any], limit: int) -> None:
    assert position_limit(LlamaConfig(max_position_embeddings=512, rope_scaling=rope or None)) == limit


def test_the_longest_position_of_other_configs() -> None:
    assert position_limit(MambaConfig()) is None  # no positions
    assert position_limit(GPT2Config(n_positions=77)) == 77  # another name for it
    text = {"max_position_embeddings": 99, "num_hidden_layers": 1}
    assert position_limit(Gemma3Config(text_config=text)) == 99  # nested, with two kinds of rotary embeddings


@pytest.mark.parametrize(("new", "fits"), [(512 - 64 - 57, True), (512 - 64 - 56, False)])
def test_prompt_guidance_and_answer_fit_to_the_token(good: Path, new: int, fits: bool) -> None:
    config = config_of(good, rollout={"max_new_tokens": new})
    with Grader(workers=1) as grader:
        longest = load_data(config, grader).longest_prompt
    assert longest == 57
    if fits:
        assert found(check(config))["longest position"].startswith("512 tokens at most")
    else:
        with pytest.raises(UserError, match="can reach 513 tokens, but model.path was made for 512.* by 1, or"):
            check(config)


# ------------------------------------------------------------------------------- what closes a turn (case 7)


@pytest.mark.parametrize(
    ("closing", "ends", "closed_by"),
    [
        ("<|im_end|>\n", 3, "'<|im_end|>' (3) closes"),
        ("<|im_end|>\n", [1, 3], "'<|im_end|>' (3) closes"),
        ("</s>", [1], "'</s>' (1) closes"),
        (" </s>", [1], "'</s>' (1) closes"),
        ("<|im_end|></s>", [1, 3], "'<|im_end|>' (3) closes"),  # Phi-3 writes two
        ("", 3, "no template says"),
        ("\nUser:", 3, "no template says"),  # words, as in a template that always writes the next turn's head
        ("</s>", 3, None),
        ("<|User|></s>", [1, 3], None),  # the first of two is not known
        ("<|eot|>", [3], None),  # not even a token
    ],
)
def test_the_token_that_closes_a_turn_must_be_an_end_token(
    folder: Path, closing: str, ends: Any, closed_by: str | None
) -> None:
    turn = "{{ m['content'] }}{% if m['role'] == 'assistant' %}" + closing + "{% endif %}"
    template = "{% for m in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    edit(folder / "generation_config.json", lambda c: c.update(eos_token_id=ends))
    if closed_by is None:
        with pytest.raises(UserError, match="which is not an end token .*'<.im_end.>' .3.*Add [0-9]+ to eos_token_id"):
            check(config_of(folder))
    else:
        assert closed_by in found(check(config_of(folder)))["end of turn"]


def test_a_model_without_any_end_token_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, lambda c: c.update(eos_token_id=None))
    with pytest.raises(UserError, match="no end token is known.*eos_token_id"):
        check(config_of(folder))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ends", ["3", -1, [3, "1"], [3, -1], 3.5, 318, [3, 318]])
def test_an_end_token_that_is_no_id_is_one_line(folder: Path, name: str, ends: Any) -> None:
    """As people write them by hand; transformers takes some of them as they are. The model has 318 ids."""
    edit(folder / name, lambda c: c.update(eos_token_id=ends))
    words = f"^model.path=.*: eos_token_id={re.escape(repr(ends))} in {name} is no token id below .*vocab_size=318"
    words += "|^model.path=.*'eos_token_id'"  # transformers itself refuses other types in config.json
    with pytest.raises(UserError, match=words) as error:
        check(config_of(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_the_last_id_may_end_an_answer(folder: Path, name: str) -> None:
    edit(folder / name, lambda c: c.update(eos_token_id=[3, 317]))
    assert found(check(config_of(folder)))["end of turn"].endswith("(317)")


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        ({}, {"eos_token_id": [3]}, [3]),  # 2 is LlamaConfig's default, and here it begins every turn
        ({}, {"eos_token_id": 5}, [3, 5]),
        ({"eos_token_id": 2}, {"eos_token_id": [3]}, [2, 3]),
        ({"eos_token_id": [1, 5]}, {"eos_token_id": [3]}, [1, 3, 5]),
        ({"eos_token_id": None}, {"eos_token_id": [3]}, [3]),
        ({}, {}, [2, 3]),
        ({}, None, [2, 3]),
    ],
)
def test_the_default_of_a_config_class_ends_no_answer_where_the_files_name_the_ends(
    folder: Path, tmp_path: Path, in_config: dict[str, Any], in_generation: dict[str, Any] | None, expected: list[int]
) -> None:
    """Neither in the checks nor in the sampler nor in the exported model. 3 is the tokenizer's own."""
    edit(folder / "config.json", lambda c: (c.pop("eos_token_id"), c.update(in_config)))
    edit(folder / "generation_config.json", lambda c: (c.pop("eos_token_id"), c.update(in_generation or {})))
    if in_generation is None:
        (folder / "generation_config.json").unlink()
    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder), torch.device("cpu"))
    save_model(model, torch.float32, tokenizer, tmp_path / "exported")
    for path in (str(folder), str(tmp_path / "exported")):
        assert end_token_ids(tokenizer, *read_settings(path, "key")) == expected
        assert TorchSampler(path, torch.float32, torch.device("cpu")).end_ids.tolist() == expected
    assert found(check(config_of(folder)))["trial export"].endswith("read back the same")


def test_an_end_token_of_a_nested_config_counts() -> None:
    config = Gemma3Config(text_config={"eos_token_id": 7, "num_hidden_layers": 1})
    core = PreTrainedTokenizerFast(tokenizer_object=word_level(["Start"]))
    assert end_token_ids(core, config, None) == [7]
