"""Strict configs: every mistake is one line that names the key and the remedy; what is read back is what was written.

Run: python -m pytest tests/test_config.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from shipped import SHIPPED
from tiny import make_config

from nanolapo.config import Config, Positive, UserError
from nanolapo.config_file import build, load_config, overlay, parse, read_yaml, to_yaml, validate
from nanolapo.methods import load_method
from nanolapo.methods.base import Method
from nanolapo.methods.lapo import Discovery
from nanolapo.reproduce.recipe import Recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture
def write(tmp_path):
    def write_file(text: str, name: str = "config.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write_file


def refused(path: Path, *overrides: str) -> str:
    """The one line that the user sees."""
    with pytest.raises(UserError) as error:
        load_config(path, list(overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------ files we ship


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_shipped_config_loads(path):
    """Recipes load as they are. A method's file (configs/methods) is laid over one, and its class takes its options."""
    if path.parent.name == "methods":
        config = load_config(ROOT / "configs/demo/stage1.yaml", [f"method={path}"])
        assert config.method.name
        load_method(config)
    else:
        config = load_config(path)
        assert config.data.sources and config.run.dir
    assert build(Config, yaml.safe_load(to_yaml(config)), "") == config


def test_there_are_configs():
    folders = {path.parent.name for path in SHIPPED}
    assert {"demo", "deepscaler-1.5b", "deepseek-r1-1.5b", "methods"} <= folders


# ------------------------------------------------------------------------------------------------------ F5


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [CANARY]", "!!python/name:os.system", "!own 3"])
def test_F5_object_tags_are_refused_and_not_run(write, tmp_path, tag):
    canary = tmp_path / "ran"
    value = tag.replace("CANARY", str(canary))
    assert "not plain YAML" in refused(write(f"run: {{name: {value}}}\n"))
    assert "not plain YAML" in refused(write("{}"), f"run.name={value}")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("text", "wrong", "meant"),
    [
        ("train: {learningrate: 1}", "train.learningrate", "train.learning_rate"),
        ("trian: {steps: 1}", "trian", "train"),
        ("lapo: {alfa: 1}", "lapo.alfa", "lapo.alpha"),
        ("rollout: {groupsize: 8}", "rollout.groupsize", "rollout.group_size"),
        ("data: {sources: [{name: a, path: b, lvl: c}]}", "data.sources[0].lvl", "data.sources[0].level"),
        ("3: 4", "3", ""),
    ],
)
def test_F5_unknown_keys_name_the_nearest(write, text, wrong, meant):
    assert f"unknown key {wrong}; did you mean {meant}" in refused(write(text))


@pytest.mark.parametrize(
    ("text", "key", "kind"),
    [
        ("train: {steps: many}", "train.steps='many'", "int"),
        ("train: {steps: 1.5}", "train.steps=1.5", "int"),
        ("train: {steps: true}", "train.steps=True", "int"),
        ("loss: {normalize_std: 1}", "loss.normalize_std=1", "bool"),
        ("loss: {kl_coef: true}", "loss.kl_coef=True", "float"),
        ("run: {name: 3}", "run.name=3", "str"),
        ("run: {name: [a]}", "run.name=['a']", "str"),
        ("train: {adam_betas: [0.9, x]}", "train.adam_betas[1]='x'", "finite number"),
        ("train: {learning_rate: fast}", "train.learning_rate='fast'", "finite number"),
        ("train: {learning_rate: .nan}", "train.learning_rate=nan", "finite number"),
        ("lapo: {sigma: .inf}", "lapo.sigma=inf", "finite number"),
        ("train:", "train", "mapping"),
        ("train: 3", "train", "mapping"),
        ("method: {options: [1]}", "method.options=[1]", "dict"),
    ],
)
def test_F5_wrong_types_name_the_key(write, text, key, kind):
    message = refused(write(text))
    assert message.startswith(key) and kind in message


