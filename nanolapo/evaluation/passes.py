"""What an evaluation has to do: its models, each with its prompt, and its passes over the problems.

In the first pass a model answers without a stated length. The last model, or those of evaluate.instructed, then answer
again with a stated length: a multiple of the length they chose by themselves (evaluate.guidance_factors), or a fixed number
that has nothing to do with the problem (evaluate.instructions, the conflicting instruction of the paper's Table 4).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from nanolapo.checkpoint import NAME
from nanolapo.checks import Preflight
from nanolapo.config import Config, PromptConfig, UserError
from nanolapo.config_file import build, to_yaml
from nanolapo.data.load import Data, fit_prompts, gradable_problems
from nanolapo.data.prompts import NO_GUIDANCE, Guidance, Prompter, exact_guidance, outside_guidance
from nanolapo.grader import Grader
from nanolapo.model.folder import load_tokenizer
from nanolapo.preflight import before_evaluation, speed_of_dtype
from nanolapo.ranks import Ranks
from nanolapo.samplers.sampler import Decoding

PLACES = ("inside", "outside")  # of the thought


@dataclass(frozen=True)
class Model:
    """A model to evaluate. `step` and `run` are set if a run exported it before its end (run.export_every)."""

    name: str
    path: str
    prompt: PromptConfig
    run: str = ""
    step: int | None = None


@dataclass(frozen=True)
class Pass:
    """One pass over the problems. It states no length, or `factor` times the model's own length, or `tokens`."""

    name: str = ""  # what results call it
    place: str = "inside"  # in the paper's words, at the start of the thought; outside: at the end of the question
    factor: float = 0.0
    tokens: int = 0

    def guidance(self, tokens: float) -> Guidance:
        """State this length where the pass states it."""
        return (outside_guidance if self.place == "outside" else exact_guidance)(tokens)


def parse_models(config: Config) -> list[Model]:
    """Split every "name=path" of evaluate.models. Refuse settings that would sample nothing."""
    e = config.evaluate
    for key, good in {
        "temperatures": bool(e.temperatures) and min(e.temperatures) >= 0,
        "samples": e.samples >= 1,
        "max_new_tokens": e.max_new_tokens >= 1,
        "bootstrap": e.bootstrap >= 1,
        "top_p": 0 < e.top_p <= 1,
    }.items():
        if not good:
            raise UserError(
                f"evaluate.{key}={getattr(e, key)!r} cannot be used; see EvaluateConfig in nanolapo/config.py"
            )
    entries = [(name, path) for name, _, path in (entry.partition("=") for entry in e.models)]
    if not entries or not all(name and path for name, path in entries):
        raise UserError("evaluate.models: list at least one model as name=folder or name=hub/name")
    names = [name for name, _ in entries]
    if len(set(names)) < len(names):
        raise UserError("evaluate.models: two models have the same name")
    for key, given in (("prompts", [*e.prompts]), ("instructed", e.instructed)):
        for name in given:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                raise UserError(f"evaluate.{key}: no model is called {name!r}; did you mean {close!r}?")
    for text in e.instructions:
        instruction(text)
    return [model for name, path in entries for model in expand(name, path, prompt_of(config, name))]


def expand(name: str, path: str, prompt: PromptConfig) -> list[Model]:
    """The model at `path`. If the path holds folders step-NNNNNN, which a run exported, then each of them is a model."""
    steps = sorted((int(match[1]), entry) for entry in Path(path).glob("step-*") if (match := NAME.match(entry.name)))
    if not steps:
        return [Model(name, path, prompt)]
    return [Model(f"{name} step {step}", str(entry), prompt, name, step) for step, entry in steps]


def prompt_of(config: Config, name: str) -> PromptConfig:
    """The model's prompt: config.prompt, in which the model's keys of evaluate.prompts replace those given for all."""
    given, key = config.evaluate.prompts.get(name, {}), f"evaluate.prompts.{name}"
    if not isinstance(given, dict):
        raise UserError(f"{key}={given!r} must be a mapping of prompt keys to values, such as {{style: chat}}")
    return build(PromptConfig, asdict(config.prompt) | given, key)


def instruction(text: str) -> Pass:
    """An entry of evaluate.instructions.

    >>> instruction("outside:500")
    Pass(name='500 tokens, outside', place='outside', factor=0.0, tokens=500)
    """
    place, _, tokens = text.partition(":")
    if place not in PLACES or not tokens.strip().isdecimal() or int(tokens) < 1:
        raise UserError(f"evaluate.instructions: {text!r} is not inside:TOKENS or outside:TOKENS, such as outside:500")
    return Pass(f"{int(tokens)} tokens, {place}", place, tokens=int(tokens))


