"""Small real things for the tests: configs, problems, rollouts and transformers models made on the fly, all from seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rows import VOCAB as VOCAB
from rows import copied as copied
from rows import fill as fill
from rows import make_config as make_config
from rows import make_problems as make_problems
from rows import make_rows as make_rows
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from nanolapo.evaluation.scores import Answer
from nanolapo.methods.base import Method
from nanolapo.microbatches import make_microbatch
from nanolapo.policy import Policy
from nanolapo.rollouts import Rollouts
from nanolapo.update import update_policy

CPU = torch.device("cpu")


def tiny_qwen(seed: int = 0, vocab: int = VOCAB, tied: bool = True, **options: Any) -> PreTrainedModel:
    """Two layers, hidden 32, weights large enough that its predictions are far from uniform."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
        vocab_size=vocab, tie_word_embeddings=tied, initializer_range=0.3, max_position_embeddings=512, **options,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def tiny_llama(seed: int = 0, vocab: int = VOCAB, **options: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
        vocab_size=vocab, tie_word_embeddings=False, initializer_range=0.3, max_position_embeddings=512, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_answer(problem: str = "a", index: int = 0, length: int = 10, correct: bool = True, **more: Any) -> Answer:
    """A graded sample of an evaluation, of set "s" without a level."""
    rest = {"source": "s", "level": None, "finished": True, "text": ""} | more
    return Answer(problem=problem, index=index, length=length, correct=correct, **rest)


def score_rows(policy: Policy, rollouts: Rollouts) -> None:
    """Write the policy's own log-probs into sampler_logprobs, as an exact sampler would."""
    micro = make_microbatch(rollouts, range(len(rollouts)), policy.device)
    with torch.no_grad():
        logprobs_BT, _ = policy.logprobs(micro)
    fill(
        rollouts,
        sampler_logprobs=[row[:length].numpy() for row, length in zip(logprobs_BT, rollouts.lengths_B, strict=True)],
    )


def update(
    policy: Policy, rollouts: Rollouts, advantages: Sequence[float] | torch.Tensor, keep: Sequence[bool] | None = None
) -> dict[str, float]:
    """One call of update_policy with accuracy-only GRPO on one rank."""
    fill(rollouts, keep=True if keep is None else list(keep))
    values = torch.as_tensor(advantages, dtype=torch.float64)
    return update_policy(policy, Method(policy.config), rollouts, values)


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.named_weights()}


def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