def test_F5_scientific_notation_is_a_number(write):
    """YAML 1.1 reads 1e-6 as text."""
    path = write("train: {learning_rate: 1e-6, steps: 5}\nlapo: {sigma: null, decay: 5e1}\n")
    config = load_config(path, ["loss.kl_coef=2e-4"])
    assert (config.train.learning_rate, config.loss.kl_coef, config.lapo.decay) == (1e-6, 2e-4, 50.0)
    assert config.lapo.sigma is None and type(config.train.steps) is int


@pytest.mark.parametrize("text", ["a: [", "[1, 2]", "just words", "a: \x00", "run: {name: 2025-13-01}"])
def test_F5_what_is_no_yaml_mapping_is_refused(write, text):
    assert "config.yaml: " in refused(write(text))


@pytest.mark.parametrize(
    ("text", "line", "key", "before"),
    [
        ("train: {steps: 5}\nrun: {seed: 1}\ntrain: {inner_epochs: 2}\n", 3, "train", 1),
        ("run:\n  seed: 1\n  'seed': 1\n", 3, "seed", 2),
        ("data:\n  sources:\n  - {name: a, path: b,\n     name: c}\n", 4, "name", 3),
        ("extends: a.yaml\nextends: b.yaml\n", 2, "extends", 1),
        ("prompt: {template_options: {<<: {a: 1}, a: 2, a: 2}}\n", 1, "a", 1),
    ],
)
def test_a_key_that_is_given_twice_is_refused(write, text, line, key, before):
    """YAML's reader would take the last one and lose the first without a word."""
    told = f"line {line}: key {key!r} is given twice; line {before} has it already: keep one of the two"
    path = write(text)
    assert refused(path) == f"{path}, {told}"
    assert refused(write("{}"), f"method={write(text, 'method.yaml')}").endswith(f"method.yaml, {told}")


def test_a_key_that_is_given_twice_in_an_override_or_a_recipe_is_refused(write):
    override = "method.options={a: 1, a: 1}"
    assert refused(write("{}"), override).startswith(f"override {override!r}, line 1: key 'a' is given twice")
    for twice in ("tokens: 2", "runs: {grpo: {}}"):
        recipe = write(f"tokens: 1\nruns: {{}}\n{twice}\n", "compare.yaml")
        with pytest.raises(UserError, match="compare.yaml, line 3: key .* is given twice"):
            Recipe(recipe, recipe.parent / "out", [])


def test_merge_keys_anchors_and_aliases_work(write):
    """The values are those that YAML's own reader gives: a merged key may be overridden, and several maps be merged."""
    text = (
        "train: &t {steps: 5, inner_epochs: 2}\n"
        "a: &a {<<: *t, steps: 6}\nb: {steps: 8, <<: [*t, {warmup: 1}], more: &l [1, *t]}\n"
        "c: {<<: *a, <<: {x: 1}, list: *l}\n"
    )
    found = read_yaml(write(text))
    assert found == yaml.safe_load(text)
    assert found["a"] == {"steps": 6, "inner_epochs": 2} and found["b"]["steps"] == 8
    assert found["c"] == {"steps": 6, "inner_epochs": 2, "x": 1, "list": [1, {"steps": 5, "inner_epochs": 2}]}


def test_every_shipped_yaml_file_reads_as_before():
    """None has a key twice, or a number that only YAML 1.1 takes for one."""
    files = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "nanolapo").rglob("*.yaml")]
    assert len(files) > 40 and any("&" in file.read_text() for file in files)
    for file in files:
        assert parse(file.read_text(), str(file)) == yaml.safe_load(file.read_text()), file


@pytest.mark.parametrize("number", ["010", "-07", "0_7", "1:30", "+1:30", "1:2:3", "1:30.5"])
def test_octal_and_base_60_are_text(write, number):
    """YAML 1.1 takes 010 for 8 and 1:30 for 90; neither looks like it."""
    assert refused(write(f"train: {{steps: {number}}}")) == f"train.steps={number!r} is a str; it must be of type int"
    assert f"run.seed={number!r} is a str" in refused(write("{}"), f"run.seed={number}")
    config = load_config(write(f"run: {{name: {number}}}\nprompt: {{template_options: {{a: [{number}]}}}}"))
    assert config.run.name == number and config.prompt.template_options == {"a": [number]}
    assert load_config(write(to_yaml(config))) == config


