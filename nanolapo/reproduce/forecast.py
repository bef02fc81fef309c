"""Prints what a recipe will cost, step by step, before it runs: tokens, hours, memory and disk (plan/cost.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nanolapo.config import Config
from nanolapo.config_file import load_config
from nanolapo.evaluation.passes import Model, passes
from nanolapo.plan.cost import forecast, sampling_seconds
from nanolapo.plan.footprint import LONGEST, PROMPT_TOKENS, Expected
from nanolapo.plan.machines import Machine, UnknownShape, load_shape, parse_machine
from nanolapo.report.tables import table
from nanolapo.reproduce.paper import paper_tables
from nanolapo.reproduce.pipeline import Pipeline
from nanolapo.reproduce.recipe import Recipe

# Problems of the hub's sets.
SET_SIZES = {"MATH-500": 500, "AIME24": 30, "AMC23": 40, "OlympiadBench": 675, "GPQA": 198}
EVALUATIONS = (
    "evaluations: every model at the base's length of the paper; samples that evaluations share are counted in each, "
    "a run's exported models as one"
)
HEAD = ["step", "tokens (M)", "hours", "GPU-hours", "GB a GPU", "disk GB"]
Costs = tuple[float, float, float, float, str]  # tokens, hours, peak GB of a rank, GB on disk, a note


def print_forecast(recipe: Recipe, pipeline: Pipeline, names: Sequence[str], seed: int, machine: str) -> None:
    """Print the cost of all steps in `names`, whose models all have the shape of this seed's base. Raises UserError.

    machine: as for plan/cost.py; empty means this machine's CPU.
    """
    base = recipe.base_model(seed)
    body, total = [], [0.0, 0.0, 0.0, 0.0]
    notes: dict[str, None] = {}
    gpus = parse_machine(machine or "cpu", Config())
    for name in names:
        step = pipeline.steps[name]
        cost = step_cost(step.command[len(recipe.launcher) :], base, recipe.file.paper_base, machine)
        if cost is None:
            body.append([name, *["-"] * 5])
            continue
        tokens, hours, memory, disk, note = cost
        notes[note] = None
        for i, value in enumerate((tokens, hours, hours * gpus.count, disk)):
            total[i] += value
        body.append([name, f"{tokens / 1e6:,.1f}", f"{hours:,.2f}", f"{hours * gpus.count:,.1f}", f"{memory:.0f}",
                     f"{disk:.1f}"])  # fmt: skip
    body.append(["all", f"{total[0] / 1e6:,.1f}", f"{total[1]:,.1f}", f"{total[2]:,.0f}", "", f"{total[3]:,.0f}"])
    print(f"{gpus.name}\n\n{table(HEAD, body)}\n")
    for note in filter(None, notes):
        print(note)
    if not notes:
        print(f"-: the costs depend on the shape of the base model, and {base} is not there yet; --step base makes it")


def step_cost(command: Sequence[str], base: str, paper_base: str, machine: str) -> Costs | None:
    """The cost of a step, or None for one that makes the base model or whose model has no shape yet.

    command: script, config file, overrides.
    """
    script = command[0].rsplit("/", 1)[-1] if command else ""  # a base's has no launcher, which was cut off
    if script not in ("train_stage1.py", "train_stage2.py", "evaluate.py"):
        return None
    config = load_config(command[1], list(command[2:]))
    config = replace(config, model=replace(config.model, path=base))
    there = parse_machine(machine or "cpu", config)
    try:
        if script == "evaluate.py":
            return evaluation_cost(config, there, paper_base)
        found = forecast(config, there)
    except UnknownShape:
        return None
    tokens = found.tokens_per_step * found.steps
    memory = max(sum(parts.values()) for parts in found.memory_gb.values())
    note = f"{found.expected.source}; {found.machine.source}" + (f"; {found.note}" if found.note else "")
    return tokens, found.hours, memory, sum(found.disk_gb.values()), note


def evaluation_cost(config: Config, machine: Machine, paper_base: str) -> Costs:
    """The cost of all models on all sets, if each answers at the base's length. An upper bound for models that think less.

    The length is that of the paper's Table 1 (Table 7 for GPQA) if the set is there, else half the limit.
    """
    e, tokens, rows = config.evaluate, 0.0, 0.0
    entries = [entry.partition("=")[0] for entry in e.models]
    asked = sum(
        len(passes(config, Model(name, "", config.prompt), name == entries[-1])) for name in entries
    ) * len(e.temperatures)  # fmt: skip
    for source in config.data.sources:
        answers = asked * (source.samples or e.samples) * (source.count or SET_SIZES.get(source.name, 0))
        rows += answers
        tokens += answers * set_tokens(source.name, paper_base, e.max_new_tokens)
    if not rows:
        return 0.0, 0.0, 0.0, 0.0, "evaluations of sets of unknown size are not counted"
    mean, prompt = tokens / rows, float(PROMPT_TOKENS)
    expected = Expected(mean, prompt, min(e.max_new_tokens, LONGEST * mean), rows, 0.0, "")
    shape = load_shape(config.model.path)
    hours = sampling_seconds(config, shape, machine, expected) / 3600
    memory = config.rollout.gpu_memory_utilization * machine.memory / 1e9
    return tokens, hours, memory, 4 * tokens / 1e9, EVALUATIONS


def set_tokens(name: str, paper_base: str, limit: int) -> float:
    """Mean tokens of the paper's base model on a set, or half the limit if the paper has no such set.

    >>> set_tokens("AIME24", "B", 32768), set_tokens("GPQA", "A", 32768), set_tokens("demo", "B", 256)
    (9246.0, 10297.0, 128.0)
    """
    for number in (1, 7):
        scores = paper_tables()[number].row(paper_base, "Base").scores
        if name in scores:
            return scores[name].tokens
    return limit / 2
