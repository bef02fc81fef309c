r"""Train Long, Think Short: a budget in the question that shrinks while training goes on.

Source: Hammoud et al., arXiv 2508.08940. Paper text read.

    R = l_c * c + l_l * R_len + l_f * R_fmt
    B(t) = max(1, B0 * gamma^floor(t / T))            256, 179, 125, 87 in four equal parts of the run
    R_len = L / B up to B, 1 - (L - B) / B up to 2B, 0 beyond; for wrong answers as well

The prompt ends in "IMPORTANT: You should use exactly {B} tokens in your response." B0 was published for a base that answers
GSM8K in 258 tokens on average (Qwen-2.5-7B). So it scales with our base's mean length, up to our limit (but for the
rounding). `final_budget` is the paper's general form, gamma = (S_f / S_0)^(1/n). Its linear schedule and flat-band
reward (ablations) are left out.
Its objective has a KL term without a number; the recipe's is taken.

The paper studies the weights (l_c, l_l) = (0.3, 0.6) and (0.6, 0.3); the default is the second, in which no wrong
answer can outscore a right one. The paper implies l_f = 0.1, a largest R_len of 1, 0.5 for each half of R_fmt. R_fmt
asks for one closed thought and one answer after it. The paper's template has <answer> tags; if the prompt names
none, the box is the answer (ours), and a <think> in the prompt counts.

Edge cases: a prompt without a budget has no length term. An empty answer of length 1 gets 1 / B.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from nanolapo.config import Config, NotNegative, Positive, Share, UserError
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import Guidance, curriculum_guidance
from nanolapo.grader.boxes import THOUGHT_TAG, last_boxed, split_thought
from nanolapo.methods.base import Method, SamplingPlan
from nanolapo.methods.tools import refuse_unused, scale, stated
from nanolapo.rollouts import Rollouts

QWEN_7B = 258.4  # mean tokens of Qwen-2.5-7B on GSM8K


def triangle(lengths: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """R_len, element by element: rises to 1 at the budget and falls back to 0 at twice the budget.

    >>> triangle(np.array([50, 100, 150, 200, 300]), np.full(5, 100.0))
    array([0.5, 1. , 0.5, 0. , 0. ])
    """
    return np.maximum(0.0, 1.0 - np.abs(lengths - budgets) / budgets)


def format_score(text: str, answer_tags: bool) -> float:
    r"""Half for one closed thought, half for one answer after it, or anywhere if no thought is closed.

    >>> [format_score(text, False) for text in (r"3. </think> \boxed{7}", r"3. \boxed{7} </think> 7", r"3. \boxed{7}", "7")]
    [1.0, 0.5, 0.5, 0.0]
    """
    rest = split_thought(text)[1]
    closed = [tag["end"] is not None for tag in THOUGHT_TAG.finditer(text)] in ([True], [False, True])
    tagged = re.findall("</?answer>", rest) == ["<answer>", "</answer>"]
    answered = tagged if answer_tags else last_boxed(rest) is not None
    return 0.5 * closed + 0.5 * answered


@dataclass(frozen=True)
class Options:
    correct_weight: NotNegative[float] = 0.6  # l_c
    length_weight: NotNegative[float] = 0.3  # l_l
    format_weight: NotNegative[float] = 0.1  # l_f
    start_budget: Positive[int] | None = None  # B0, tokens; None: 256, scaled
    gamma: Share = 0.7
    decays: Positive[int] = 3  # how often the budget shrinks, at equal distances
    interval: Positive[int] | None = None  # T, steps between two decays; None: equal parts of the run
    final_budget: Positive[int] | None = None  # if given, gamma is chosen so that the run's last part has this budget


class TrainLongThinkShort(Method):
    """Exponential budget curriculum."""

    Options = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        p = config.prompt
        words = p.template if p.style == "raw" else p.system + p.instruction
        self.answer_tags = "<answer>" in words
        o, limit = self.options, config.rollout.max_new_tokens
        if o.final_budget:
            refuse_unused(
                o, ["gamma", "interval"], "beside final_budget, which sets the decay from part to part of the run"
            )
        if o.interval:
            refuse_unused(o, ["decays"], "beside interval")
        start = o.start_budget or min(round(256 * scale(config, QWEN_7B, "method.options.start_budget")), limit)
        self.start_budget, self.step = start, 0
        last = o.final_budget or start
        if not last <= start <= limit:
            raise UserError(
                f"method.options.start_budget={start}, final_budget={last}: need 1 <= final_budget <= start_budget <= "
                f"rollout.max_new_tokens={limit}"
            )

    def budget(self, step: int) -> int:
        """B(t), cut to an integer, and as the prompt prints it."""
        o = self.options
        decays = step // o.interval if o.interval else int(self.progress * (o.decays + 1) + 1e-9)
        gamma = o.gamma if o.final_budget is None else (o.final_budget / self.start_budget) ** (1 / o.decays)
        return stated(self.config, int(self.start_budget * gamma**decays + 1e-9))

    def sampling(self, step: int) -> SamplingPlan:
        self.step = step
        return super().sampling(step)

    def guidance(self, problem: Problem, rollout_index: int, step: int) -> Guidance:
        return curriculum_guidance(self.budget(step))

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        o, budgets = self.options, rollouts.budgets_B
        scores = np.array([format_score(text, self.answer_tags) for text in rollouts.texts])
        verdict = rollouts.correct_B.astype(np.float64)
        return {
            "correct": verdict,
            "correct_extra": (o.correct_weight - 1.0) * verdict,
            "length": o.length_weight * np.nan_to_num(triangle(rollouts.lengths_B, budgets)),
            "format": o.format_weight * scores,
        }

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        return {"budget/now": float(self.budget(self.step))}
