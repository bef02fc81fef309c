"""The policy: log-probs against a plain transformers forward pass, alignment, precision, padding, head chunks.

Run: python -m pytest tests/test_policy.py        Weights, optimizer and loading are in test_policy_weights.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import (
    CPU,
    VOCAB,
    fill,
    make_config,
    make_problems,
    make_rows,
    same_tensors,
    tiny_llama,
    tiny_qwen,
    update,
    weights_of,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import nanolapo.model.logprobs as logprobs_module
import nanolapo.policy as policy_module
from nanolapo.microbatches import make_microbatch, plan_microbatches
from nanolapo.model.logprobs import LogprobHead
from nanolapo.policy import Policy
from nanolapo.rollouts import Rollouts, make_rollouts
from nanolapo.samplers.sampler import Request, Sample


def plain_logprobs(folder, rollouts: Rollouts, row: int, temperature: float = 1.0) -> torch.Tensor:
    """One row alone, no padding, whole logits, float64 softmax: the reference for everything below."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt, response = rollouts.prompt_ids[row], rollouts.response_ids[row]
    ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
    with torch.no_grad():
        logp = (model(ids).logits[0].double() / temperature).log_softmax(-1)
    return torch.stack([logp[len(prompt) + t - 1, token] for t, token in enumerate(response.tolist())])


def scored(policy: Policy, rollouts: Rollouts, rows: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return policy.logprobs(make_microbatch(rollouts, rows, CPU))[0]


# ------------------------------------------------------------------------------------------------------ log-probs


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.5])
def test_A5_logprobs_equal_a_plain_forward_pass_at_any_temperature(tied_model, untied_model, temperature):
    """The temperature divides the logits before the softmax."""
    rollouts = make_rows([5, 9, 1, 30])
    for folder in (tied_model, untied_model):
        policy = Policy(make_config(folder, rollout={"temperature": temperature}), CPU)
        got = scored(policy, rollouts, [0, 1, 2, 3])
        for row in range(4):
            want = plain_logprobs(folder, rollouts, row, temperature)
            np.testing.assert_allclose(got[row, : len(want)], want, atol=2e-5)
            assert (got[row, len(want) :] == 0).all()


def test_A17_padding_and_batch_composition_change_nothing(tied_model):
    """8 rows of different length: alone, all together, in pairs and in another order."""
    rollouts = make_rows([3, 40, 7, 1, 25, 60, 2, 11])
    policy = Policy(make_config(tied_model), CPU)
    together = scored(policy, rollouts, list(range(8)))
    order = [5, 0, 7, 3, 1, 6, 2, 4]
    shuffled = scored(policy, rollouts, order)
    for row, length in enumerate(rollouts.lengths_B):
        alone = scored(policy, rollouts, [row])[0]
        paired = scored(policy, rollouts, [row, 5])[0]
        for other in (alone, paired, shuffled[order.index(row)]):
            assert (together[row, :length] - other[:length]).abs().max() < 1e-4


def predicts_the_next_id(folder, vocab: int = 16) -> None:
    """A real Llama by hand: one-hot embeddings, attention and MLP off, a head that says 'id + 1'."""
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=vocab, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=vocab
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(vocab))
        model.lm_head.weight.copy_(20 * torch.eye(vocab).roll(1, dims=0))  # row v fires on id v - 1
    model.save_pretrained(folder)


def test_B5_off_by_one(tmp_path):
    """Prompt 3, 4; response 5, 6, 7 is certain. Response 5, 9, 10 is wrong at the 9 only, also in its first place."""
    predicts_the_next_id(tmp_path)
    rollouts = make_rows([3, 3, 3, 3])
    fill(rollouts, prompt_ids=[np.array([3, 4])] * 4)
    fill(rollouts, response_ids=[np.array(r) for r in ([5, 6, 7], [5, 9, 10], [9, 10, 11], [5, 6, 8])])
    policy = Policy(make_config(tmp_path), CPU)
    certain = scored(policy, rollouts, [0, 1, 2, 3]) > -1e-3
    assert certain.tolist() == [[True] * 3, [True, False, True], [False, True, True], [True, True, False]]
    # The sampler's numbers, stored token by token, line up with the trainer's: no mismatch on any token.
    fill(rollouts, sampler_logprobs=[np.where(row, 0.0, -80.0).astype(np.float32) for row in certain.numpy()])
    fill(rollouts, correct=[True, False, True, False])
    assert update(policy, rollouts, [1.0, -1.0, 1.0, -1.0])["mismatch_max"] < 1e-3


