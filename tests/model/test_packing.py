"""Rows side by side and the bf16 copy: the same gradients as one row at a time through plain transformers.

Run: python -m pytest tests/model/test_packing.py
(Micro-batches with equal prompts run through tests/test_update.py, too.)
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_policy import packed_tokens, plain_logprobs, scored
from test_update import ADVANTAGES, LENGTHS, assert_close, gradients, slow_gradients
from tiny import CPU, VOCAB, make_config, make_rows, score_rows, tiny_llama, update
from transformers import (
    AutoModelForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from nanolapo.checkpoint import load_checkpoint, save_checkpoint
from nanolapo.config import UserError
from nanolapo.microbatches import make_microbatch
from nanolapo.model.attention import attend
from nanolapo.policy import Policy


def test_a_prompt_shared_by_neighbours_is_computed_once(tied_model):
    """Equal prompts in other rows' company, prompts that differ within a group, a prompt that comes back later."""
    rollouts = make_rows(LENGTHS, group_size=4)
    rollouts.rows[1].prompt_ids = np.append(rollouts.prompt_ids[1], 7)  # as if this row carried another budget
    for row in rollouts.rows[4:]:
        row.prompt_ids = rollouts.prompt_ids[3][::-1].copy()  # another prompt of the same length
    config = make_config(tied_model, train={"grad_clip": 1e9})
    want = slow_gradients(tied_model, rollouts, ADVANTAGES, "token_mean", list(range(8)))
    assert_close(gradients(Policy(config, CPU), rollouts, ADVANTAGES), want)
    prompts = [len(prompt) for prompt in rollouts.prompt_ids]
    distinct = prompts[0] + prompts[1] + prompts[2] + prompts[4]  # rows 0 | 1 | 2, 3 | 4, 5, 6, 7
    assert packed_tokens(rollouts, list(range(8))) == sum(LENGTHS) + distinct


@pytest.mark.parametrize("window", [None, 6])
def test_attend_equals_attention_written_out(window):
    """float64, four query heads on two key heads, 5 queries behind 7 earlier positions."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    got = attend(query, key, value, scaling=0.3, window=window)
    for head in range(4):
        q, k, v = query[0, head].double(), key[0, head // 2].double(), value[0, head // 2].double()
        for t in range(5):
            first = 0 if window is None else max(0, 7 + t - window + 1)
            weights = (0.3 * k[first : 8 + t] @ q[t]).softmax(0)
            torch.testing.assert_close(got[0, head, t].double(), weights @ v[first : 8 + t], rtol=1e-5, atol=1e-6)


def test_a_sliding_window_model(tmp_path):
    """Positions and window count within a row, not within the micro-batch."""
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
        vocab_size=VOCAB, initializer_range=0.3, sliding_window=8,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    rollouts = make_rows([5, 30, 1, 20])
    got = scored(Policy(make_config(tmp_path), CPU), rollouts, [0, 1, 2, 3])
    for row in range(4):
        want = plain_logprobs(tmp_path, rollouts, row)
        np.testing.assert_allclose(got[row, : len(want)], want, atol=2e-5)


def test_models_that_mix_tokens_in_another_way_are_refused(tmp_path):
    """A recurrent state or a convolution would run from one row into the next."""
    recurrent = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=VOCAB))
    convolution = Lfm2ForCausalLM(
        Lfm2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            vocab_size=VOCAB,
            layer_types=["conv", "full_attention"],
        )  # fmt: skip
    )
    for kind, model in {"mamba": recurrent, "lfm2": convolution}.items():
        model.save_pretrained(tmp_path / kind)
        with pytest.raises(UserError, match=f"^model.path=.*: {kind} cannot be trained here: "):
            Policy(make_config(tmp_path / kind), CPU)


# ------------------------------------------------------------------------------------------------------ bf16 copy


def plain_bf16_gradients(folder, rollouts, advantages) -> dict[str, torch.Tensor]:
    """A bf16 model by transformers, one row a backward pass, the rows' gradients added up in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for row, advantage in enumerate(advantages):
        prompt, response = rollouts.prompt_ids[row], rollouts.response_ids[row]
        logits = model(torch.from_numpy(np.concatenate([prompt, response]))[None]).logits[0].float()
        chosen = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.from_numpy(response)[:, None])
        (-advantage * chosen.sum() / rollouts.lengths_B.sum()).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            sums[name] += p.grad
            p.grad = None
    return sums


def far(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest relative distance of two gradients, over the tensors."""
    return max(float((left[n] - right[n]).norm() / right[n].norm()) for n in right)


def test_bf16_gradients_are_as_near_to_float32_as_plain_bf16(tmp_path):
    """The masters get, in float32 and for every weight, what a plain bf16 model would give them."""
    tiny_llama().save_pretrained(tmp_path)
    rollouts = make_rows([30, 25, 40, 8])
    advantages = [1.0, -1.0, 0.5, -0.5]
    config = make_config(tmp_path, model={"dtype": "bfloat16"}, train={"grad_clip": 1e9, "microbatch_tokens": 50})
    policy = Policy(config, CPU)
    got = gradients(policy, rollouts, advantages)
    assert all(g.dtype == torch.float32 for g in got.values())
    exact = slow_gradients(tmp_path, rollouts, advantages, "token_mean", [0, 1, 2, 3])
    plain = plain_bf16_gradients(tmp_path, rollouts, advantages)
    assert 1e-4 < far(got, exact) < 1.5 * far(plain, exact) < 0.2


def test_the_bf16_copy_follows_the_masters(tied_model, tmp_path):
    """After an optimizer step, and after a checkpoint was taken up: its weights are the masters', rounded."""
    config = make_config(tied_model, model={"dtype": "bfloat16"})
    first, second = Policy(config, CPU), Policy(config, CPU)

    def rounded(policy: Policy) -> bool:
        assert policy.bf16_copy is not None
        mine = dict(policy.bf16_copy.named_parameters())
        return all(torch.equal(p.bfloat16(), mine[name]) for name, p in policy.model.named_parameters())

    assert first.bf16_copy is not None and {b.dtype for b in first.bf16_copy.buffers()} == {torch.float32}  # rotary
    start = {name: p.clone() for name, p in first.model.named_parameters()}
    update(first, make_rows([9, 4]), [1.0, -1.0])
    assert rounded(first) and not any(torch.equal(p, start[name]) for name, p in first.model.named_parameters())
    save_checkpoint(tmp_path, 1, first, {"fingerprint": {}}, 1)
    load_checkpoint(tmp_path, second, {})
    assert rounded(second)
    rollouts = make_rows([9, 4])
    score_rows(first, rollouts)
    want = [row.copy() for row in rollouts.sampler_logprobs]
    score_rows(second, rollouts)
    assert all(np.array_equal(a, b) for a, b in zip(want, rollouts.sampler_logprobs, strict=True))


def test_empty_answers_take_no_place():
    rollouts = make_rows([3, 0, 0, 4])
    micro = make_microbatch(rollouts, range(4), CPU)
    prompts = len(rollouts.prompt_ids[0]) + len(rollouts.prompt_ids[2])
    assert len(micro.ids_S) == prompts + 3 + 4 and micro.lengths_B.tolist() == [3, 0, 0, 4]
    assert micro.mask_BT.sum() == len(micro.tokens_N) == 7
