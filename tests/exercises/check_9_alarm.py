"""Exercise 9: an alarm that remembers. Run: make exercise N=9"""

from __future__ import annotations

import json

from rows import make_config

from nanolapo.alarms import Alarms

HEALTHY = {"truncated": 0.0, "no_signal": 0.2, "empty": 0.0, "repetition": 0.1, "unique_per_group": 4.0, "updates": 2.0}


def watch(alarms: Alarms, run: list[tuple[float, float]], first: int = 0) -> list[int]:
    """The steps at which these (accuracy, length) are called too short."""
    found = []
    for step, (accuracy, length) in enumerate(run, start=first):
        metrics = HEALTHY | {"accuracy": accuracy, "length": length}
        warnings = alarms.check_learning(step, metrics, ["one", "two", "three"])
        found += [step for text in warnings if "too short" in text]
    return found


def new() -> Alarms:
    return Alarms(make_config())


# Best at step 2: 0.9 with 100 tokens. Then shorter and worse by more than 0.1, steps 3 to 13.
SHRINKING = [(0.6, 150), (0.8, 120), (0.9, 100), *((0.7 - 0.02 * i, 60 - i) for i in range(11))]


def test_it_speaks_after_five_steps_and_every_five():
    got = watch(new(), SHRINKING)
    assert got, (
        'shorter answers, and 5 steps in a row more than 0.1 below the best accuracy: no warning says "too short"'
    )
    assert got == [7, 12], (
        f"steps 3 to 13 are more than 0.1 below step 2's accuracy with shorter answers: the 5th and the 10th of them, "
        f"steps 7 and 12, should warn; warned at {got}"
    )


def test_what_is_no_trouble_is_silent():
    runs = {
        "accuracy rises while answers shorten": [(0.5 + 0.03 * i, 100 - 5 * i) for i in range(15)],
        "accuracy is at most 0.1 below its best": [(0.9, 100), *[(0.85, 50)] * 15],
        "answers are worse, but longer than at the best step": [(0.9, 100), *[(0.5, 140)] * 15],
        "bad steps, but never 5 in a row": [(0.9, 100), *[*[(0.6, 50)] * 4, (0.88, 50)] * 4],
        "bad from the beginning": [(0.1, 50)] * 15,
    }
    for what, run in runs.items():
        got = watch(new(), run)
        assert not got, f"{what}: nothing to warn of, but steps {got} did"


def test_the_best_step_may_move():
    """A new best of 0.95 with 60 tokens: from then on 100 tokens are not short, whatever the old best had."""
    got = watch(new(), [(0.9, 120), (0.95, 60), *[(0.7, 100)] * 8])
    assert not got, f"since step 1 the best has 60 tokens, so answers of 100 are not too short; warned at {got}"


def test_the_step_is_compared_with_earlier_ones():
    """The best answers so far were long; a step that is best and short is not measured against itself."""
    got = watch(new(), [(0.5, 200), (0.9, 40), *[(0.7, 30)] * 5])
    assert got == [6], (
        f"best at step 1 with 40 tokens, then five worse and shorter steps: step 6 should warn, got {got}"
    )


def test_it_survives_a_resume():
    for at in (3, 5, 7):
        first = new()
        before = watch(first, SHRINKING[:at])
        saved = json.loads(json.dumps(first.state_dict()))
        second = new()
        second.load_state_dict(saved)
        got = before + watch(second, SHRINKING[at:], first=at)
        assert got == [7, 12], (
            f"a run that is resumed at step {at} should warn at 7 and 12 like one that was not; it warned at {got}: does "
            "state_dict hold everything, and does load_state_dict take it up?"
        )


def test_a_checkpoint_from_before_the_change_loads():
    old = {
        "base_mismatch": 0.01,
        "lasted": dict.fromkeys(("truncated", "flat", "empty", "looping", "copies", "dropped"), 0),
    }
    alarms = new()
    try:
        alarms.load_state_dict(old)
        got = watch(alarms, SHRINKING)
    except KeyError as error:
        raise AssertionError(f"a checkpoint written before your change cannot be resumed: it has no {error}") from None
    assert got == [7, 12], f"after such a resume the alarm should start afresh and warn at 7 and 12; it warned at {got}"


def test_the_other_alarms_are_as_they_were():
    alarms, said = new(), []
    for step in range(3):
        metrics = HEALTHY | {"accuracy": 0.0, "length": 64.0, "truncated": 1.0}
        said.append(alarms.check_learning(step, metrics, ["one"]))
    assert said[:2] == [[], []] and "100 % of the answers were cut" in " ".join(said[2]), (
        f"three steps of cut answers now say {said}"
    )
