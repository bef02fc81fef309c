"""Reads YAML into frozen dataclasses, strictly: an unknown or repeated key or a wrong value ends the program with one line.

A config file may name a parent (`extends: base.yaml`, relative to itself); its own keys win. `${section.key}` in a string
stands for that key's value. On the command line `section.key=value` overrides one value and `method=FILE.yaml` lays a
whole file over the config, which is how a rival method is chosen. Nothing is filled in silently later: a run's
`config.yaml` says what it used.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from nanolapo.config import Config, UserError

REFERENCE = re.compile(r"\$\{(\w+)\.(\w+)\}")
OCTAL_OR_BASE_60 = re.compile(r"[-+]?0[0-7_]+|[-+]?[\d_]+:.*")  # among the texts that YAML 1.1 takes for numbers
T = TypeVar("T")


class Loader(yaml.SafeLoader):
    """YAML that loses nothing: it refuses a key that is given twice, and 010 and 1:30 stay text instead of 8 and 90."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose the keys as they are written, before merge keys (<<) add those that they may override."""
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            line, given = key.start_mark.line + 1, (key.tag, str(key.value))
            if given in seen and key.tag != "tag:yaml.org,2002:merge":
                first = f"line {seen[given]} has it already"
                raise UserError(
                    f"{self.name}, line {line}: key {key.value!r} is given twice; {first}: keep one of the two"
                )
            seen[given] = line
        return node

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        tag: str = super().resolve(kind, value, implicit)
        number = tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        return "tag:yaml.org,2002:str" if number and OCTAL_OR_BASE_60.fullmatch(value) else tag

    def construct_document(self, node: yaml.Node) -> Any:
        self.deep_construct = True  # so that an alias inside its own anchor is found
        return super().construct_document(node)


def parse(text: str, source: str) -> Any:
    """Read one YAML document. Raises UserError, whose line begins with `source`."""
    try:
        loader = Loader(text)
        loader.name = source
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date like 2025-13-01
        raise UserError(f"{source}: not plain YAML ({' '.join(str(error).split())})") from None


def build(cls: type[T], values: Any, where: str) -> T:
    """Turn a plain mapping into the dataclass `cls`; `where` is the key path for messages, '' at the top.

    >>> build(Config, {"run": {"seed": 3}}, "").run.seed
    3
    >>> build(Config, {"run": {"sede": 3}}, "")
    Traceback (most recent call last):
    nanolapo.config.UserError: unknown key run.sede; did you mean run.seed?
    """
    if not isinstance(values, dict):
        raise UserError(f"{where or 'the config'} must be a mapping of keys to values, not {values!r}")
    hints = typing.get_type_hints(cls, include_extras=True)
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"{where} takes no keys here"
            if "options" in hints:
                hint += f" Settings of a single {where} belong in {prefix}options"
            raise UserError(f"unknown key {prefix}{key}; {hint}")
    given = {key: convert(value, hints[key], prefix + key) for key, value in values.items()}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in given:
            raise UserError(f"{prefix}{f.name} is missing: give it in the YAML file")
    return cls(**given)