def test_A14_end_token_counts_though_it_is_also_the_padding(tied_model):
    """[a, b, EOS] beside a row of 6, EOS == pad == 0: mask 1 1 1 0 0 0 by position, and the EOS has a gradient."""
    rollouts = make_rows([3, 6])
    rollouts.rows[0].response_ids = np.array([5, 6, 0])
    micro = make_microbatch(rollouts, [0, 1], CPU)
    assert micro.mask_BT.tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    policy = Policy(make_config(tied_model), CPU)
    logprobs_BT, _ = policy.logprobs(micro)
    logprobs_BT[0, 2].backward()
    gradient = policy.model.get_input_embeddings().weight.grad
    assert gradient is not None and gradient[0].abs().max() > 0


def test_A9_sampled_ids_are_trained_as_they_are(tied_model):
    """Ids that no tokenizer would produce for their text ("1", "2" instead of "12") arrive untouched at the model.

    Nothing on the training path has a tokenizer: rollouts, policy and update only ever see ids.
    """
    ids = np.array([11, 12, 11, 0, 12], dtype=np.int64)
    request = Request([1, 2], seed=0, max_new_tokens=8, problem=make_problems(1)[0])
    sample = Sample(ids, np.full(5, -1.0, dtype=np.float32), finished=True)
    rollouts = make_rollouts([request] * 2, [sample] * 2, 2)
    fill(rollouts, text=["12", "something else altogether"])
    micro = make_microbatch(rollouts, [0, 1], CPU)
    assert micro.ids_S.tolist() == [1, 2, *ids.tolist(), *ids.tolist()]  # the prompt they share, then both
    assert micro.lengths_B.tolist() == [5, 5] and rollouts.lengths_B.tolist() == [5, 5]
    for module in ("rollouts", "policy", "update", "losses/grpo", "loop"):
        source = (Path(policy_module.__file__).parent / f"{module}.py").read_text()
        assert "encode(" not in source.replace("decode(", ""), module


# ------------------------------------------------------------------------------------------------------ precision


def test_A13_softmax_and_gather_are_float32_under_bf16(untied_model):
    """The arithmetic may be bf16, the softmax over its logits is not: within 1e-3 of float64 on the same logits."""
    model = tiny_llama(vocab=2000)
    head = model.lm_head.bfloat16()
    hidden = torch.randn(50, 32).bfloat16() * 3
    targets = torch.randint(0, 2000, (50,))
    with torch.no_grad():
        got, entropy = LogprobHead(head)(hidden, targets, 1.0, with_entropy=True)
        logits = head(hidden)
    want = logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    coarse = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert got.dtype == torch.float32 and entropy is not None and entropy.dtype == torch.float32
    assert (got - want).abs().max() < 1e-3 < (coarse - want).abs().max()

    rollouts = make_rows([30, 40])
    exact = scored(Policy(make_config(untied_model), CPU), rollouts, [0, 1])
    rough_policy = Policy(make_config(untied_model, model={"dtype": "bfloat16"}), CPU)
    rough = scored(rough_policy, rollouts, [0, 1])
    assert rough.dtype == torch.float32 and 1e-4 < (rough - exact).abs().mean() < 0.1  # bf16 noise, not a bug


@pytest.mark.parametrize("with_entropy", [False, True])
def test_head_in_blocks_equals_the_whole_including_gradients(monkeypatch, with_entropy):
    """7 words at a time, one, or all: the same log-probs, entropies and gradients of hidden states and head."""
    torch.manual_seed(0)
    head = torch.nn.Linear(32, VOCAB)
    targets = torch.randint(0, VOCAB, (50,))
    results = []
    for elements in (2**24, 7 * 50, 1):
        monkeypatch.setattr(logprobs_module, "CPU_LOGITS", elements)
        torch.manual_seed(1)
        hidden = torch.randn(50, 32, requires_grad=True)
        head.zero_grad()
        logprobs, entropy = LogprobHead(head)(hidden, targets, 0.7, with_entropy)
        assert (entropy is not None) == with_entropy
        (logprobs * torch.arange(50)).sum().backward()
        gradients = [hidden.grad, head.weight.grad.clone(), head.bias.grad.clone()]
        results.append([logprobs, *([] if entropy is None else [entropy]), *gradients])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)  # of sums near 100
    exact = torch.nn.Linear(32, VOCAB, dtype=torch.float64)  # and by autograd over the whole matrix in float64
    exact.load_state_dict(head.state_dict())
    hidden = hidden.detach().double().requires_grad_()
    logp = (exact(hidden) / 0.7).log_softmax(-1)
    chosen, entropy = logp[torch.arange(50), targets], -(logp.exp() * logp).sum(-1)
    (chosen * torch.arange(50)).sum().backward()
    want = [chosen, *([entropy] if with_entropy else []), hidden.grad, exact.weight.grad, exact.bias.grad]
    for got, right in zip(results[0], want, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-4)  # of sums near 100