def test_other_numbers_stay_numbers(write):
    told = "prompt: {template_options: {a: [0, -0, 8, 0x10, 0b11, 1_000, 0.5, 00.5, 1.5e+3, .inf, 10, 9:90]}}"
    numbers = load_config(write(told)).prompt.template_options["a"]
    assert numbers == [0, 0, 8, 16, 3, 1000, 0.5, 0.5, 1500.0, math.inf, 10, "9:90"]


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "a: [&b {c: [*b]}]", "a: " + "[" * 9999])
def test_a_value_inside_itself_or_endlessly_deep_is_one_line(write, text):
    path = write(text)
    assert refused(path).startswith(f"{path}: not plain YAML (")


def test_missing_file_folder_and_binary(tmp_path, write):
    assert "no such config file" in refused(tmp_path / "missing.yaml")
    assert "no such config file" in refused(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not plain YAML" in refused(tmp_path / "binary.yaml")
    assert "no such config file" in refused(write("{}"), f"method={tmp_path}")


def test_required_keys_are_named(write):
    assert "data.sources[0].path is missing" in refused(write("data: {sources: [{name: a}]}"))


# ------------------------------------------------------------------------------------------------------ values


def test_A7_top_p_below_one_is_refused_with_the_reason(write):
    message = refused(write("rollout: {top_p: 0.9}"))
    assert "rollout.top_p=0.9" in message and "full vocabulary" in message and "rollout.top_p=1.0" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rollout.group_size=7"], "train.batch_size=128 must be a multiple of rollout.group_size=7"),
        (["train.batch_size=96"], "divide the 1024 rollouts of a step"),
        (["train.batch_size=2048"], "divide the 1024 rollouts"),
        (["train.batch_size=-8"], "train.batch_size=-8"),
        (["rollout.group_size=0"], "rollout.group_size=0 must be positive"),
        (["rollout.temperature=0"], "rollout.temperature=0.0 must be positive"),
        (["train.max_bad_steps=0"], "train.max_bad_steps=0 must be positive"),
        (["train.grad_clip=0"], "train.grad_clip=0.0 must be positive"),
        (["lapo.sigma=0"], "lapo.sigma=0.0 must be positive"),
        (["prompt.length_multiple=0"], "prompt.length_multiple=0 must be positive"),
        (["lapo.percentiles=[70, 30]"], "need 0 <= low <= high <= 100"),
        (["lapo.percentiles=[30]"], "exactly two numbers"),
        (["loss.clip_low=1.5"], "0 <= clip_low < 1"),
        (["lapo.fidelity=papr"], "did you mean 'paper'?"),
        (["loss.aggregation=tokenmean"], "did you mean 'token_mean'?"),
        (["model.dtype=float16"], "not one of 'float32', 'bfloat16'"),
        (["rollout.engine=vlm"], "did you mean 'vllm'?"),
        (["rollout.engine=torch", "rollout.tensor_parallel=2"], "rollout.tensor_parallel needs rollout.engine=vllm"),
        (["rollout.engine=auto", "rollout.tensor_parallel=2"], "rollout.tensor_parallel needs rollout.engine=vllm"),
        (["run.seed=-1"], "run.seed=-1 must not be negative"),
        (["run.seed=4294967296"], "run.seed=4294967296 must not be negative, and below 2**32"),
        (["run.seed=99999999999999999999"], "run.seed=99999999999999999999 must not be negative, and below 2**32"),
        (["run.name=''"], "run.name= must be a folder in run.dir"),
        (["run.name=./."], "run.name=./. must be a folder in run.dir"),
        (["run.name=../other"], "run.name=../other must be a folder in run.dir"),
        (["run.name=a/../../b"], "run.name=a/../../b must be a folder in run.dir"),
        (["run.name=/tmp/a"], "run.name=/tmp/a must be a folder in run.dir"),
        (["train.warmup_fraction=10"], "train.warmup_fraction=10.0 must lie between 0 and 1"),
        (["train.final_lr_fraction=-1"], "train.final_lr_fraction=-1.0 must lie between 0 and 1"),
        (["train.adam_betas=[0.9, 1.5]"], "must lie from 0 to below 1"),
        (["train.weight_decay=-1"], "train.weight_decay=-1.0 must not be negative"),
        (["train.sampled_tokens=-5"], "train.sampled_tokens=-5 must not be negative"),
        (["loss.kl_coef=-0.1"], "loss.kl_coef=-0.1 must not be negative"),
        (["rollout.gpu_memory_utilization=45"], "rollout.gpu_memory_utilization=45.0 must lie between 0 and 1"),
        (["rollout.mismatch_factor=0"], "rollout.mismatch_factor=0.0 must be positive"),
        (["rollout.mismatch_floor=0"], "rollout.mismatch_floor=0.0 must be positive"),
        (["lapo.beta=-0.8"], "lapo.beta=-0.8 must not be negative"),
        (
            ["data.sources=[{name: a, path: demo, count: 2, samples: -1}]"],
            "data.sources[0].samples=-1 must not be negative",
        ),
    ],
)
def test_impossible_values_name_key_and_remedy(write, overrides, expected):
    assert expected in refused(write("{}"), *overrides)