def convert(value: Any, hint: Any, key: str) -> Any:
    """Check one YAML value against its annotation. YAML 1.1 reads 1e-6 as text; a float key accepts it."""
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, key)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return value if type(value) in args[1:] else convert(value, args[0], key)
    if origin is Annotated:
        value, must = convert(value, args[0], key), args[1]
        if must.hold(value):
            return value
        raise UserError(f"{key}={value} {must.words}")
    if origin is Literal:
        return one_of(value, args, key)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        if args[1] is not Ellipsis and len(items) != 2:
            raise UserError(f"{key}={value!r}: give exactly two numbers")
        return tuple(convert(item, args[0], f"{key}[{i}]") for i, item in enumerate(items))
    if origin is dict and isinstance(value, dict):
        return dict(value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
        raise UserError(f"{key}={value!r} must be a finite number")
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise UserError(f"{key}={value!r} is a {type(value).__name__}; it must be of type {name}")


def one_of(value: T, choices: Collection[str], key: str) -> T:
    """The value, if it is a choice. Raises UserError naming the nearest one."""
    if value in choices:
        return value
    close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
    raise UserError(f"{key}={value!r} is not one of {', '.join(map(repr, choices))}; did you mean {close!r}?")


def read_yaml(path: Path, depth: int = 0) -> dict[str, Any]:
    """Read one YAML file and its `extends` chain: the parent's keys, overlaid by this file's."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: no such config file ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not plain YAML, whose bytes are UTF-8 ({error})") from None
    values = parse(text, str(path)) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: a config file holds sections of keys and values")
    parent = values.pop("extends", None)
    if not parent:
        return values
    if not isinstance(parent, str) or depth == 10:
        raise UserError(f"{path}: extends={parent!r} must name one YAML file, and no file may extend itself")
    return overlay(read_yaml(path.parent / parent, depth + 1), values)


def overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings; `above` wins.

    >>> overlay({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
    {'a': {'x': 1, 'y': 3}}
    """
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = overlay(merged[key], value) if both else value
    return merged


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, lay the command line over it, and return the checked Config. Raises UserError."""
    values = read_yaml(Path(path))
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"override {override!r}: write it as section.key=value")
        if key == "method":
            values = overlay(values, read_yaml(Path(text)))
            continue
        nested = parse(text, f"override {override!r}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        values = overlay(values, nested)
    config = build(Config, fill_references(values, values), "")
    validate(config)
    return config


def validate(config: Config, world_size: int = 0) -> None:
    """Check every value as if it came from a file (the config may be made in Python), then those that must fit together.

    world_size: the number of ranks; 0 while a file is read, when it is not known yet.
    """
    build(Config, dataclasses.asdict(config), "")
    r = config.rollout
    if r.top_p != 1.0:
        raise UserError(
            f"rollout.top_p={r.top_p}: the trainer's ratios use the full vocabulary, so samples cut by top-p would be "
            "weighted wrongly; set rollout.top_p=1.0 (evaluate.top_p may be lower)"
        )
    if r.tensor_parallel > 1 and r.engine != "vllm":
        raise UserError("rollout.tensor_parallel needs rollout.engine=vllm; the torch sampler keeps whole copies")
    if world_size % r.tensor_parallel:
        raise UserError(f"rollout.tensor_parallel={r.tensor_parallel} does not divide the {world_size} ranks")
    engines = max(1, world_size // r.tensor_parallel)
    if r.prompts_per_step % engines:
        raise UserError(
            f"rollout.prompts_per_step={r.prompts_per_step} does not divide over {engines} samplers; each owns whole "
            f"groups, so use a multiple of {engines}"
        )
    batch = config.train.batch_size or config.rollouts_per_step
    if batch < 0 or batch % r.group_size or config.rollouts_per_step % batch:
        raise UserError(
            f"train.batch_size={batch} must be a multiple of rollout.group_size={r.group_size} and divide the "
            f"{config.rollouts_per_step} rollouts of a step (rollout.prompts_per_step x rollout.group_size)"
        )
    loss = config.loss
    if loss.tis_cap and loss.old_logprobs == "sampler":
        raise UserError(
            f"loss.tis_cap={loss.tis_cap}: it caps p_old / p_sampler, which is always 1 under loss.old_logprobs="
            "sampler; set loss.old_logprobs=trainer, or loss.tis_cap=0"
        )
    if loss.sequence_mask and loss.old_logprobs == "sampler":
        raise UserError(
            f"loss.sequence_mask={list(loss.sequence_mask)}: it multiplies p_old / p_sampler, which is always 1 under "
            "loss.old_logprobs=sampler; set loss.old_logprobs=trainer, or loss.sequence_mask=null"
        )
    if loss.sequence_mask and loss.tis_cap:
        raise UserError(
            f"loss.sequence_mask={list(loss.sequence_mask)}, loss.tis_cap={loss.tis_cap}: both correct for the same "
            "difference between sampler and trainer; set loss.tis_cap=0, or loss.sequence_mask=null"
        )
    if not 0 <= config.lapo.percentiles[0] <= config.lapo.percentiles[1] <= 100:
        raise UserError(f"lapo.percentiles={list(config.lapo.percentiles)}: need 0 <= low <= high <= 100")


def fill_references(value: Any, values: dict[str, Any], within: tuple[str, ...] = ()) -> Any:
    """Replace ${section.key} in every string by that key's value, so that a path can contain the seed.

    >>> fill_references({"dir": "runs/seed${run.seed}"}, {"run": {"seed": 3}})
    {'dir': 'runs/seed3'}
    """
    if isinstance(value, dict):
        return {key: fill_references(item, values, within) for key, item in value.items()}
    if isinstance(value, list):
        return [fill_references(item, values, within) for item in value]
    return REFERENCE.sub(lambda match: reference(match, values, within), value) if isinstance(value, str) else value


def reference(match: re.Match[str], values: dict[str, Any], within: tuple[str, ...]) -> str:
    section, key = match.group(1), match.group(2)
    given = values.get(section)
    if match.group(0) in within:
        raise UserError(f"{match.group(0)} refers to itself; write its value out")
    if isinstance(given, dict) and key in given:
        return str(fill_references(given[key], values, (*within, match.group(0))))
    default = getattr(getattr(Config(), section, None), key, None)
    if default is None:
        raise UserError(f"{match.group(0)}: there is no such config key, or it has no value; write the value out")
    return str(default)


def to_yaml(config: Config) -> str:
    """Return the resolved config, keys in alphabetical order, as YAML that load_config reads back to an equal Config."""
    return yaml.safe_dump(dataclasses.asdict(config), allow_unicode=True, width=110)
