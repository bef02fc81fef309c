"""The plan of the house as README draws it: what may import what. Every import counts, also one inside a function.

Run: python -m pytest tests/docs/test_house.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nanolapo"
WINGS = {"evaluation", "explain", "report", "reproduce", "plan", "demo"}  # training runs without them


def module_of(path: Path) -> str:
    """nanolapo/model/lora.py -> nanolapo.model.lora; nanolapo/losses/__init__.py -> nanolapo.losses"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source: str, modules: Iterable[str]) -> set[str]:
    """The modules among `modules` that this source imports; of a package and its module, the module.

    >>> sorted(imports("from a.b import c, d\\nimport a", ["a", "a.b", "a.b.c"]))
    ['a', 'a.b', 'a.b.c']
    >>> imports("def f():\\n    from a.b import c", ["a.b.c"])
    {'a.b.c'}
    """
    named: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}": alias.name for alias in node.names}
            named |= set(parts)
            if not set(parts) <= set(modules):  # some name is not a module of its own
                named.add(node.module)
    return named & set(modules)


ARROWS = {name: imports(path.read_text(encoding="utf-8"), MODULES) - {name} for name, path in MODULES.items()}


def room(module: str) -> str:
    """A folder is a room, a file beside loop.py is one too: nanolapo.model.lora -> model, nanolapo.loop -> loop."""
    return (module.split(".") + [""])[1]


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """One circle of arrows, first and last name alike; an empty list where there is none.

    >>> circle({"a": {"b"}, "b": {"c"}, "c": set()}), sorted(set(circle({"a": {"b"}, "b": {"a"}})))
    ([], ['a', 'b'])
    """
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_the_arrows_are_found() -> None:
    assert {"nanolapo.update", "nanolapo.sampling"} <= ARROWS["nanolapo.loop"]
    assert len(MODULES) > 80 and sum(map(len, ARROWS.values())) > 200


def test_no_file_imports_itself_over_others() -> None:
    assert circle(ARROWS) == []


def test_no_room_imports_itself_over_others() -> None:
    rooms: dict[str, set[str]] = {}
    for name, targets in ARROWS.items():
        rooms.setdefault(room(name), set()).update(room(target) for target in targets)
    del rooms[""]  # nanolapo/__init__.py
    assert circle({name: targets - {name, ""} for name, targets in rooms.items()}) == []


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) not in WINGS])
def test_nothing_that_trains_imports_a_wing(name: str) -> None:
    assert not {target for target in ARROWS[name] if room(target) in WINGS}


def test_every_folder_is_in_the_plan() -> None:
    """README's plan names every folder of the package, so that `ls` shows nothing that the reader was not told of."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders >= WINGS
    assert [name for name in sorted(folders) if f"{name}/" not in readme] == []