@pytest.mark.parametrize(
    ("section", "changes", "expected"),
    [
        ("model", {"sharding": "fsdp3"}, "model.sharding='fsdp3' is not one of 'ddp', 'fsdp2'; did you mean 'fsdp2'?"),
        ("model", {"lora_rank": -1}, "model.lora_rank=-1 must not be negative"),
        ("train", {"steps": 0}, "train.steps=0 must be positive"),
        ("train", {"learning_rate": float("nan")}, "train.learning_rate=nan must be a finite number"),
        ("lapo", {"decay": 0.0}, "lapo.decay=0.0 must be positive"),
        ("lapo", {"percentiles": (30.0, 50.0, 70.0)}, "exactly two numbers"),
        ("loss", {"clip_low": 1.0}, "0 <= clip_low < 1"),
    ],
)
def test_a_config_made_in_python_is_checked_like_one_from_a_file(section, changes, expected):
    config = make_config()
    validate(config)
    with pytest.raises(UserError) as error:
        validate(replace(config, **{section: replace(getattr(config, section), **changes)}))
    assert expected in str(error.value)


def test_every_seed_and_name_that_is_accepted_can_be_used(write):
    """The largest seed starts the generators of all libraries; recipes use names with a slash."""
    seed = load_config(write("{}"), ["run.seed=4294967295"]).run.seed
    for start in (torch.manual_seed, np.random.RandomState, np.random.default_rng, np.random.SeedSequence):
        start(seed)
    with pytest.raises(ValueError, match="2\\*\\*32"):
        np.random.RandomState(seed + 1)
    for name in ("scores/base", "seed0/a b", "..a", "a..b", ".hidden", "./a"):
        folder = load_config(write("run: {dir: out}"), [f"run.name={name}"]).run_dir.resolve()
        assert folder != Path("out").resolve() and folder.is_relative_to(Path("out").resolve())


