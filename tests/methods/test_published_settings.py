"""Every method has the numbers that were published for it, on every recipe; where it has not, this table says so.

It has what a paper, its authors' code or a maintained library states. It leaves out what is ours (docs/METHODS.md names
it), what belongs to the recipe (temperature, answers a question, batch, learning rate), and what is scaled by the base's
mean length (test_scale.py). What is compared is what the method is built with, so an option that its YAML leaves at the
default counts as well.

Comments name the source. "notes 3" is a section of the developers' notes, "LOG" is docs/LOG.md of 2026-11-30, which
overrides them, "script" is the authors' training script.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nanolapo.config_file import load_config
from nanolapo.methods import load_method
from nanolapo.methods.base import Method

CONFIGS = Path(__file__).parents[2] / "configs"
YAMLS = {path.stem: path for path in sorted((CONFIGS / "methods").glob("*.yaml"))}
RECIPES = sorted(CONFIGS.glob("*/stage1.yaml"))


class Differs(NamedTuple):
    """The published value is known, and ours is another. The comment says why, or that nothing says why."""

    published: Any
    ours: Any


CLIP = {"loss.clip_low": 0.2, "loss.clip_high": 0.2}
CLIP_HIGHER = {"loss.clip_low": 0.2, "loss.clip_high": 0.28}
NO_KL = {"loss.kl_coef": 0.0}
KL = {"loss.kl_coef": 0.001, "loss.kl_kind": "k3"}
OVER_TOKENS, OVER_ANSWERS = {"loss.aggregation": "token_mean"}, {"loss.aggregation": "sequence_mean"}

DLER = {"method.options.whiten": "sequences", "loss.kl_coef": 0.0005, "loss.kl_kind": "k2"}  # paper; code: tokens, k3
DLER |= {"loss.dual_clip": 10.0, **OVER_TOKENS, **CLIP_HIGHER}  # code; notes 6
DAPO = {"loss.dual_clip": 10.0, **OVER_TOKENS, **CLIP_HIGHER, **NO_KL}  # code; notes 20 and 20.1
L1 = {"method.options.redraw": False, **KL}  # paper and code; notes 2
LASER = {"method.options.alpha": 0.5, **CLIP_HIGHER, **KL}  # paper and code; notes 3

# fmt: off
PUBLISHED: dict[str, dict[str, Any]] = {
    "accuracy-only": {},  # nothing published: the control
    # length rewards
    "laser": LASER,
    # notes 3. The code rounds down (floor_counts)
    "laser-d": {**LASER, "method.options.monitor_every": 20, "method.options.floor_counts": False},
    "laser-de": {**LASER, "method.options.monitor_every": 20, "method.options.floor_counts": False},
    # script; LOG. Theirs is a k1 in the reward, which in the loss would have no gradient (efficient_reasoning.py)
    "efficient-reasoning": {"method.options.weight": 0.1, **OVER_ANSWERS,
                            "loss.kl_coef": 0.001, "loss.kl_kind": Differs("k1", "k3")},
    # paper, Eq. 1 and 2, section 4.1 (LOG; the 0.6 of notes 7 is a third party's)
    "grpo-lambda": {"method.options.share": 0.2, "method.options.weight": 0.2},
    # code; notes 5. The loss is TRL's of its day (LOG)
    "hapo": {"method.options.weight": 1.0, "method.options.shape": "cosine", "method.options.mode": "min",
             **OVER_ANSWERS, **CLIP, "loss.kl_coef": 0.04, "loss.kl_kind": "k3"},
    "shorter-better": {"method.options.alpha": 2.0, **KL},  # script; notes 15
    # script, its actor.yaml; notes 19
    "smart-thinker": {"loss.dual_clip": 3.0, **OVER_TOKENS, **NO_KL},
    # paper and code; notes 16 (samples: 16 for the 7B model, 12 for the 32B); the loss is the code's (LOG)
    "o1-pruner": {"method.options.weight": 2.0, "method.options.standardize": True,
                  "method.options.reference_samples": Differs(16, 8), "loss.kind": "gspo", **OVER_ANSWERS, **CLIP},
    # LASER's code has 0.4, where right and wrong are 1.5 apart (LOG)
    "kimi-k1.5": {"method.options.weight": round(0.4 / 1.5, 3)},
    # its figure, 5,700 of 5,810 steps (LOG); as large a share of our short runs would leave a step or none
    "conciser": {"method.options.first_stage": Differs(0.98, 0.8)},
    # code; notes 10
    "drpo": {"method.options.length_temperature": 0.1, "method.options.tau": 10.0, "method.options.beta": 1000.0,
             "method.options.delta": 1e-4, **OVER_ANSWERS, **NO_KL},
    # newer length control
    "gfpo": {"method.options.score": "shortest", **OVER_TOKENS, "loss.kl_coef": 0.001},  # paper (LOG); notes 25.1, 1
    "alp": {"method.options.weight": 0.25, "loss.normalize_std": False},  # prime-rl's code; notes 25.1, 2
    # code (LOG); notes 25.1, 3
    "ddca": {"method.options.beta": 0.2, "method.options.by_pass_rate": True, "method.options.leave_one_out": False},
    # paper; notes 25.1, 4
    "siri": {"method.options.shape": "cosine", "method.options.cycles": 3.0, **OVER_ANSWERS, **CLIP_HIGHER, **NO_KL},
    # script; notes 25.1, 5. There right and wrong are 3.5 apart
    "short-rl": {"method.options.margin": 0.05, "method.options.weight": round(1 / 3.5, 3), **KL},
    "a-dlp": {"method.options.reference": Differs(0.62, None), **KL},  # script; 0.62 is the accuracy of its own base
    # budgets in the prompt
    "l1-exact": L1,
    "l1-max": {**L1, "method.options.max_fraction": 0.5, "method.options.delta": 0.5},  # notes 2
    # paper; notes 12: (0.6, 0.3) or (0.3, 0.6); a format weight of 0.1 is implied, not stated
    "train-long-think-short": {"method.options.correct_weight": 0.6, "method.options.length_weight": 0.3,
                               "method.options.gamma": 0.7, "method.options.decays": 3},
    # paper and code; notes 14, which take the paper's where they differ. Dual clip: code (LOG)
    "hbpo": {"method.options.beta": 4.0, "method.options.intra_weight": 1.0, "method.options.wording": "within",
             "loss.dual_clip": 3.0, **CLIP_HIGHER, **NO_KL},
    # limits
    "truncation": {},  # nothing published but ThinkPrune's limit, which is scaled
    "thinkprune-4k": KL,  # code; notes 4
    "thinkprune-iterative": KL,
    "dler": {**DLER, "method.options.cut_reward": 0.0},  # paper; notes 6. In the code 0.1
    "da-dler": {**DLER, "method.options.cut_reward": 0.0},
    "lapo-dler": DLER,  # the combination is ours
    "palu": {"method.options.pass_rate": 0.8, "method.options.tau": 0.5},  # UNVERIFIED: poster and reviews; notes 9
    # script; notes 11. Theirs is for 32 answers a question; with 8 no answer is so far above the mean (dot.yaml)
    "dot": {"method.options.spread": Differs(3.0, 2.0), "loss.kind": "kl_cov", "loss.options.share": 0.002,
            "loss.options.coef": 1.0, **OVER_ANSWERS, **NO_KL},
    "dapo": {**DAPO, "method.options.overlong": "shape"},
    "dapo-overlong-filter": {**DAPO, "method.options.overlong": "filter"},
    # tokens, steps and sampling
    # paper, script; notes 18. Dual clip: the default of its code
    "sas": {"method.options.share": 0.3, "method.options.separator": "\n\n", "loss.dual_clip": 3.0, **KL},
    # script; notes 21. The clips are the paper's (the script: 0.2 on both sides)
    "hapo-tokens": {"method.options.quantile": 0.8, "method.options.max_rounds": Differs(16, 4), "loss.dual_clip": 10.0,
                    **OVER_TOKENS, **CLIP_HIGHER, **NO_KL},
    # script; notes 13. Theirs moves rho between 0.875 and 0.96 (spo.py)
    "spo": {"method.options.rho": 0.875, "method.options.floor": 0.05, "method.options.first_samples": 8,
            "loss.dual_clip": 10.0, **CLIP_HIGHER, **NO_KL},
    # script; notes 25.1, 6; "Its code has that ratio" (LOG of 2026-11-29)
    "adapt-think": {"method.options.delta": 0.05, "method.options.closing": "</think>", "loss.kind": "gspo",
                    "method.options.opening": "Alright", "method.options.reference_samples": 16,
                    **OVER_ANSWERS, **CLIP, **NO_KL},
    # code; notes 22. Clips and dual clip: the defaults of its code
    "aepo": {"method.options.target": 0.5, "method.options.high": 1.2, "method.options.low": 0.8,
             "method.options.prompts": 0.25, "method.options.threshold": 0.05, "loss.dual_clip": 3.0,
             **CLIP, **NO_KL},
    # policy losses: notes 20 to 20.7
    "grpo": {"loss.normalize_std": True, "loss.kl_coef": 0.04, "loss.kl_kind": "k3", **OVER_ANSWERS, **CLIP},
    "dr-grpo": {"loss.normalize_std": False, "loss.aggregation": "constant", **NO_KL},
    "clip-higher": {**DAPO, "loss.dual_clip": Differs(10.0, 0.0)},  # the YAML is about the clip alone, and names the 10
    "dual-clip": {"loss.dual_clip": 3.0},  # verl's default
    "gspo": {"loss.kind": "gspo", "loss.clip_low": 3e-4, "loss.clip_high": 4e-4, **OVER_ANSWERS, **NO_KL},
    "luspo": {"loss.kind": "luspo", "loss.clip_low": 2e-3, "loss.clip_high": 2.5e-3, **OVER_ANSWERS},
    "cispo": {"loss.kind": "cispo", "loss.options.cap": 5.0, **OVER_TOKENS},  # ScaleRL's cap; verl clamps on both sides
    "kl-cov": {"loss.kind": "kl_cov", "loss.options.share": 0.002, "loss.options.coef": 1.0, **OVER_TOKENS},
    "r2vpo": {},  # nothing published that we have: all three numbers are ours
    "dhpo": {},  # as r2vpo: the weight is ours, the clips are GRPO's and GSPO's
    "minpro": {},  # as r2vpo: the clip is ours
    "tis": {"loss.tis_cap": 2.0},  # verl
    "sequence-mask": {"loss.sequence_mask": (0.0, 3.0)},  # TRL's default
    "dmmpt": {"loss.mastered_mask": (0.2, 0.99)},  # paper, Eq. 9 and 10 (LOG)
}
# fmt: on


def used(method: Method, key: str) -> Any:
    """What the method is built with: the YAML's value, or else the default of the code or the recipe."""
    section, _, name = key.rpartition(".")
    sections = {"loss": method.loss.config, "loss.options": method.loss.options, "method.options": method.options}
    return getattr(sections[section], name)


def test_every_yaml_has_an_entry_and_no_entry_is_left_over():
    missing = sorted(set(YAMLS) - set(PUBLISHED))
    assert not missing, f"add {missing} to PUBLISHED; where nothing is published: an empty entry that says so"
    assert set(PUBLISHED) == set(YAMLS)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_method_has_its_published_settings_on_every_recipe(name):
    settings = PUBLISHED[name]
    expected = {key: value.ours if isinstance(value, Differs) else value for key, value in settings.items()}
    for recipe in RECIPES:
        method = load_method(load_config(recipe, [f"method={YAMLS[name]}"]))
        assert {key: used(method, key) for key in settings} == expected, f"on configs/{recipe.parent.name}"