def passes(config: Config, model: Model, is_last: bool) -> list[Pass]:
    """The passes of this model at every temperature. The first one states no length."""
    e = config.evaluate
    told = [Pass(f"{factor:g}x own length", factor=factor) for factor in e.guidance_factors if is_last]
    named = (model.run or model.name) in e.instructed  # the name of a run stands for all of its exports
    if named or (is_last and not e.instructed):
        told += [instruction(text) for text in e.instructions]
    return [Pass(), *told]


def decoding_at(config: Config, temperature: float) -> Decoding:
    """evaluate.top_p holds below temperature 1; temperature 1 is sampled without it."""
    return Decoding(temperature, config.evaluate.top_p if temperature < 1 else 1.0)


def load_sets(config: Config, models: Sequence[Model], grader: Grader, ranks: Ranks | None = None) -> list[Data]:
    """The same problems for every tokenizer. They are read, and their reference answers checked, once for all models.
    A problem whose prompt is too long for one of them is left out for all, because their scores are compared."""
    prompters = [Prompter(load_tokenizer(m.path, f"evaluate.models: {m.name}"), m.prompt) for m in models]
    problems, report = gradable_problems(config, grader, ranks)
    loaded = [fit_prompts(config, prompter, problems, report) for prompter in prompters]
    common = set.intersection(*({p.id for p in data.problems} for data in loaded))
    if not common:
        raise UserError(
            "evaluate.models: no problem is left whose prompt is short enough for all of them; raise "
            "rollout.max_prompt_tokens, or shorten evaluate.prompts"
        )
    for data in loaded:
        if left_out := len(data.problems) - len(common):
            data.report.append(
                f"left out {left_out} problems whose prompt is too long for another model: all are asked the same"
            )
            data.problems = [p for p in data.problems if p.id in common]
            data.longest_prompt = max(len(data.prompter.ids(p.question)) for p in data.problems)
    return loaded


def preflight(config: Config, models: Sequence[Model], loaded: Sequence[Data]) -> list[Preflight]:
    """Try what the answers of each model rest on, for all of its passes."""
    checked = []
    for model, data in zip(models, loaded, strict=True):
        asked = passes(config, model, model is models[-1])
        told = [
            one.guidance(one.tokens or config.evaluate.max_new_tokens) if one.name else NO_GUIDANCE for one in asked
        ]
        checked.append(before_evaluation(config, model.path, f"evaluate.models: {model.name}", data, told))
    key, dtype = (
        ("rollout.dtype", config.rollout.dtype) if config.rollout.dtype else ("model.dtype", config.model.dtype)
    )
    checked[0].run([partial(speed_of_dtype, getattr(torch, dtype), key)])  # it is the same for all models
    return checked


def wanted_samples(config: Config, data: Data) -> list[tuple[int, int]]:
    """(problem, number of the sample) for a whole pass over the problem sets."""
    per_set = {source.name: source.samples or config.evaluate.samples for source in config.data.sources}
    return [(i, k) for i, p in enumerate(data.problems) for k in range(per_set[p.source])]


def dry_run(config: Config) -> None:
    """--dry-run: check every model's tokenizer and all data; print the config, how much to sample, and the prompts."""
    models, e = parse_models(config), config.evaluate
    with Grader() as grader:
        loaded = load_sets(config, models, grader)
        checked = preflight(config, models, loaded)
    print(to_yaml(config))
    most = 0
    for model, data in zip(models, loaded, strict=True):
        times = len(e.temperatures) * len(passes(config, model, model is models[-1]))
        answers = times * len(wanted_samples(config, data))
        most += answers * e.max_new_tokens
        print("\n".join([*data.report, f"{model.name}: {len(data.problems)} problems, {answers:,} answers"]))
    print(f"at most {most:,} sampled tokens (upper bound: every answer at the limit)")
    for model, found in zip(models, checked, strict=True):
        print("\n".join([f"{model.name}: {found.lines()[0]}", *found.lines()[1:], *found.table()]))
    shown: dict[str, str] = {}  # a prompt -> what the first model that is asked it sees
    for model, data in zip(models, loaded, strict=True):
        question = data.problems[0].question
        shown.setdefault(data.prompter.render(question), data.prompter.shown(question, NO_GUIDANCE, model.name))
    print("\n".join(shown.values()))