def test_a_share_of_layers_may_be_yes_or_no():
    """A number is still checked as one, and null is no share."""
    for value in (True, False, 0, 0.5, "1e-1", 1):
        found = build(Config, {"model": {"gradient_checkpointing": value}}, "").model.gradient_checkpointing
        assert found == (value if isinstance(value, bool) else float(value)) and isinstance(found, (bool, float))
    for value, words in (
        (1.5, "between 0 and 1"),
        (None, "type float"),
        ("yes", "finite number"),
        (math.nan, "finite"),
    ):
        with pytest.raises(UserError, match=f"model.gradient_checkpointing=.*{words}"):
            build(Config, {"model": {"gradient_checkpointing": value}}, "")
    for value in (math.inf, True):  # the type of a key that may be null
        with pytest.raises(UserError, match="lapo.beta"):
            build(Config, {"lapo": {"beta": value}}, "")
    for value in (None, True, False):
        assert build(Config, {"model": {"compile": value}}, "").model.compile is value
    with pytest.raises(UserError, match="model.compile=1 is a int; it must be of type bool"):
        build(Config, {"model": {"compile": 1}}, "")


def test_tensor_parallel_is_checked_when_the_ranks_are_known(write):
    """A file is read before that: one rank is not yet a fault."""
    path = write("{train: {batch_size: 0}, rollout: {engine: vllm, prompts_per_step: 6}}")
    config = load_config(path, ["rollout.tensor_parallel=2"])
    validate(config, 4)
    for ranks, words in ((1, "does not divide the 1 ranks"), (3, "the 3 ranks"), (8, "over 4 samplers")):
        with pytest.raises(UserError, match=words):
            validate(config, ranks)


def test_B4_prompts_that_do_not_divide_over_the_ranks():
    """A rank owns whole groups."""
    config = make_config(rollout={"prompts_per_step": 6})
    validate(config, 3)
    with pytest.raises(UserError, match="prompts_per_step=6 does not divide over 4 samplers.*multiple of 4"):
        validate(config, 4)
    validate(make_config(rollout={"prompts_per_step": 6, "engine": "vllm", "tensor_parallel": 2}), 12)  # six engines


def test_batch_arithmetic_is_said_in_words():
    config = make_config(rollout={"prompts_per_step": 8, "group_size": 4}, train={"batch_size": 16, "inner_epochs": 2})
    assert (config.rollouts_per_step, config.optimizer_steps_per_step) == (32, 4)
    text = config.arithmetic(2)
    assert "8 prompts x 4 = 32 rollouts a step (4 prompts on each of 2 samplers)" in text
    assert "/ 16 = 2 optimizer steps x 2 inner epochs" in text
    shared = make_config(rollout={"prompts_per_step": 4, "engine": "vllm", "tensor_parallel": 2})
    assert "(1 prompts on each of 4 samplers)" in shared.arithmetic(8)


# ------------------------------------------------------------------------------------------------------ layers


def test_extends_is_relative_and_the_child_wins(write, tmp_path):
    (tmp_path / "sub").mkdir()
    write("train: {steps: 5, inner_epochs: 2}\nrun: {seed: 7}\n", "base.yaml")
    write("extends: base.yaml\ntrain: {steps: 6}\n", "middle.yaml")
    child = write("extends: ../middle.yaml\nrun: {name: child}\n", "sub/child.yaml")
    config = load_config(child)
    assert (config.train.steps, config.train.inner_epochs) == (6, 2)
    assert (config.run.seed, config.run.name) == (7, "child")
    write("extends: missing.yaml\n", "lost.yaml")
    assert "missing.yaml: no such config file" in refused(tmp_path / "lost.yaml")


def test_extends_in_a_circle_is_refused(write):
    path = write("extends: config.yaml\n")
    assert "extend itself" in refused(path)
    assert "must name one YAML file" in refused(write("extends: [a.yaml, b.yaml]\n"))


def test_overrides_go_left_to_right_over_the_file(write):
    path = write("train: {steps: 5}\nlapo: {length_map: a}\n")
    config = load_config(
        path, ["train.steps=6", "train.steps=7", 'lapo.length_map="x=y"', "train.adam_betas=[0.8, 0.9]"]
    )
    assert config.train.steps == 7 and config.lapo.length_map == "x=y" and config.train.adam_betas == (0.8, 0.9)
    assert "write it as section.key=value" in refused(path, "--steps")
    assert "did you mean train.steps?" in refused(path, "train.step=3")
    assert "unknown key steps" in refused(path, "steps=3")
    assert "mapping" in refused(path, "train=3")


