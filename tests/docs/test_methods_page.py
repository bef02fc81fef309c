"""docs/METHODS.md tells the truth: every method is on it, its numbers are the code's, its example trains.

Run: python -m pytest tests/docs/test_methods_page.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nanolapo.config import LossConfig
from nanolapo.config_file import build, load_config, read_yaml
from nanolapo.methods import load_method

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/METHODS.md").read_text(encoding="utf-8")
YAMLS = {path.stem: path for path in sorted((ROOT / "configs/methods").glob("*.yaml"))}
ENTRIES = dict(re.findall(r"^- \*\*.+?\*\* `([\w.-]+)`(.*?)(?=^- \*\*|^#)", PAGE, re.MULTILINE | re.DOTALL))


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def settings(entry: str, key: str) -> dict[str, object]:
    """What an entry prints as `key: {...}`, read as YAML; {} where it prints nothing."""
    found = re.findall(rf"`{key}: (\{{.*?\}})`", entry, re.DOTALL)
    assert len(found) <= 1
    return yaml.safe_load(found[0]) if found else {}


def method_of(name: str):
    return load_method(load_config(ROOT / "configs/demo/stage1.yaml", [f"method={YAMLS[name]}"]))


def test_every_yaml_has_one_entry_and_no_entry_is_left_over():
    assert list(ENTRIES) == re.findall(r"^- \*\*.+?\*\* `([\w.-]+)`", PAGE, re.MULTILINE)  # none twice
    missing = sorted(set(YAMLS) - set(ENTRIES))
    assert not missing, f"add an entry for {missing} to docs/METHODS.md"
    assert set(ENTRIES) == set(YAMLS)


@pytest.mark.parametrize("name", sorted(set(YAMLS) & set(ENTRIES)))
def test_an_entry_has_the_codes_defaults_and_the_yamls_loss(name):
    """All keys of the method's Options with their defaults, and all keys of the loss that its YAML sets."""
    entry, options = ENTRIES[name], method_of(name).Options
    defaults = {f.name: f.default for f in dataclasses.fields(options)}
    assert settings(entry, "method.options") == defaults
    printed, given = settings(entry, "loss"), read_yaml(YAMLS[name]).get("loss", {})
    assert set(printed) == set(given)
    assert build(LossConfig, printed, "loss") == build(LossConfig, given, "loss")
    rest = re.sub(r"`(method.options|loss): .*?`", "", entry, flags=re.DOTALL)
    assert rest.startswith(" (") and "`" in rest, "no source, or no formula"


@pytest.mark.parametrize("name", sorted(set(YAMLS) & set(ENTRIES)))
def test_what_is_unverified_says_so(name):
    comment = "".join(line for line in YAMLS[name].read_text().splitlines() if line.startswith("#"))
    assert ("UNVERIFIED" in ENTRIES[name]) == ("unverified" in comment)


def test_the_table_of_state_names_exactly_the_methods_that_have_one():
    listed = set(
        re.findall(r"`([\w.-]+)`", "".join(re.findall(r"^\|.*?\|", section("What is remembered"), re.MULTILINE)))
    )
    methods = {name: method_of(name) for name in YAMLS}
    assert listed == {name for name, method in methods.items() if method.state_dict() or method.loss.state}


def test_the_decision_table_names_real_methods_only():
    rows = [line.split("|")[2] for line in section("Who should use which").splitlines() if line.startswith("| ")]
    named = [name for row in rows for name in re.findall(r"`([\w.-]+)`", row)]
    assert len(rows) > 10 and set(named) <= set(YAMLS)


# ------------------------------------------------------------------------------------------------------ the example


def example() -> dict[str, str]:
    """path -> text of the two files of the last section."""
    return dict(
        re.findall(r"^`([\w./]+)`\n\n```\w+\n(.*?)```", section("Your own method in one short file"), re.M | re.DOTALL)
    )


def test_the_example_is_two_files_and_20_lines():
    files = example()
    assert [Path(path).parent.as_posix() for path in files] == ["nanolapo/methods", "configs/methods"]
    assert not any((ROOT / path).exists() for path in files)
    code = next(iter(files.values()))
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


CONFIG = """
run: {{dir: {dir}, name: run, threads: 1, print_every: 0}}
model: {{path: {base}, dtype: float32}}
data: {{sources: [{{name: demo, path: demo, count: 40, seed: 1, levels: [0]}}]}}
prompt: {{template: "{{question}} <think>"}}
rollout: {{engine: torch, prompts_per_step: 8, group_size: 4, max_prompt_tokens: 64, max_new_tokens: 96}}
train: {{steps: 2, batch_size: 16, learning_rate: 1e-3}}
loss: {{kl_coef: 0.0}}
"""


@pytest.mark.slow
def test_the_example_trains_with_nothing_else_touched(demo_base, tmp_path):
    """The package as it is, plus the two files, and the command that the README gives for a rival."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "nanolapo", copy / "nanolapo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", copy / "configs")
    shutil.copy(ROOT / "train_stage1.py", copy)
    for path, text in example().items():
        (copy / path).write_text(text, encoding="utf-8")
    (copy / "config.yaml").write_text(CONFIG.format(dir=tmp_path / "runs", base=demo_base))
    command = [sys.executable, "train_stage1.py", "config.yaml", f"method={list(example())[1]}"]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(override: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, override], capture_output=True, text=True, timeout=240, env=environment, cwd=copy
        )

    result = run("method.options.weight=0.5")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and sum(m["updates"] for m in lines) > 0
    assert all(m["reward"] == pytest.approx(m["reward/correct"] + m["reward/length"]) for m in lines)
    rows = [json.loads(line) for line in (tmp_path / "runs/run/rollouts.jsonl").read_text().splitlines()]
    groups: dict[tuple[int, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["step"], row["problem"]), []).append(row)
    right = 0
    for group in groups.values():  # its own docstring, in other words
        lengths = [row["length"] for row in group if row["correct"]]
        for row in group:
            saved = 1 - row["length"] * len(lengths) / sum(lengths) if row["correct"] else 0.0
            assert sum(row["reward"].values()) == pytest.approx(row["correct"] + 0.5 * max(-1.0, saved))
            right += row["correct"]
    assert right > 0, "nobody was right: this shows nothing"
    refused = run("method.options.wieght=1")
    assert refused.returncode == 2 and "did you mean method.options.weight?" in refused.stderr
