"""A run of a few steps on the tests' demo model, for whatever looks at the files that a run leaves."""

from __future__ import annotations

from pathlib import Path

from nanolapo.config import Config
from nanolapo.config_file import load_config

CONFIG = """
run: {{dir: {dir}, name: run, threads: 1, checkpoint_every: 1, print_every: 0, log_rollouts: 128, seed: 3}}
model: {{path: {base}, dtype: float32}}
data: {{sources: [{{name: demo, path: demo, count: 40, seed: 1, levels: [0]}}]}}
prompt: {{template: "{{question}} <think>"}}
rollout: {{engine: torch, prompts_per_step: 8, group_size: 16, max_prompt_tokens: 64, max_new_tokens: 96, base_tokens: 60}}
train: {{steps: 2, batch_size: 64, learning_rate: 1e-2, microbatch_tokens: 512}}
loss: {{kl_coef: 0.0, old_logprobs: sampler}}
lapo: {{decay: 10, sigma: 6}}
method: {{name: "lapo:Discovery"}}
"""


def write_config(base: Path, folder: Path, *overrides: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(dir=folder, base=base))
    return load_config(path, list(overrides))
