"""Answers whose first token is given: the engine sees it as the prompt's end, everybody else as the answer's beginning.

Run: python -m pytest tests/samplers/test_first_token.py        (vLLM: the last test of test_vllm_sampler.py)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_helpers import make_requests, reference, save, tiny_model
from tiny import CPU, copied, fill, make_config, make_problems, make_rows, score_rows, update

from nanolapo.data.prompts import FirstToken, Guidance, Prompter, exact_guidance
from nanolapo.demo.pretrain import make_tokenizer
from nanolapo.methods.base import Method
from nanolapo.microbatches import make_microbatch
from nanolapo.policy import Policy
from nanolapo.ranks import Ranks
from nanolapo.rollouts import Rollouts, make_rollouts
from nanolapo.samplers.sampler import Decoding, Request, Sample, for_engine, generate_all
from nanolapo.samplers.torch_sampler import TorchSampler
from nanolapo.update import Tally, loss_inputs, old_logprobs, plan_batches, tally_mismatch

HALF = math.log(0.5)


def check_given_first_tokens(sampler, model, temperature: float = 0.7) -> None:
    """Every second answer begins with a given token. The rest of it is what the longer prompt gives, with the log-probs of
    transformers' own forward; the other answers do not change."""
    plain = make_requests(8, length=12)
    asked = [replace(r, first=FirstToken(40 + i, HALF)) if i % 2 else r for i, r in enumerate(plain)]
    told: dict[int, Sample] = {}
    samples = generate_all(sampler, asked, Decoding(temperature), lambda tokens: None, told.__setitem__)
    longer = [replace(r, prompt_ids=[*r.prompt_ids, 40 + i], max_new_tokens=11) for i, r in enumerate(plain)]
    alone = sampler.generate(plain, Decoding(temperature))
    after = sampler.generate(longer, Decoding(temperature))
    for i, (request, sample) in enumerate(zip(asked, samples, strict=True)):
        assert told[i] is sample and len(sample.ids) == len(sample.logprobs) <= 12
        assert sample.ids.dtype == np.int64 and sample.logprobs.dtype == np.float32
        assert sample.finished or len(sample.ids) == 12  # the given token counts in the limit
        scored = reference(model, request, sample, temperature)  # scores all of the answer after the plain prompt
        if request.first is None:
            assert sample.ids.tolist() == alone[i].ids.tolist()
            np.testing.assert_allclose(sample.logprobs, scored, atol=1e-3)
        else:
            assert sample.ids.tolist() == [40 + i, *after[i].ids.tolist()] and sample.finished == after[i].finished
            assert sample.logprobs[0] == np.float32(HALF) and abs(scored[0] - HALF) > 1e-3
            np.testing.assert_allclose(sample.logprobs[1:], scored[1:], atol=1e-3)


def test_the_torch_sampler_need_not_know(tmp_path):
    model = tiny_model(True)
    check_given_first_tokens(TorchSampler(save(model, tmp_path), torch.float32, CPU, max_rows=3), model)


def test_a_limit_of_one_token_leaves_nothing_to_sample():
    request = Request([1], 0, 1)
    assert for_engine(request) is request  # as ever
    with pytest.raises(ValueError, match="max_new_tokens=1: a given first token leaves nothing to sample"):
        for_engine(replace(request, first=FirstToken(5, HALF)))
    two = for_engine(replace(request, first=FirstToken(5, HALF), max_new_tokens=2))
    assert (two.prompt_ids, two.max_new_tokens, two.first) == ([1, 5], 1, None)


def test_a_row_has_the_token_in_its_answer_and_not_in_its_prompt():
    asked = [Request([1, 2], 0, 9, make_problems(1)[0], first=first) for first in (FirstToken(7, HALF), None)]
    samples = [Sample(np.array([7, 8, 9]), np.full(3, HALF, np.float32), True)] * 2
    rows = make_rollouts(asked, samples, group_size=2, vocab_size=64).rows
    assert [row.forced for row in rows] == [True, False] and not any(row.broken for row in rows)
    assert all(row.prompt_ids.tolist() == [1, 2] and row.response_ids.tolist() == [7, 8, 9] for row in rows)
    beyond = [replace(asked[0], first=FirstToken(64, HALF))] * 2
    ids = [replace(sample, ids=np.array([64, 8, 9])) for sample in samples]
    assert all(row.broken for row in make_rollouts(beyond, ids, 2, vocab_size=64).rows)


