"""What a resumed run must share with the run before it: every key that changes numbers, named with both values.

Run: python -m pytest tests/test_fingerprint.py
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import edit
from tiny import make_config, make_problems

from nanolapo import loop
from nanolapo.config import Config, PromptConfig, UserError
from nanolapo.data.load import Data
from nanolapo.data.prompts import Prompter
from nanolapo.demo.pretrain import DemoConfig, make_model, make_tokenizer
from nanolapo.fingerprint import FREE, SECTIONS, TOLD, changes, fingerprint_of, refuse_changes
from nanolapo.methods.base import Method
from nanolapo.methods.hapo import Hapo
from nanolapo.model.folder import save_model

PATH = Path("step-000003")
# Another value for every key whose change must not go unseen.
REFUSED = {
    "run.seed": 7, "model.path": "other", "model.dtype": "bfloat16", "model.lora_rank": 3, "model.lora_alpha": 5,
    "prompt.style": "chat", "prompt.template": "Q {question}", "prompt.instruction": "x", "prompt.system": "x",
    "prompt.think_prefix": "x", "prompt.template_options": {"enable_thinking": False}, "prompt.length_multiple": 5,
    "rollout.prompts_per_step": 12, "rollout.group_size": 3, "rollout.max_new_tokens": 9, "rollout.base_tokens": 7.0,
    "rollout.temperature": 0.5, "rollout.top_p": 0.5, "rollout.dtype": "bfloat16", "train.batch_size": 8,
    "train.inner_epochs": 2, "train.final_lr_fraction": 0.5, "train.warmup_fraction": 0.5, "train.adam_betas": (0.8, 0.9),
    "train.weight_decay": 0.5, "loss.kind": "gspo", "loss.options": {"a": 1}, "loss.aggregation": "constant",
    "loss.clip_low": 0.1, "loss.clip_high": 0.1, "loss.dual_clip": 3.0, "loss.kl_coef": 0.5, "loss.kl_kind": "k1",
    "loss.tis_cap": 2.0, "loss.sequence_mask": (0.1, 3.0), "loss.mastered_mask": (0.1, 0.9),
    "loss.old_logprobs": "sampler", "loss.normalize_std": False, "lapo.fidelity": "paper",
    "lapo.alpha": 0.5, "lapo.beta": 0.5, "lapo.decay": 5.0, "lapo.sigma": 5.0, "lapo.percentiles": (10.0, 90.0),
    "lapo.statistic": "mean", "lapo.guidance": "range",
}  # fmt: skip
MAY_CHANGE = {
    "train.steps": 7, "train.sampled_tokens": 5, "train.learning_rate": 0.5,
    "train.grad_clip": 0.5, "rollout.engine": "vllm",
}  # fmt: skip


def with_key(config: Config, key: str, value: Any) -> Config:
    section, name = key.split(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def data(count: int = 3, template: str = "", **options: Any) -> Data:
    tokenizer = make_tokenizer()
    prompt = PromptConfig(template="{question} <think>")
    if template:
        tokenizer.chat_template, prompt = template, PromptConfig(style="chat", template_options=options)
    return Data(make_problems(count), Prompter(tokenizer, prompt))


def of(config: Config, method: type[Method] = Method, problems: Data | None = None) -> dict[str, Any]:
    """The fingerprint as a checkpoint gives it back."""
    return json.loads(json.dumps(fingerprint_of(config, method(config), problems or data())))


def differing(one: dict[str, Any], two: dict[str, Any]) -> set[str]:
    return {key for key in one | two if one.get(key) != two.get(key)}


def test_every_key_is_decided():
    """A key that is added to the config belongs to the fingerprint until somebody says otherwise here and there."""
    config = Config()
    every = {f"{name}.{f.name}" for name in SECTIONS for f in dataclasses.fields(getattr(config, name))}
    assert every | {"prompt, rendered"} >= FREE | TOLD and not FREE & TOLD
    assert every - FREE - TOLD == REFUSED.keys()
    assert TOLD - {"prompt, rendered"} == MAY_CHANGE.keys()
    others = {f.name for f in dataclasses.fields(config)} - {*SECTIONS}
    assert others == {
        "data",
        "method",
        "wandb",
        "evaluate",
        "demo",
        "warm_start",
    }  # data: by its problems, method: by its class


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_changes_numbers_is_refused_with_both_values(key, monkeypatch):
    config = make_config("here")
    changed = with_key(config, key, REFUSED[key])
    method = Method(config)
    then, now = of(config), json.loads(json.dumps(fingerprint_of(changed, method, data())))
    assert differing(then, now) == {key}
    assert refuse_changes(PATH, then, then) is None and changes(then, now, 0.5) == []
    with pytest.raises(UserError) as error:
        refuse_changes(PATH, then, now)
    message = str(error.value)
    assert message.startswith(f"step-000003 was written with {key}=") and f", this run has {key}=" in message
    assert "another run.name" in message and "\n" not in message and len(message) < 400


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_a_key_that_users_change_on_purpose_is_told(key):
    config = make_config("here")
    section, name = key.split(".")
    then, now = of(config), of(with_key(config, key, MAY_CHANGE[key]))
    refuse_changes(PATH, then, now)
    before, after = (json.loads(json.dumps(v)) for v in (getattr(getattr(config, section), name), MAY_CHANGE[key]))
    share = "; progress is now 50%, and what follows it (learning rate, limits) goes on from there"
    share = share if key in ("train.steps", "train.sampled_tokens") else ""
    assert changes(then, now, 0.5) == [f"{key}={after!r} from here on; it was {before!r}{share}"]


def test_an_engine_is_compared_as_the_one_that_runs():
    """`auto` is torch on a machine without vLLM and vLLM on the next."""
    config, runs = make_config("here"), "vllm" if find_spec("vllm") else "torch"
    auto = of(with_key(config, "rollout.engine", "auto"))
    assert auto == of(with_key(config, "rollout.engine", runs)) and auto["rollout.engine"] == runs
    other = {"vllm": "torch", "torch": "vllm"}[runs]
    told = f"rollout.engine={runs!r} from here on; it was {other!r}"
    assert changes(of(with_key(config, "rollout.engine", other)), auto, 0.5) == [told]


@pytest.mark.parametrize("key", sorted(FREE))
def test_a_key_that_changes_no_number_is_not_in_it(key):
    config, method = make_config("here"), Method(make_config("here"))
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    other = value + 1 if isinstance(value, int | float) and not isinstance(value, bool) else "other"
    assert fingerprint_of(config, method, data()) == fingerprint_of(with_key(config, key, other), method, data())


def test_problems_their_answers_and_their_order_belong_to_it():
    config = make_config("here")
    then = of(config)
    for name, change in {
        "data, problems": lambda found: found[:2],
        "data": lambda found: found[::-1],
        "data, answers": lambda found: [replace(found[0], answer="another"), *found[1:]],
    }.items():
        other = data()
        other.problems = change(other.problems)
        with pytest.raises(UserError, match=f"{name}="):
            refuse_changes(PATH, then, of(config, problems=other))


def test_options_of_a_method_count_with_their_defaults():
    """Whether an option is left out or given its default makes no difference; another value does, and is named."""
    config = make_config("here")
    (name, default), *_ = dataclasses.asdict(Hapo(config).options).items()
    same, other = (with_key(config, "method.options", {name: value}) for value in (default, default / 2))
    assert of(config, Hapo) == of(same, Hapo)
    assert differing(of(config, Hapo), of(other, Hapo)) == {f"method.options.{name}"}
    assert "method" in differing(of(config, Hapo), of(config))


def test_several_changes_are_named_together():
    config = make_config("here")
    other = with_key(with_key(config, "lapo.alpha", 0.1), "loss.kl_coef", 0.2)
    with pytest.raises(
        UserError, match="loss.kl_coef=0.0, lapo.alpha=0.7, this run has loss.kl_coef=0.2, lapo.alpha=0.1:"
    ):
        refuse_changes(PATH, of(config), of(other))


def test_a_long_value_is_shown_where_it_differs():
    config = make_config("here")
    template = config.prompt.template
    other = with_key(config, "prompt.template", template.replace("step by step", "at length"))
    with pytest.raises(
        UserError, match="='[.]{3}lease think step by .*this run has .*='[.]{3}lease think at length"
    ) as error:
        refuse_changes(PATH, of(config), of(other))
    assert len(str(error.value)) < 330 < len(template)


def test_todays_date_in_a_template_is_told():
    """The config is the same and the prompt another one. Not refused: a run may go on after midnight."""
    config = make_config("here")
    template = "Today: {{ day }}\n{% for m in messages %}{{ m['content'] }}{% endfor %}"
    then, now = (of(config, problems=data(template=template, day=day)) for day in ("28 Nov 2026", "29 Nov 2026"))
    assert differing(then, now) == {"prompt, rendered"}
    refuse_changes(PATH, then, now)
    (line,) = changes(then, now, 0.5)
    assert line.startswith("prompt, rendered='Today: 29 Nov") and "it was 'Today: 28 Nov" in line and len(line) < 200


def test_what_an_older_version_did_not_write_is_no_change():
    now = of(make_config("here"))
    assert changes({}, now, 0.5) == [] and refuse_changes(PATH, {}, now) is None
    assert refuse_changes(PATH, {"a key": "of yore"}, now) is None


@pytest.mark.slow
def test_a_run_that_is_resumed_with_another_setting(tmp_path, capsys):
    def make_base(seed: int) -> None:
        torch.manual_seed(seed)
        model = make_model(tokenizer, DemoConfig(hidden_size=32, layers=1))
        save_model(model, torch.float32, tokenizer, tmp_path / "base")

    tokenizer = make_tokenizer()
    make_base(0)
    config = make_config(
        tmp_path / "base",
        run={"dir": str(tmp_path), "name": "r", "print_every": 0},
        data={"sources": [{"name": "demo", "path": "demo", "count": 4, "levels": [1]}]},
        prompt={"template": "{question} <think>"},
        rollout={"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 6, "engine": "torch"},
        train={"steps": 1},
    )
    loop.train(config, Method(config))
    for key, value in (("lapo.alpha", 0.1), ("loss.kl_coef", 0.01), ("train.weight_decay", 0.1)):
        other = with_key(with_key(config, "train.steps", 2), key, value)
        with pytest.raises(UserError, match=f"step-000001 was written with {key}="):
            loop.train(other, Method(other))
    capsys.readouterr()
    longer = with_key(with_key(with_key(config, "train.steps", 2), "run.print_every", 1), "rollout.max_rows", 1)
    loop.train(longer, Method(longer))
    said = capsys.readouterr().out
    assert (
        "train.steps=2 from here on; it was 1; progress is now 50%, and what follows it" in said
        and "at step 1" in said
        and "step 2" in said
    )
    for step, engine, remembered in ((3, "torch", True), (4, "vllm", False)):  # the engine of the steps before
        path = tmp_path / f"r/checkpoints/step-{step - 1:06d}/state.json"
        edit(path, lambda c, was=engine: (c["alarms"].update(base_mismatch=0.01), c["fingerprint"].update(
            {"rollout.engine": was})))  # fmt: skip
        longer = with_key(longer, "train.steps", step)
        loop.train(longer, Method(longer))
        now = json.loads((tmp_path / f"r/checkpoints/step-{step:06d}/state.json").read_text())
        assert (now["alarms"]["base_mismatch"] == 0.01) == remembered and now["fingerprint"][
            "rollout.engine"
        ] == "torch"
        assert ("rollout.engine='torch' from here on; it was 'vllm'" in capsys.readouterr().out) != remembered
    make_base(1)  # other weights in the same folder
    with pytest.raises(UserError, match="step-000004 was written with model.path, the weights there="):
        loop.train(with_key(longer, "train.steps", 5), Method(longer))
