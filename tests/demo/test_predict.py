"""The prediction of where a method ends in the demo: ends that follow from the rewards, without a model.

Run: python -m pytest tests/demo/test_predict.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nanolapo.config import Config, UserError
from nanolapo.config_file import load_config
from nanolapo.data.problems import load_problems
from nanolapo.demo import predict as module
from nanolapo.demo.predict import outcome, predict
from nanolapo.demo.pretrain import MIXTURES
from nanolapo.methods import load_method
from nanolapo.methods.lapo import Discovery

CONFIGS = Path(__file__).parents[2] / "configs"


def shares(*overrides: str) -> np.ndarray:
    config: Config = load_config(CONFIGS / "demo" / "stage1.yaml", list(overrides))
    method = load_method(config, default=Discovery)
    return predict(method.config, method, load_problems(config.data.sources)[0])


def test_outcome_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two problems of level 0, one each of levels 1 and 3."""
    monkeypatch.setattr(module, "RIGHT", np.array([[1, 1, 1], [0.5, 1, 1], [9, 9, 9], [0.25, 1, 1]]))
    accuracy, tokens = outcome(np.array([[0.5, 0.5, 0.0], [0.2, 0.6, 0.2]]), [0, 0, 1, 3])
    assert accuracy == pytest.approx((1 + 1 + (0.1 + 0.8) + (0.05 + 0.8)) / 4)
    assert tokens == pytest.approx((60 + 60 + 2 * (0.2 * 42 + 0.6 * 78 + 0.2 * 216)) / 4)


def test_without_a_signal_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """If every answer is right, accuracy-only GRPO has advantages of exactly 0."""
    monkeypatch.setattr(module, "RIGHT", np.ones((4, 3)))
    assert np.allclose(shares("method.name=base:Method"), MIXTURES["typical"])


def test_ends_that_follow_from_the_rewards() -> None:
    assert shares("method.name=base:Method")[1, 0] < 0.03  # Quick is often wrong where something carries
    assert (
        shares("method.name=thinkprune:Truncation", "method.options.limits=[64]")[:, 0].min() > 0.9
    )  # nothing else fits
    typical, too_long = shares(), shares("demo.mixture=too-long", "rollout.base_tokens=155")
    assert typical[1, 1] > 0.9 and too_long[:, 2].min() > 0.9  # LAPO goes where most right answers are


@pytest.mark.parametrize("name", ["l1-exact", "thinkprune-4k", "laser-d", "dot", "aepo", "da-dler"])
def test_what_it_cannot_predict_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="states lengths, changes answers or has a monitor"):
        shares(f"method={CONFIGS / 'methods' / name}.yaml")