def test_the_entropy_is_that_of_drawn_tokens():
    """By hand: (2 + 3 + 5) / 3 without the given token's 0.69."""
    rollouts = make_rows([3, 1])
    fill(rollouts, sampler_logprobs=[np.array([HALF, -2.0, -3.0]), np.array([-5.0])], forced=[True, False])
    assert rollouts.mean_entropy == pytest.approx(10 / 3)
    fill(rollouts, broken=[False, True], sampler_logprobs=[np.array([HALF]), np.array([-5.0])])
    assert math.isnan(rollouts.mean_entropy)  # nothing was drawn


def given_rows(policy: Policy, lengths: Sequence[int] = (5, 3, 1, 4)) -> Rollouts:
    """Rows 0 and 2 begin with a given token; all else as an exact sampler records it."""
    rollouts = make_rows(lengths)
    score_rows(policy, rollouts)
    for row in (rollouts.rows[0], rollouts.rows[2]):
        row.forced, row.sampler_logprobs = True, np.concatenate([[np.float32(HALF)], row.sampler_logprobs[1:]])
    return rollouts


@pytest.mark.parametrize("source", ["trainer", "sampler"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_its_old_logprob_is_that_of_the_choice_wherever_the_others_come_from(tied_model, source, epochs):
    """log 0.5 for it, and the policy's own for every drawn token; so importance weights are 1 everywhere."""
    config = make_config(tied_model, loss={"old_logprobs": source}, train={"inner_epochs": epochs})
    policy = Policy(config, CPU)
    exact = make_rows([5, 3, 1, 4])
    score_rows(policy, exact)
    rollouts, advantages = given_rows(policy), torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = Method(config).loss
    batches = plan_batches(policy, loss, rollouts, advantages, np.ones(4, dtype=bool), Ranks())
    old = old_logprobs(policy, loss, rollouts, batches, Ranks())
    micro = make_microbatch(rollouts, range(4), CPU)
    x = loss_inputs(policy, rollouts, advantages, micro, old)
    for b, length in enumerate([5, 3, 1, 4]):
        want = exact.rows[b].sampler_logprobs.copy()
        if b in (0, 2):
            assert abs(want[0] - HALF) > 1e-3
            want[0] = HALF
        np.testing.assert_allclose(x.old_logprobs_BT[b, :length].detach(), want, atol=1e-5)
    weights = torch.exp(x.old_logprobs_BT - x.sampler_logprobs_BT).detach()
    np.testing.assert_allclose(weights, 1, atol=1e-5)


def test_it_is_left_out_of_the_mismatch(tied_model):
    policy = Policy(make_config(tied_model), CPU)
    rollouts, tally = given_rows(policy), Tally()
    tally_mismatch(tally, loss_inputs(policy, rollouts, torch.ones(4), make_microbatch(rollouts, range(4), CPU), None))
    assert tally.counts["mismatch"] == 5 + 3 + 1 + 4 - 2
    assert tally.sums["mismatch"] < 1e-4 and tally.maxima["mismatch_max"] < 1e-5
    logged = update(Policy(make_config(tied_model), CPU), rollouts, [1.0, -1.0, 1.0, -1.0])
    assert logged["mismatch"] < 1e-5 and logged["compared_tokens"] == 11
    told_otherwise = copied(rollouts, forced=False)  # the same numbers, taken for drawn tokens, are an alarm
    assert update(Policy(make_config(tied_model), CPU), told_otherwise, [1.0, -1.0, 1.0, -1.0])["mismatch"] > 0.02


def test_rounded_lengths_in_a_prompt_keep_the_given_token():
    """prompt.length_multiple makes another Guidance; it must lose nothing."""
    prompter = Prompter(make_tokenizer(), make_config(prompt={"length_multiple": 10}).prompt)
    first = FirstToken(7, HALF)
    printed = prompter.printed(replace(exact_guidance(63), first=first))
    assert printed.first == first and printed.budget == 63 and "60 tokens" in printed.inside
    assert Guidance().first is None
