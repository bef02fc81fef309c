"""Draws the random kills: seeded, spread over the topics below, each at a moment that an unbroken run really passes."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from one_run import EVALUATE, EVALUATE_2, TRAIN, TRAIN_2, TRAIN_FSDP2, Setup

Moments = list[tuple[str, str]]  # (phase, label) of one rank, in order, as killer.py wrote them down

TOPICS = (
    "sampling", "checkpoint files", "grading", "evaluation", "update", "checkpoint commit", "sync", "final model", "log",
    "checkpoint pruning", "resume", "evaluation files",
)  # fmt: skip
VICTIMS = ("rank0", "rank1", "launcher", "launcher,rank0", "launcher,rank0,rank1")  # with two ranks


@dataclass(frozen=True)
class Kill:
    """One shot: at the nth moment of a phase as `rank` counts them; at whom, how long after, what a file keeps."""

    phase: str
    nth: int
    label: str
    rank: int = 0
    victims: str = "rank0"
    delay: float = 0.0
    cut: float = 0.0

    def arguments(self) -> tuple[str, ...]:
        """For killer.py."""
        return (
            "--phase", self.phase, "--nth", str(self.nth), "--rank", str(self.rank), "--victims", self.victims,
            "--delay", f"{self.delay:.4f}", "--cut", f"{self.cut:.3f}",
        )  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """The kills that one run must survive: one, or two when the run that resumes is shot as well."""

    topic: str
    setup: Setup
    kills: tuple[Kill, ...]


def topic_of(phase: str, label: str) -> str:
    if phase == "checkpoint":
        if label.startswith(("unlink", "rmdir")) or re.fullmatch(r"rename checkpoints/step-\d+", label):
            return "checkpoint pruning"
        return "checkpoint files" if label.startswith(("open", "write", "mkdir")) else "checkpoint commit"
    if phase == "evaluation":
        return "evaluation" if label.startswith("during") else "evaluation files"
    return "resume" if phase == "start" else phase


def kind_of(label: str) -> str:
    """The label without what only tells one occurrence from another.

    >>> kind_of("rename checkpoints/step-000004.tmp"), kind_of("take model.norm.weight"), kind_of("write a--T1.jsonl")
    ('rename checkpoints/step-N.tmp', 'take', 'write N')
    """
    return re.sub(r"\S+--\S+|\d{6}", "N", re.sub("^take .*", "take", label))


def draw(
    count: int, seed: int, unbroken: Callable[[Setup], list[Moments]], resumed: Callable[[], Moments]
) -> list[Fault]:
    """`count` faults. unbroken(setup) has one list for each rank; resumed() is that of rank 0 of a run that resumes.

    Topics take turns, and with every turn another setup. Within a topic no kind of moment comes a second time before all
    have come once.
    """
    rng = random.Random(seed)
    used: dict[str, set[str]] = defaultdict(set)
    faults = []
    for i in range(count):
        turn, place = divmod(i, len(TOPICS))
        topic = TOPICS[place]
        setups = (EVALUATE, EVALUATE_2) if topic.startswith("evaluation") else (TRAIN, TRAIN_2, TRAIN, TRAIN_FSDP2)
        setup = setups[(turn + place) % len(setups)]
        victims = rng.choice(VICTIMS) if setup.ranks == 2 else "rank0"
        of_ranks = [resumed()] if topic == "resume" else unbroken(setup)
        rank = 1 if victims == "rank1" and len(of_ranks) > 1 and any_of(of_ranks[1], topic) else 0
        kills = (pick(of_ranks[rank], topic, used[topic], rng, rank, victims),)
        if topic == "resume":  # the run that resumes is the second one; the first ends after its first checkpoint
            first = Kill("update", rng.randint(3, 6), "during update", delay=rng.uniform(0, 0.02))
            kills = (first, *kills)
        faults.append(Fault(topic, setup, kills))
    return faults


def only(moments: Moments, phase: str) -> Moments:
    return [moment for moment in moments if moment[0] == phase]


def any_of(moments: Moments, topic: str) -> bool:
    return any(topic_of(*moment) == topic for moment in moments)


def pick(moments: Moments, topic: str, used: set[str], rng: random.Random, rank: int, victims: str) -> Kill:
    choices = [(phase, label) for phase, label in dict.fromkeys(moments) if topic_of(phase, label) == topic]
    kinds = sorted({kind_of(label) for _, label in choices})
    fresh = [kind for kind in kinds if kind not in used]
    if not fresh:
        used.clear()
        fresh = kinds
    kind = rng.choice(fresh)
    used.add(kind)
    phase = choices[0][0]
    places = [n for n, (_, label) in enumerate(only(moments, phase), 1) if kind_of(label) == kind]
    nth = rng.choice(places)
    label = only(moments, phase)[nth - 1][1]
    delay = rng.uniform(0.001, 0.05) if label.startswith("during") else 0.0
    return Kill(phase, nth, label, rank, victims, delay, cut=rng.random())
