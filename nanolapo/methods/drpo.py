"""DRPO: decoupled reward policy optimisation (Li et al., arXiv 2510.04474; code Optimization-AI/DRPO, built on DisCO).

Replaces advantage and policy loss. With s_i the mean log-prob of answer i, P the right and N the wrong answers of a prompt,
and the length reward r_i = 1 - L_i / C of right answers only (C = rollout.max_new_tokens, the capacity of an answer;
published: 8,192 on a base with 8,086):

    w_i  = exp(r_i / lambda) / sum_P exp(r_j / lambda)             positive: no right answer is ever pushed down
    J_q  = sum_P w_i s_i  -  tau * log( (1/|N|) sum_N exp(s_j / tau) )
    loss = -(1/n_prompts) sum_q J_q  +  sg( max(beta * (K - delta), 0) ) * K,     K = token mean of logp_old - logp

A prompt of one class adds 0 to J but counts in n_prompts, and its tokens count in K. No clipping, no reference KL.

Micro-batches here do not hold whole groups and need not: the gradient of the log-mean-exp is sum_N softmax(s_j / tau) ds_j,
so with constant softmax weights rows are independent, and dJ_q / ds_i takes the place of the advantage. The weights come
from the old log-probs of the whole batch, as recorded while sampling. With one update per rollout step that is exact (up to
the engine's rounding, here divided by tau = 10); with more, the later ones keep the first's weights where theirs follow
s_j. The value of the loss has no meaning (nor has theirs).

K is the mean over the optimizer batch, which is scored once more for it (theirs: over each micro-batch, so that its size
would change the gradient); its token mean uses the step's mean length. It is 0 while logp is logp_old, so with one update
per rollout step it never acts. The paper's penalty has the same gradient.

loss.aggregation must be sequence_mean: that is the 1/L_i of s_i. Edge: one class only: no gradient. No state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanolapo.config import Config, NotNegative, Positive, UserError
from nanolapo.losses import Loss, LossInputs
from nanolapo.methods.base import Method
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class Options:
    length_temperature: Positive[float] = 0.1  # lambda; smaller: shorter
    tau: Positive[float] = 10.0
    beta: NotNegative[float] = 1000.0  # strength of the trust-region penalty ...
    delta: NotNegative[float] = 1e-4  # ... above this K


def decoupled_weights(
    lengths_G: np.ndarray, correct_G: np.ndarray, scores_G: np.ndarray, capacity: float, lam: float, tau: float
) -> np.ndarray:
    """dJ_q / ds_i, float64 [G]: w_i for right answers (sum 1), minus the softmax of s_j / tau for wrong ones (sum -1).

    >>> decoupled_weights(np.array([100, 200, 50, 50]), np.array([True, True, False, False]), np.zeros(4), 1000, 0.1, 10)
    array([ 0.73105858,  0.26894142, -0.5       , -0.5       ])
    """
    right = np.asarray(correct_G, dtype=bool)
    weights = np.zeros(len(right))
    if right.all() or not right.any():
        return weights
    weights[right] = softmax((1.0 - lengths_G[right] / capacity) / lam)
    weights[~right] = -softmax(scores_G[~right] / tau)
    return weights


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


class DrpoLoss(Loss):
    """-A log p, plus the trust-region penalty, which is on all rows. loss.clip_low and clip_high do not act."""

    acts_without_advantage = True
    needs_drift = True

    def __init__(self, config: Config, beta: float, delta: float) -> None:
        super().__init__(config)
        self.beta, self.delta = beta, delta

    def prepare(self, rollouts: Rollouts, advantages: Tensor) -> None:
        lengths = rollouts.lengths_B[rollouts.keep_B]
        self.mean_length = float(lengths.mean()) if len(lengths) else 1.0

    def __call__(self, x: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        drift_BT = (x.old_logprobs_BT - x.logprobs_BT) * x.mask_BT
        strength = max(0.0, self.beta * (self.drift - self.delta))
        # L_b / mean(L) turns the 1 / (L_b rows) of sequence_mean into 1 / tokens.
        length_B1 = x.mask_BT.sum(dim=1, keepdim=True) / self.mean_length
        loss_BT = -x.advantages_BT * x.logprobs_BT + strength * drift_BT * length_B1
        return loss_BT, {"drift": drift_BT.detach(), "penalty_strength": strength * x.mask_BT}


class Drpo(Method):
    Options = Options
    uses_normalize_std = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config.loss
        if c.aggregation != "sequence_mean" or c.kind != "grpo" or c.kl_coef or c.dual_clip or c.reweighs:
            raise UserError(
                "drpo:Drpo has its own policy loss: needs loss.kind=grpo, loss.aggregation=sequence_mean, loss.kl_coef=0, "
                "loss.dual_clip=0, loss.tis_cap=0, and no loss.sequence_mask or loss.mastered_mask "
                "(configs/methods/drpo.yaml)"
            )
        self.loss = DrpoLoss(config, self.options.beta, self.options.delta)

    def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
        """G * dJ_q/ds_i: sequence_mean divides by the number of rows, the paper by the number of prompts."""
        o, capacity = self.options, self.config.rollout.max_new_tokens
        scores_B = np.array([s.mean(dtype=np.float64) if len(s) else 0.0 for s in rollouts.sampler_logprobs])
        columns = (rollouts.lengths_B, rollouts.correct_B, scores_B)
        weights_PG = [
            decoupled_weights(lengths, correct, scores, capacity, o.length_temperature, o.tau)
            for lengths, correct, scores in zip(*map(rollouts.by_group, columns), strict=True)
        ]
        return torch.from_numpy(np.concatenate(weights_PG) * rollouts.group_size)
