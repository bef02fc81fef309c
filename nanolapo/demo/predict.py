"""Predicts where a method ends in the demo before it is run: its own reward on a policy that only chooses the manner.

The policy is a softmax over the three manners, once for the sums of level 0 and once for the others. It starts from the
base's mixture. A gradient moves both what the two softmaxes share and the one of the sum's own kind. Manners have the
lengths of demo/pretrain.py and are right as often as the gate measured. Rewards and advantages are the method's own
code; there is no model, so a prediction takes seconds. Methods that state a length, change answers or watch problems with
a monitor are refused. Groups that a method would drop are trained on.

    python -m nanolapo.demo.predict configs/demo/stage1.yaml [method=configs/methods/kimi-k1.5.yaml]
    python -m nanolapo.demo.predict configs/demo/stage1.yaml demo.mixture=too-long rollout.base_tokens=155

The command prints accuracy, tokens and AES at temperature 1, and the shares of Quick / Careful / Thorough by kind.
"""

from __future__ import annotations

import numpy as np
import torch

from nanolapo import cli
from nanolapo.config import Config, UserError
from nanolapo.data.demo_task import LEVELS
from nanolapo.data.problems import Problem, load_problems
from nanolapo.data.prompts import NO_GUIDANCE
from nanolapo.demo.pretrain import MANNERS, MIXTURES
from nanolapo.evaluation.scores import aes
from nanolapo.methods import load_method
from nanolapo.methods.base import Method, SamplingPlan
from nanolapo.methods.lapo import Discovery
from nanolapo.rollouts import Rollout, Rollouts

TOKENS = np.array([42, 78, 216])
# Share of right answers by level and manner at temperature 1, from the gate on the demo's bases; Thorough as Careful
RIGHT = np.array([[0.97, 0.99, 0.99], [0.25, 0.99, 0.99], [0.15, 0.99, 0.99], [0.24, 0.99, 0.99]])
STEPS, RATE = 150, 1.0


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: np.ndarray = shifted / shifted.sum(axis=-1, keepdims=True)
    return probabilities


def draw_rollouts(
    rng: np.random.Generator, plan: SamplingPlan, problems: list[Problem], shares_KM: np.ndarray
) -> tuple[Rollouts, np.ndarray]:
    """The rollouts of one step and the manner of each [B]. K kinds of sums, M manners."""
    rows, manners = [], []
    for place, index in enumerate(rng.integers(len(problems), size=plan.num_prompts)):
        problem = problems[index]
        level = problem.level or 0
        for manner in rng.choice(len(MANNERS), size=plan.group_size, p=shares_KM[int(level > 0)]):
            length = min(TOKENS[manner], plan.max_new_tokens)
            finished = length == TOKENS[manner]
            right = bool(rng.random() < RIGHT[level, manner]) and finished
            text = r" </think> \boxed{0}" if finished else ""
            rows.append(Rollout(problem, np.zeros(1, int), np.arange(length), np.zeros(length, np.float32), finished,
                                place=place, correct=right, text=text))  # fmt: skip
            manners.append(manner)
    return Rollouts(rows, plan.group_size), np.array(manners)


def predict(config: Config, method: Method, problems: list[Problem]) -> np.ndarray:
    """Shares of the manners after training, [K, M]. Raises UserError for a method that this cannot predict."""
    rng = np.random.default_rng(config.run.seed)
    method.start(problems)
    edits = type(method).edit_rollouts is not Method.edit_rollouts
    if edits or method.guidance(problems[0], 0, 0) != NO_GUIDANCE or method.possible_monitor(0) is not None:
        raise UserError(f"method.name={method.config.method.name}: it states lengths, changes answers or has a monitor, "
                        "and none of that is predicted; run it")  # fmt: skip
    shared_M, own_KM = np.zeros(len(MANNERS)), np.log(np.array(MIXTURES[config.demo.mixture]))
    for step in range(STEPS):
        method.progress = step / STEPS
        shares_KM = softmax(shared_M + own_KM)
        rollouts, manners_B = draw_rollouts(rng, method.sampling(step), problems, shares_KM)
        rollouts.set_rewards(method.reward(rollouts))
        advantages_B = method.advantage(rollouts, torch.from_numpy(rollouts.rewards_PG)).numpy().reshape(len(rollouts))
        method.after_step(rollouts)
        kinds_B = np.array([int((row.problem.level or 0) > 0) for row in rollouts.rows])
        slopes_BM = np.eye(len(MANNERS))[manners_B] - shares_KM[kinds_B]
        slopes_BM *= advantages_B[:, None] / len(rollouts)
        shared_M += RATE * slopes_BM.sum(axis=0)
        for kind in range(len(own_KM)):
            own_KM[kind] += RATE * slopes_BM[kinds_B == kind].sum(axis=0)
    return softmax(shared_M + own_KM)


def outcome(shares_KM: np.ndarray, levels: list[int]) -> tuple[float, float]:
    """Accuracy and mean tokens of these shares on problems of these levels."""
    weight_L = np.bincount(levels, minlength=len(LEVELS)) / len(levels)
    shares_LM = shares_KM[[0, 1, 1, 1]]
    return float(weight_L @ (shares_LM * RIGHT).sum(axis=1)), float(weight_L @ (shares_LM @ TOKENS))


def main() -> None:
    config, action = cli.parse(__doc__ or "")
    if config.lapo.length_map:
        raise UserError("lapo.length_map is set: stage 2 states lengths, which is not predicted; give a stage1.yaml")
    method = load_method(config, default=Discovery)
    if action == "dry-run":
        return print(method.config.method)
    problems, _ = load_problems(config.data.sources)
    levels = [problem.level or 0 for problem in problems]
    base = outcome(np.array(MIXTURES[config.demo.mixture]), levels)
    shares_KM = predict(method.config, method, problems)
    accuracy, tokens = outcome(shares_KM, levels)
    kinds = ", ".join(" / ".join(f"{share:.0%}" for share in shares_M) for shares_M in shares_KM)
    print(f"base {base[0]:.1%}, {base[1]:.0f} tokens; {method.config.method.name} {accuracy:.1%}, {tokens:.0f} tokens, "
          f"AES {aes(accuracy, tokens, *base):+.2f}; level 0 and others: {kinds}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, keeps_progress=False)
