"""Answers whose beginning is given: the engine sees it as the prompt's end, everybody else as a part of the answer.

Run: python -m pytest tests/samplers/test_given.py        (vLLM: the last test of test_vllm_sampler.py)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_helpers import make_requests, reference, save, tiny_model
from tiny import CPU, copied, fill, make_config, make_problems, make_rows, score_rows, update

from nanolapo.config import UserError
from nanolapo.data.prompts import GivenTokens, Guidance, Prompter, exact_guidance
from nanolapo.demo.pretrain import make_tokenizer
from nanolapo.methods.base import Method
from nanolapo.methods.hbpo import Hbpo
from nanolapo.metrics import Stopwatch
from nanolapo.microbatches import make_microbatch
from nanolapo.policy import Policy
from nanolapo.rollouts import Rollouts, make_rollouts
from nanolapo.samplers.sampler import Decoding, Request, Sample, for_engine, generate_all
from nanolapo.samplers.torch_sampler import TorchSampler
from nanolapo.sampling import sample_and_grade, sample_and_measure
from nanolapo.update import Tally, loss_inputs, old_logprobs, plan_batches, tally_mismatch

HALF = math.log(0.5)


def check_given_tokens(sampler, model, temperature: float = 0.7) -> None:
    """Every second answer begins with one to four given tokens. The rest of it is what the longer prompt gives, with the
    log-probs of transformers' own forward; the other answers do not change."""
    plain = make_requests(8, length=12)
    begun = [tuple(range(40 + i, 40 + i + (i + 1) // 2)) for i in range(8)]  # of answers 1, 3, 5, 7: 1, 2, 3, 4 tokens
    asked = [replace(r, given=GivenTokens(begun[i], HALF)) if i % 2 else r for i, r in enumerate(plain)]
    told: dict[int, Sample] = {}
    samples = generate_all(sampler, asked, Decoding(temperature), lambda tokens: None, told.__setitem__)
    pairs = zip(plain, begun, strict=True)
    longer = [replace(r, prompt_ids=[*r.prompt_ids, *ids], max_new_tokens=12 - len(ids)) for r, ids in pairs]
    alone = sampler.generate(plain, Decoding(temperature))
    after = sampler.generate(longer, Decoding(temperature))
    for i, (request, sample) in enumerate(zip(asked, samples, strict=True)):
        assert told[i] is sample and len(sample.ids) == len(sample.logprobs) <= 12
        assert sample.ids.dtype == np.int64 and sample.logprobs.dtype == np.float32
        assert sample.finished or len(sample.ids) == 12  # the given tokens count in the limit
        scored = reference(model, request, sample, temperature)  # scores all of the answer after the plain prompt
        if request.given is None:
            assert sample.ids.tolist() == alone[i].ids.tolist()
            np.testing.assert_allclose(sample.logprobs, scored, atol=1e-3)
        else:
            n = len(begun[i])
            assert sample.ids.tolist() == [*begun[i], *after[i].ids.tolist()] and sample.finished == after[i].finished
            assert (sample.logprobs[:n] == np.float32(HALF)).all() and (abs(scored[:n] - HALF) > 1e-3).all()
            np.testing.assert_allclose(sample.logprobs[n:], scored[n:], atol=1e-3)


def test_the_torch_sampler_need_not_know(tmp_path):
    model = tiny_model(True)
    check_given_tokens(TorchSampler(save(model, tmp_path), torch.float32, CPU, max_rows=3), model)


def test_a_limit_that_the_given_tokens_fill_leaves_nothing_to_sample():
    request = Request([1], 0, 3)
    assert for_engine(request) is request  # as ever
    asked = replace(request, given=GivenTokens((5, 6, 7), HALF))
    words = "rollout.max_new_tokens: a limit of 3 leaves nothing to sample after the 3 tokens with which the answer"
    with pytest.raises(UserError, match=words):
        for_engine(asked)
    four = for_engine(replace(asked, max_new_tokens=4))
    assert (four.prompt_ids, four.max_new_tokens, four.given) == ([1, 5, 6, 7], 1, None)


def test_a_row_has_the_token_in_its_answer_and_not_in_its_prompt():
    begun = (GivenTokens((7, 8), HALF), GivenTokens((7, 8), None), None)
    asked = [Request([1, 2], 0, 9, make_problems(1)[0], given=given) for given in begun]
    samples = [Sample(np.array([7, 8, 9]), np.full(3, HALF, np.float32), True)] * 3
    rows = make_rollouts(asked, samples, group_size=3).rows
    assert [(row.num_given, row.num_by_lot) for row in rows] == [(2, 2), (2, 0), (0, 0)]
    assert all(row.prompt_ids.tolist() == [1, 2] and row.response_ids.tolist() == [7, 8, 9] for row in rows)


def test_the_entropy_is_that_of_drawn_tokens():
    """By hand: (2 + 3 + 5) / 3 without the given token's 0.69."""
    rollouts = make_rows([3, 1])
    fill(
        rollouts,
        sampler_logprobs=[np.array([HALF, -2.0, -3.0]), np.array([-5.0])],
        given=[GivenTokens((1,), HALF), None],
    )
    assert rollouts.mean_entropy == pytest.approx(10 / 3)
    fill(rollouts, given=[GivenTokens((1,), None), None])  # also where no lot chose it
    assert rollouts.mean_entropy == pytest.approx(10 / 3)
    fill(rollouts, unmatched=[False, True], sampler_logprobs=[np.array([HALF]), np.array([-5.0])])
    assert math.isnan(rollouts.mean_entropy)  # nothing was drawn


def given_rows(policy: Policy, lengths: Sequence[int] = (5, 3, 1, 4)) -> Rollouts:
    """Row 0 begins with two tokens and row 2 with one that were chosen by lot, row 3 with two that nobody chose. All else
    is as an exact sampler records it."""
    rollouts = make_rows(lengths)
    score_rows(policy, rollouts)
    for b, n, logprob in ((0, 2, HALF), (2, 1, HALF), (3, 2, None)):
        row = rollouts.rows[b]
        row.given = GivenTokens(tuple(row.response_ids[:n].tolist()), logprob)
        row.sampler_logprobs = row.sampler_logprobs.copy()
        row.sampler_logprobs[:n] = logprob or 0.0
    return rollouts


@pytest.mark.parametrize("source", ["trainer", "sampler"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_old_logprob_is_that_of_the_choice_wherever_the_others_come_from(tied_model, source, epochs):
    """log 0.5 for tokens chosen by lot, and the policy's own for all others, also for given ones that nobody chose, if the
    trainer scores them; so importance weights are 1 everywhere."""
    config = make_config(tied_model, loss={"old_logprobs": source}, train={"inner_epochs": epochs})
    policy = Policy(config, CPU)
    exact = make_rows([5, 3, 1, 4])
    score_rows(policy, exact)
    rollouts, advantages = given_rows(policy), torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = Method(config).loss
    batches = plan_batches(policy, loss, rollouts, advantages)
    old = old_logprobs(policy, loss, rollouts, batches)
    micro = make_microbatch(rollouts, range(4), CPU)
    x = loss_inputs(policy, rollouts, advantages, micro, old)
    for b, length in enumerate([5, 3, 1, 4]):
        want, n = exact.rows[b].sampler_logprobs.copy(), rollouts.rows[b].num_by_lot
        assert (abs(want[:n] - HALF) > 1e-3).all()
        want[:n] = HALF
        if b == 3:
            assert rollouts.rows[b].num_given == 2 and n == 0 and (want[:2] < -1e-3).all()
            if source == "sampler":
                continue  # it has not scored them: hbpo refuses this
        np.testing.assert_allclose(x.old_logprobs_BT[b, :length].detach(), want, atol=1e-5)
    weights = torch.exp(x.old_logprobs_BT - x.sampler_logprobs_BT).detach()
    np.testing.assert_allclose(weights, 1, atol=1e-5)


def test_they_are_left_out_of_the_mismatch(tied_model):
    policy = Policy(make_config(tied_model), CPU)
    rollouts, tally = given_rows(policy), Tally()
    tally_mismatch(tally, loss_inputs(policy, rollouts, torch.ones(4), make_microbatch(rollouts, range(4), CPU), None))
    assert tally.counts["mismatch"] == 5 + 3 + 1 + 4 - 5
    assert tally.sums["mismatch"] < 1e-4 and tally.maxima["mismatch_max"] < 1e-5
    logged = update(Policy(make_config(tied_model), CPU), rollouts, [1.0, -1.0, 1.0, -1.0])
    assert logged["mismatch"] < 1e-5 and logged["compared_tokens"] == 8
    told_otherwise = copied(rollouts, given=None)  # the same numbers, taken for drawn tokens, are an alarm
    assert update(Policy(make_config(tied_model), CPU), told_otherwise, [1.0, -1.0, 1.0, -1.0])["mismatch"] > 0.02


def test_rounded_lengths_in_a_prompt_keep_the_given_tokens():
    """prompt.length_multiple makes another Guidance; it must lose nothing."""
    prompter = Prompter(make_tokenizer(), make_config(prompt={"length_multiple": 10}).prompt)
    given = GivenTokens((7,), HALF)
    printed = prompter.printed(replace(exact_guidance(63), given=given))
    assert printed.given == given and printed.budget == 63 and "60 tokens" in printed.inside
    assert Guidance().given is None


def test_words_inside_the_thought_may_belong_to_the_answer():
    """The engine reads the same ids as if they ended the prompt; only where the answer begins differs."""
    prompter = Prompter(
        make_tokenizer(), make_config(prompt={"template": "{question} <think>", "length_multiple": 10}).prompt
    )
    sentence = exact_guidance(63)
    whole, plain = prompter.ids("Start at 347.", sentence), prompter.ids("Start at 347.")
    assert prompter.ids_and_given("Start at 347.", sentence) == (whole, None)
    ids, given = prompter.ids_and_given("Start at 347.", replace(sentence, inside_is_answer=True))
    assert ids == plain and given is not None and given.logprob is None and [*ids, *given.ids] == whole
    assert make_tokenizer().decode(given.ids) == " I will answer the question with 60 tokens."


def test_hbpos_sentence_ends_the_engines_prompt_and_begins_the_answer(tied_model):
    """From the method to the row: the prompts of a group are equal, the sentence counts in the length, not as sampled."""
    prompt = {"template": "{question} <think>", "length_multiple": 1}
    rollout = {"base_tokens": 623, "group_size": 4, "prompts_per_step": 1, "max_new_tokens": 400}
    config = make_config(tied_model, prompt=prompt, rollout=rollout)
    prompter, seen, right = Prompter(make_tokenizer(), config.prompt), [], Future[bool]()
    right.set_result(True)

    def generate(requests, decoding, progress, finished):
        seen.extend(requests)
        for number in range(4):
            finished(number, Sample(np.array([9, 2]), np.full(2, -1.0, np.float32), True))

    session = SimpleNamespace(
        config=config, method=Hbpo(config), step=0, sampled_tokens=0, policy=SimpleNamespace(vocab_size=10**6),
        data=SimpleNamespace(prompter=prompter, decode=lambda ids: "text"), sampler=SimpleNamespace(generate=generate),
        grader=SimpleNamespace(submit=lambda *_: right, errors=0, total=4),
        ranks=SimpleNamespace(is_main=True, engine=lambda _: (0, 1), gather=lambda part: [part]),
    )  # fmt: skip
    rollouts = sample_and_grade(session, session.method.sampling(0), {0: make_problems(1)[0]}, Stopwatch())
    plain = prompter.ids(make_problems(1)[0].question)
    for row, asked, budget in zip(rollouts.rows, seen, session.method.budgets, strict=True):
        given = asked.prompt_ids[len(plain) :]
        assert row.prompt_ids.tolist() == plain == asked.prompt_ids[: len(plain)] and row.budget == budget
        assert make_tokenizer().decode(given) == f" I will answer the question within {budget} tokens."
        assert row.response_ids.tolist() == [*given, 9, 2] and row.num_given == len(given) > 5 and row.num_by_lot == 0
        assert asked.max_new_tokens == 400 - len(given)
    assert session.sampled_tokens == 4 * 2
    measured = sample_and_measure(session, session.method.sampling(0), {0: make_problems(1)[0]}, Stopwatch())
    assert measured.lengths_B.tolist() == rollouts.lengths_B.tolist() and session.sampled_tokens == 4 * 4


def test_kl_cov_chooses_among_drawn_tokens():
    """Rows of A = 1 and -1, all log-probs -1 but one of -9 and the given ones, whose record of 0 would be the highest."""
    loss = Method(make_config(loss={"kind": "kl_cov", "options": {"share": 0.2}})).loss
    rollouts = fill(make_rows([3, 3]), sampler_logprobs=[np.array([0.0, -1.0, -1.0]), np.array([-1.0, -9.0, -1.0])])
    rollouts.rows[0].given = GivenTokens((7,), None)
    loss.prepare(rollouts, torch.tensor([1.0, -1.0]))
    assert loss.chosen_BT.tolist() == [[False, False, False], [False, True, False]]
    rollouts.rows[1].given = GivenTokens((7, 8), None)
    loss.prepare(rollouts, torch.tensor([1.0, -1.0]))
    assert not loss.chosen_BT[:, 0].any() and not loss.chosen_BT[1, 1]