def test_method_file_is_laid_over_the_config(write):
    path = write("train: {steps: 5}\nloss: {clip_high: 0.2}\n")
    rival = write("method: {name: 'base:Method'}\nloss: {clip_high: 0.28}\n", "rival.yaml")
    config = load_config(path, [f"method={rival}", "train.steps=9"])
    assert (config.method.name, config.loss.clip_high, config.train.steps) == ("base:Method", 0.28, 9)
    assert "no such config file" in refused(path, "method=nowhere.yaml")


def test_references_to_other_keys(write):
    path = write('run: {dir: "runs/seed${run.seed}", seed: 3}\nmodel: {path: "${run.dir}/${run.name}/model"}\n')
    assert load_config(path).model.path == "runs/seed3/run/model"
    assert load_config(path, ["run.seed=4"]).model.path == "runs/seed4/run/model"
    assert "no such config key" in refused(path, "model.path=${run.sede}")
    assert "no such config key" in refused(path, "model.path=${nowhere.at_all}")
    assert "${run.dir} refers to itself" in refused(path, "run.dir=${run.dir}/x")
    assert "mapping" in refused(write('run: 3\nmodel: {path: "${run.dir}"}\n'))


def test_to_yaml_reads_back_to_an_equal_config(write, tmp_path):
    """Also with every kind of value: nested tuples, None, text with braces, colons and line breaks, 1e-6."""
    source = {"name": "ü: {x}", "path": "demo", "levels": [1, 2], "choices": ["a", "b"]}
    config = make_config(
        "some/ where",
        data={"sources": [source, source | {"name": "b"}]},
        prompt={"template": "{question}\n\\boxed{} # not a comment: <think>", "system": "  two  spaces "},
        lapo={"sigma": 1e-6, "decay": None},
        method={"name": "base:Method", "options": {"deep": {"list": [1, None, 1.5]}}},
    )
    assert load_config(write(to_yaml(config))) == config
    assert load_config(write(to_yaml(Config()))) == Config()


def test_overlay_does_not_change_its_arguments():
    below, above = {"a": {"x": 1}}, {"a": {"y": 2}, "b": {"z": 3}}
    assert overlay(below, above) == {"a": {"x": 1, "y": 2}, "b": {"z": 3}}
    assert below == {"a": {"x": 1}} and above == {"a": {"y": 2}, "b": {"z": 3}}


# ------------------------------------------------------------------------------------------------------ methods


def test_method_options_are_strict():
    @dataclass(frozen=True)
    class Options:
        strength: float = 1.0
        sizes: tuple[Positive[int], ...] = ()

    assert build(Options, {"strength": "2e-1"}, "method.options") == Options(0.2)
    with pytest.raises(UserError, match="unknown key method.options.strenght; did you mean method.options.strength?"):
        build(Options, {"strenght": 1}, "method.options")
    with pytest.raises(UserError, match=r"method.options.sizes\[1\]=0 must be positive"):
        build(Options, {"sizes": [2, 0]}, "method.options")
    with pytest.raises(UserError, match="unknown key method.options.alpha; method.options takes no keys here"):
        load_method(make_config(method={"name": "base:Method", "options": {"alpha": 1}}))


def test_a_script_names_its_class_and_the_config_may_name_a_rival():
    """The name is written down either way: config.yaml says which class was trained."""
    for name, kind in (("", Discovery), ("base:Method", Method)):
        method = load_method(make_config(method={"name": name}), default=Discovery)
        assert type(method) is kind and method.config.method.name == (name or "lapo:Discovery")


@pytest.mark.parametrize(
    "name", ["", "lapo", "lapo:", "lapo:Nothing", "nothing:Method", "../lapo:Discovery", "os:system"]
)
def test_unknown_methods_are_one_line(name):
    with pytest.raises(UserError, match="method.name=.*file:Class"):
        load_method(make_config(method={"name": name}))
