"""The loss of AdaptThink, whose answers begin with a given token, against plain transformers in float64.

Run: python -m pytest tests/losses/test_given_tokens.py
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from test_policy_losses import gradients
from test_update import assert_close
from tiny import CPU, make_config, make_rows, score_rows
from transformers import AutoModelForCausalLM

from nanolapo.config_file import load_config
from nanolapo.data.prompts import GivenTokens
from nanolapo.policy import Policy

ROOT = Path(__file__).parents[2]


def test_the_gradient_of_the_published_loss_with_given_tokens(tied_model):
    """-min(s A, clip(s) A) with s = exp(mean(log p - old)), old the policy's own but log 0.5 for the first token, by plain
    transformers. The model hardly ever chooses the first token of row 0."""
    loss = load_config(ROOT / "configs/demo/stage1.yaml", [f"method={ROOT / 'configs/methods/adapt-think.yaml'}"]).loss
    sections = {
        "loss": {name: getattr(loss, name) for name in ("kind", "aggregation", "clip_low", "clip_high")},
        "train": {"grad_clip": 1e9, "microbatch_tokens": 20},
    }
    lengths, advantages = [5, 9, 30, 2], [0.3, -0.7, 0.25, -0.75]
    rollouts = make_rows(lengths, 4)
    for row, token in zip(rollouts.rows, (5, 5, 6, 6), strict=True):
        row.given, row.response_ids[0] = GivenTokens((token,), math.log(0.5)), token
    score_rows(Policy(make_config(tied_model), CPU), rollouts)
    unlikely = rollouts.rows[0].sampler_logprobs[0]
    assert unlikely < -2
    for row in rollouts.rows:
        row.sampler_logprobs[0] = math.log(0.5)
    model, total = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float64).eval(), torch.zeros(())
    clipped = 0
    for a, row in zip(advantages, rollouts.rows, strict=True):
        ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids]))
        scores = model(ids[None]).logits[0].log_softmax(-1)[len(row.prompt_ids) - 1 : -1]
        logp = scores.gather(-1, torch.from_numpy(row.response_ids)[:, None])[:, 0]
        old = logp.detach().clone()
        old[0] = math.log(0.5)
        s = (logp - old).mean().exp()
        cut = s.clamp(0.8, 1.2)
        clipped += int(cut * a < s * a)
        total = total - torch.minimum(s * a, cut * a) / 4
    assert 0 < clipped < 4, "the clip should act on some rows"
    total.backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for source in ("trainer", "sampler"):
        sections["loss"]["old_logprobs"] = source
        assert_close(gradients(make_config(tied_model, **sections), rollouts, advantages), want)
