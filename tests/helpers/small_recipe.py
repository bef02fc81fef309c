"""A small recipe for tests: a random model of 32 dimensions, 8 problems, a reproduce.yaml and a compare.yaml."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from round_methods import make_base

from nanolapo import cli
from nanolapo.reproduce.reproduce import main

BASE = """
run: {{threads: 1, print_every: 0}}
model: {{path: {base}, dtype: float32}}
loss: {{kl_coef: 0.0}}
prompt: {{template: "{{question}} <think>"}}
data: {{sources: [{{name: demo, path: demo, count: 8, seed: 1}}]}}
rollout: {{engine: torch, prompts_per_step: 4, group_size: 4, max_prompt_tokens: 128, max_new_tokens: 8, base_tokens: 12}}
train: {{batch_size: 0, warmup_fraction: 0.0, learning_rate: 1e-3, steps: 2}}
"""
STAGE2 = """
extends: base.yaml
model: {path: "${run.dir}/stage1/model"}
lapo: {length_map: "${run.dir}/stage1/length_map.json"}
"""
EVALUATE = """
extends: base.yaml
evaluate: {samples: 2, max_new_tokens: 8, bootstrap: 10, guidance_factors: [2]}
"""
REPRODUCE = """
paper_base: B
runs:
  stage1: {overrides: [run.export_every=1]}
  stage2: {script: train_stage2.py, config: stage2.yaml, after: [stage1]}
evaluations:
  main: {models: {base: base, D: stage1, I: stage2}}
  dynamics: {models: {base: base, D: stage1/models}}
tables:
  table1: {number: 1, evaluations: [main], rows: {Base: base, +LAPO-D: D, +LAPO-I: I}}
"""
COMPARE = """
tokens: 300
overrides: [train.steps=1000]
evaluations:
  evaluate: {overrides: ["evaluate.guidance_factors=[]"]}
runs:
  stage1: {share: 0.5}
  lapo: {script: train_stage2.py, config: stage2.yaml, after: [stage1], share: 0.5}
"""


def write_recipe(folder: Path) -> Path:
    (folder / "base.yaml").write_text(BASE.format(base=make_base(folder / "model")))
    files = {"stage1": "extends: base.yaml\n", "stage2": STAGE2, "evaluate": EVALUATE, "reproduce": REPRODUCE}
    for name, text in (files | {"compare": COMPARE}).items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def run_recipe(path: Path, out: Path, *arguments: str) -> None:
    """As `python -m nanolapo.reproduce.reproduce`, in this process; the steps are processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["reproduce", str(path), "--out", str(out), *arguments])
        cli.run(main)
