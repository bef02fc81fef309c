"""Published numbers of tokens are scaled by the base's mean length, never by the generation limit.

Run: python -m pytest tests/methods/test_scale.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rows import make_config

from nanolapo.config import UserError
from nanolapo.config_file import load_config
from nanolapo.methods.a_dlp import ADlp
from nanolapo.methods.alp import Alp
from nanolapo.methods.base import Method
from nanolapo.methods.dapo import Dapo
from nanolapo.methods.dler import DaDler, Dler
from nanolapo.methods.dot import Dot
from nanolapo.methods.hapo_tokens import TokenHapo
from nanolapo.methods.hbpo import Hbpo
from nanolapo.methods.l1 import L1Exact
from nanolapo.methods.l1_max import L1Max
from nanolapo.methods.lapo import Discovery, Internalization
from nanolapo.methods.laser import Laser
from nanolapo.methods.laser_adaptive import LaserD, LaserDE
from nanolapo.methods.palu import Palu
from nanolapo.methods.short_rl import ShortRl
from nanolapo.methods.shorter_better import ShorterBetter
from nanolapo.methods.siri import Siri
from nanolapo.methods.thinkprune import ThinkPrune4k, ThinkPruneIterative, Truncation
from nanolapo.methods.tools import DEEPSCALER, R1_DISTILL, scale
from nanolapo.methods.train_long import TrainLongThinkShort
from nanolapo.reproduce.paper import paper_tables

ROOT = Path(__file__).parents[2]


def make(kind: type[Method], base: float = 0, limit: int = 8192, **options: Any) -> Any:
    """The method; LAPO's two keys are in a section of their own."""
    lapo = {key: options.pop(key) for key in ("decay", "sigma") if key in options}
    rollout = {"group_size": 4, "prompts_per_step": 1, "max_new_tokens": limit, "base_tokens": base}
    return kind(make_config(rollout=rollout, lapo=lapo, method={"options": options}))


# By hand: published number x base / 6229 (DeepScaleR), / 8086 (R1-Distill) or / 258.4 (Qwen-7B on GSM8K); a price per token
# the other way round. class, options, attribute, value at a mean of 100 tokens, at 1000
SCALED: list[tuple[type[Method], dict[str, Any], str, Any, Any]] = [
    (Discovery, {}, "decay", 1.605394, 16.05394),
    (Internalization, {}, "sigma", 1.926473, 19.26473),
    (L1Exact, {}, "low", 2, 16),
    (L1Exact, {}, "high", 64, 642),
    (L1Exact, {}, "alpha", 0.018687, 0.0018687),
    (L1Max, {}, "low", 2, 16),
    (L1Max, {}, "high", 64, 642),
    (L1Max, {}, "alpha", 0.018687, 0.0018687),
    (L1Max, {}, "max_alpha", 0.6229, 0.06229),
    (Laser, {}, "target", 101, 1013),
    (LaserD, {}, "target", 51, 507),
    (LaserD, {}, "candidates", [51, 64, 77], [507, 634, 761]),
    (LaserDE, {}, "candidates", [51, 64, 77], [507, 634, 761]),
    (Hbpo, {}, "budgets", (8, 16, 33, 41), (82, 164, 329, 411)),
    (ShorterBetter, {}, "beta", 0.08086, 0.008086),
    (Dot, {"spread": 1.0}, "min_cut", 1.0, 3.957457),
    (Dot, {"spread": 1.0, "min_cut": 0.1}, "min_tokens", 1.0, 1.978729),
    (Truncation, {}, "limits", (64,), (642,)),
    (ThinkPrune4k, {}, "limits", (64,), (642,)),
    (ThinkPruneIterative, {}, "limits", (64, 48, 32), (642, 482, 321)),
    (TrainLongThinkShort, {}, "start_budget", 99, 991),
    (Alp, {"form": "paper"}, "beta", 6.229e-6, 6.229e-7),
    (Siri, {}, "high", 203, 2026),
    (Siri, {}, "low", 101, 1013),
    (ShortRl, {}, "tol", 1.236705, 12.36705),
    (ADlp, {}, "lam", 0.06229, 0.006229),
    (ADlp, {}, "rate", 0.06229, 0.006229),
]


@pytest.mark.parametrize(("kind", "options", "name", "at_100", "at_1000"), SCALED)
def test_a_default_follows_the_base_and_not_the_limit(kind, options, name, at_100, at_1000):
    for limit in (8192, 4096, 100_000):
        for base, want in ((100, at_100), (1000, at_1000)):
            got = getattr(make(kind, base, limit, **options), name)
            assert (got[:3] if name == "candidates" else got) == pytest.approx(want, rel=1e-5), (base, limit)


def test_the_table_has_every_file_that_scales():
    files = (ROOT / "nanolapo/methods").glob("*.py")
    scaling = {file.stem for file in files if "scale(config" in file.read_text(encoding="utf-8")} - {"tools"}
    assert scaling == {kind.__module__.split(".")[-1] for kind, *_ in SCALED}