def test_gradient_checkpointing_changes_memory_not_numbers(tied_model):
    """All layers, the first of the two or none: gradients and weights are equal to the last bit."""
    trained = []
    for share in (False, 0.5, True):
        policy = Policy(make_config(tied_model, model={"gradient_checkpointing": share}), CPU)
        assert [layer.training for layer in policy.model.get_decoder().layers] == [share > 0, share > 0.5]
        policy.logprobs(make_microbatch(make_rows([9, 4, 30, 2]), range(4), CPU))[0].square().sum().backward()
        gradients = {f"gradient {name}": p.grad.clone() for name, p in policy.trained.items()}
        update(policy, make_rows([9, 4, 30, 2]), [1.0, -1.0, 0.5, -0.5])
        trained.append(gradients | weights_of(policy))
    assert same_tensors(trained[0], trained[1]) and same_tensors(trained[0], trained[2])


def test_B20_no_dropout_while_scoring_or_training(tmp_path):
    """A model folder with dropout 0.5, in training mode: log-probs repeat exactly."""
    tiny_qwen(attention_dropout=0.5).save_pretrained(tmp_path)
    rollouts = make_rows([9, 4])
    for checkpointing in (False, True):
        policy = Policy(make_config(tmp_path, model={"gradient_checkpointing": checkpointing}), CPU)
        policy.model.train()
        first, second = scored(policy, rollouts, [0, 1]), scored(policy, rollouts, [0, 1])
        assert torch.equal(first, second)
        np.testing.assert_allclose(first[0, :9], plain_logprobs(tmp_path, rollouts, 0), atol=2e-5)


# ------------------------------------------------------------------------------------------------------ micro-batches


def packed_tokens(rollouts: Rollouts, rows: list[int]) -> int:
    return len(make_microbatch(rollouts, rows, CPU).ids_S)


def test_microbatches_hold_every_row_once_within_the_budget():
    rollouts = make_rows(np.random.default_rng(0).integers(1, 90, 40).tolist(), group_size=4)
    sizes = [len(p) + len(r) for p, r in zip(rollouts.prompt_ids, rollouts.response_ids, strict=True)]
    for num_ranks in (1, 2, 3):
        plan = plan_microbatches(rollouts, list(range(40)), num_ranks, token_budget=100)
        assert len(plan) == num_ranks and len({len(batches) for batches in plan}) == 1
        assert sorted(row for batches in plan for rows in batches for row in rows) == list(range(40))
        for rows in (rows for batches in plan for rows in batches if len(rows) > 1):
            assert packed_tokens(rollouts, rows) <= 100
        loads = [sum(sizes[row] for rows in batches for row in rows) for batches in plan]
        assert max(loads) - min(loads) <= max(sizes)
    filled = [packed_tokens(rollouts, rows) for rows in plan_microbatches(rollouts, list(range(40)), 1, 400)[0]]
    assert min(filled[:-1]) > 400 - max(sizes)  # the next row did not fit any more
    group, prompt = make_rows([10, 10, 10, 10], group_size=4), make_rows([10], group_size=1).prompt_ids[0]
    assert plan_microbatches(group, [0, 1, 2, 3], 1, 40 + len(prompt)) == [[[0, 1, 2, 3]]]  # the prompt counts once
    assert plan_microbatches(group, [0, 1, 2, 3], 1, 39 + len(prompt)) == [[[0, 1, 2], [3]]]
    assert plan_microbatches(rollouts, [], 2, 100) == [[], []]
    assert plan_microbatches(rollouts, [4], 1, 1) == [[[4]]]  # a row longer than the budget goes alone


def test_worked_example_of_make_microbatch():
    rollouts = fill(
        make_rows([3, 1, 1], group_size=1),
        prompt_ids=[np.array([5, 6]), np.array([5, 6]), np.array([5])],
        response_ids=[np.array([7, 8, 2]), np.array([3]), np.array([9])],
    )
    micro = make_microbatch(rollouts, [0, 1, 2], CPU)
    assert micro.ids_S.tolist() == [5, 6, 7, 8, 2, 3, 5, 9]
    assert micro.positions_S.tolist() == [0, 1, 2, 3, 4, 2, 0, 1]
    assert (micro.packing.sizes, micro.packing.prompt_of) == ([2, 3, 1, 1, 1], [0, 0, 0, 3, 3])
    assert micro.tokens_N.tolist() == [2, 3, 4, 5, 7] and micro.predictor_N.tolist() == [1, 2, 3, 1, 6]
    assert micro.mask_BT.tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
