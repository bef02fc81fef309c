"""SAS: where steps begin and end, which of them keep their advantage, and the released code's slip.

Run: python -m pytest tests/methods/test_sas.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import fill, make_config, make_rows

from nanolapo.demo.pretrain import make_tokenizer
from nanolapo.methods.sas import Sas, kept_steps, split_steps

PIECES = ["A", " b", ".\n\n", "C", "\n\n", "D", " e", "</think>", " 7", "\n\n"]


def ranges(pieces: list[str], separator: str = "\n\n") -> list[tuple[int, int]]:
    return [(s.start, s.stop) for s in split_steps(pieces, separator)]


def test_steps_of_a_thought():
    assert ranges(PIECES) == [(0, 3), (3, 5), (5, 7)]
    assert ranges(PIECES[:7]) == [(0, 3), (3, 5), (5, 7)]  # no </think>: the whole answer is the thought
    assert ranges(["a", "b"]) == [(0, 2)]  # no blank line: one step
    assert ranges(["a", "\n\n", "</think>", "b"]) == [(0, 2)]  # nothing after the last blank line: no empty step
    assert ranges(["\n\n", "\n\n"]) == [(0, 1), (1, 2)]
    assert ranges(["a", "\n", "\n", "b"]) == [(0, 4)]  # a blank line made of two tokens is in neither token's text
    assert ranges(["a", "\n\n", "b", "[/THINK]", "c", "\n\n"]) == [(0, 2), (2, 3)]  # another tag ends a thought too
    assert ranges(["</think>", "a"]) == [] and ranges([]) == []
    assert ranges(["a", ";", "b"], separator=";") == [(0, 2), (2, 3)]


def test_the_tag_may_be_spelled_with_several_tokens():
    assert ranges(["a", "\n\n", "b", "</", "think", ">", "c", "\n\n", "d"]) == [(0, 2), (2, 3)]


def slow_kept(confidences: list[float], correct: bool, tenths: int) -> list[bool]:
    """The paper's rule with whole numbers: r = tenths / 10, ranks by (confidence, position)."""
    n = len(confidences)
    ranks = {step: rank for rank, (_, step) in enumerate(sorted((c, i) for i, c in enumerate(confidences)))}
    if correct:
        return [ranks[i] >= -(-tenths * n // 10) for i in range(n)]
    return [ranks[i] < -(-(10 - tenths) * n // 10) for i in range(n)]


@pytest.mark.parametrize("correct", [True, False])
def test_kept_steps_follow_the_rule_for_every_count(correct):
    rng = np.random.default_rng(0)
    for n in range(1, 61):
        confidences = -rng.integers(1, 1 + n, n).astype(float)  # with ties
        for tenths in (1, 3, 7, 9):
            got = kept_steps(confidences, correct, tenths / 10).tolist()
            assert got == slow_kept(confidences.tolist(), correct, tenths), (n, tenths)


def test_published_setting_on_ten_steps():
    confidences = np.arange(10.0)  # step 0 least confident
    assert kept_steps(confidences, True).tolist() == [False] * 3 + [True] * 7
    assert kept_steps(confidences, False).tolist() == [True] * 7 + [False] * 3


def sas(**options: object) -> tuple[Sas, dict[int, str]]:
    """A method whose vocabulary is PIECES: token i + 1 is the i-th."""
    method = Sas(make_config(method={"options": options}))
    method.texts = {i + 1: piece for i, piece in enumerate(PIECES)}
    return method, method.texts


def worked_example(method: Sas) -> torch.Tensor:
    """Two answers over all PIECES, right and wrong: confidences -1 (tokens 0-2), -3 (3-4), -2 (5-6)."""
    rollouts = make_rows([10, 10], correct=[True, False])
    fill(rollouts, response_ids=[np.arange(1, 11)] * 2)
    confidences = np.array([-1.5, -1.0, -0.5, -2.0, -4.0, -2.0, -2.0, -9, -9, -9], dtype=np.float32)
    fill(rollouts, sampler_logprobs=[confidences] * 2)
    return method.advantage(rollouts, torch.tensor([[1.0, 0.0]], dtype=torch.float64))


def test_advantage_per_token():
    """n = 3: the right answer loses its ceil(0.9) = 1 least confident step, the wrong one keeps ceil(2.1) = 3: all.
    At r = 0.5: it loses 2, the wrong one keeps 2, so the most confident step goes."""
    r = 0.5**0.5
    got = worked_example(sas()[0])
    np.testing.assert_allclose(got[0], [r, r, r, 0, 0, r, r, r, r, r])
    np.testing.assert_allclose(got[1], [-r] * 10)
    got = worked_example(sas(share=0.5)[0])
    np.testing.assert_allclose(got[0], [r, r, r, 0, 0, 0, 0, r, r, r])
    np.testing.assert_allclose(got[1], [0, 0, 0, -r, -r, -r, -r, -r, -r, -r])


def test_rows_of_different_length_and_without_signal():
    method = sas()[0]
    rollouts = make_rows([1, 6, 3, 4], correct=[True, False, True, True])
    fill(
        rollouts,
        response_ids=[np.array([1]), np.array([1, 2, 3, 4, 5, 6]), np.array([1, 2, 3]), np.array([8, 9, 1, 2])],
    )
    got = method.advantage(rollouts, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert got.shape == (4, 6) and torch.isfinite(got).all()
    assert got[0, 0] == 0 and (got[2:] == 0).all()  # a right answer of one step loses it


def test_padding_has_no_advantage():
    """A right answer of one step loses it all, so its row has no signal, however long another one is."""
    method = Sas(make_config())
    method.texts = dict.fromkeys(range(64), "a")
    rollouts = make_rows([3, 6], correct=[True, False])
    got = method.advantage(rollouts, torch.tensor([[1.0, 0.0]]))
    assert (got != 0).tolist() == [[False] * 6, [True] * 6]
    rollouts = make_rows([3, 6], correct=[False, True])
    assert (method.advantage(rollouts, torch.tensor([[0.0, 1.0]])) != 0).tolist() == [
        [True] * 3 + [False] * 3,
        [False] * 6,
    ]


def test_pieces_come_from_the_models_tokenizer(tmp_path: Path):
    """The demo's words: steps end at full stops. The pieces put together are the decoded answer."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    method = Sas(make_config(tmp_path, method={"options": {"separator": "."}}))
    method.start([])
    text = " Quick. A: 3+2=6 4+8=3. B: 6+0=6 3+1=4. </think> \\boxed{648} <end>"
    ids = tokenizer(text)["input_ids"]
    pieces = [method.piece(token) for token in ids]
    assert "".join(pieces) == text
    steps = ["".join(pieces[s]) for s in split_steps(pieces, ".")]
    assert steps == [" Quick.", " A: 3+2=6 4+8=3.", " B: 6+0=6 3+1=4."]