# What belongs to the limit of the run: no mean length is needed, and none changes it
OF_THE_LIMIT: list[tuple[type[Method], str, Any, Any]] = [
    (Dapo, "cache", 819.2, 51.2),  # a fifth of 4096 and of 256
    (TokenHapo, "cache", 1638.4, 102.4),
    (Dler, "target", 4096, 256),
    (DaDler, "short_target", 2048, 128),
    (Palu, "limit", 4096, 256),
]


@pytest.mark.parametrize(("kind", "name", "at_4096", "at_256"), OF_THE_LIMIT)
def test_what_belongs_to_the_limit_follows_the_limit_and_not_the_base(kind, name, at_4096, at_256):
    for limit, want in ((4096, at_4096), (256, at_256)):
        assert [getattr(make(kind, base, limit), name) for base in (0, 100)] == pytest.approx([want, want])


# Options that leave nothing to scale; without the last of them its key is named
GIVEN: list[tuple[type[Method], dict[str, Any], str]] = [
    (Discovery, {"decay": 7.0}, "lapo.decay"),
    (Internalization, {"sigma": 7.0}, "lapo.sigma"),
    (L1Exact, {"max_budget": 90, "alpha": 0.1, "min_budget": 9}, "method.options.min_budget"),
    (L1Exact, {"min_budget": 9, "alpha": 0.1, "max_budget": 90}, "method.options.max_budget"),
    (L1Exact, {"min_budget": 9, "max_budget": 90, "alpha": 0.1}, "method.options.alpha"),
    (L1Max, {"min_budget": 9, "max_budget": 90, "alpha": 0.1, "max_alpha": 0.1}, "method.options.max_alpha"),
    (Laser, {"target": 40}, "method.options.target"),
    (LaserD, {"interval": 10, "target": 40}, "method.options.target"),
    (LaserDE, {"target": 40, "interval": 10}, "method.options.interval"),
    (Hbpo, {"budgets": [8, 16]}, "method.options.budgets"),
    (ShorterBetter, {"beta": 0.01}, "method.options.beta"),
    (Dot, {"spread": 1.0, "min_cut": 3}, "method.options.min_cut"),
    (Truncation, {"limits": [60]}, "method.options.limits"),
    (ThinkPruneIterative, {"limits": [60, 30]}, "method.options.limits"),
    (TrainLongThinkShort, {"start_budget": 80}, "method.options.start_budget"),
    (Alp, {"form": "paper", "beta": 1e-5}, "method.options.beta"),
    (Siri, {"max_tokens": 60}, "method.options.max_tokens"),
    (ShortRl, {"tol": 2.0}, "method.options.tol"),
    (ADlp, {"rate": 0.1, "lam": 0.1}, "method.options.lam"),
    (ADlp, {"lam": 0.1, "rate": 0.1}, "method.options.rate"),
]


@pytest.mark.parametrize(("kind", "options", "key"), GIVEN)
def test_without_a_mean_length_one_line_names_the_key_that_helps(kind, options, key):
    method = make(kind, **options)  # no mean length is needed
    last = list(options)[-1]
    value = getattr(method.config.lapo, last) if key.startswith("lapo") else getattr(method.options, last)
    assert value == (tuple(options[last]) if isinstance(options[last], list) else options[last])
    with pytest.raises(UserError) as error:
        make(kind, **{name: options[name] for name in list(options)[:-1]})
    assert str(error.value) == (
        "rollout.base_tokens is not set: give the mean length of the base's answers in tokens (evaluate.py prints it), "
        f"or set {key}"
    )


def test_a_share_as_the_smallest_cut_needs_the_mean_length():
    with pytest.raises(UserError, match="or set method.options.min_cut in tokens"):
        make(Dot, spread=1.0, min_cut=0.1)


def test_no_scaled_length_is_above_the_limit_and_a_given_one_is_not_touched():
    assert make(L1Exact, 1000, limit=128).high == 128
    assert make(L1Exact, 0, limit=128, min_budget=1, max_budget=127, alpha=1).high == 127
    assert make(ThinkPruneIterative, 1000, limit=400).limits == (400, 400, 321)
    assert make(TrainLongThinkShort, 1000, limit=128).start_budget == 128
    assert make(TrainLongThinkShort, 0, limit=128, start_budget=127).start_budget == 127
    assert make(Laser, 1000, limit=128).target == 64
    assert (make(Siri, 1000, limit=128).high, make(Siri, 1000, limit=128).low) == (128, 64)


def test_the_published_means_are_those_of_the_papers_table():
    rows = {base: paper_tables()[1].row(base, "Base").scores["average"] for base in "AB"}
    assert tuple(rows[base].tokens for base in "AB") == (R1_DISTILL, DEEPSCALER)
    assert scale(make_config(rollout={"base_tokens": 6229}), DEEPSCALER, "key") == 1


@pytest.mark.parametrize(("recipe", "base"), [("deepscaler-1.5b", 6229), ("deepseek-r1-1.5b", 8086)])
def test_the_papers_recipes_have_its_100_and_120_tokens_on_both_bases(recipe, base):
    config = load_config(ROOT / f"configs/{recipe}/stage1.yaml")
    assert config.rollout.base_tokens == base
    assert Discovery(config).decay == 100
    assert Internalization(load_config(ROOT / f"configs/{recipe}/stage2.yaml")).sigma == 120
