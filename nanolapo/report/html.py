"""Writes one self-contained report.html from run and evaluation directories: tables, plots, M(q), every logged rollout.

    python -m nanolapo.report.html RUN_DIR [RUN_DIR ...] --out report.html

The page opens from disk, without a server and without a network. Everything from a run enters it as JSON in which `<`, `>`
and `&` are escaped, and page.html shows it as text only. So HTML in an answer is shown and never run. Only the plots are
markup; they are made from numbers and escaped names.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from nanolapo import cli
from nanolapo.config import UserError
from nanolapo.explain.page import visible
from nanolapo.report.content import content
from nanolapo.report.files import Json
from nanolapo.report.plots import Panel, evaluation, lengths, training
from nanolapo.report.runs import Evaluation, Material, known_levels, read_all, targets_by_level, visits

PANELS: tuple[Panel, ...] = (
    ("reward", ("reward",), False),
    ("accuracy", ("accuracy",), False),
    ("length, tokens (dashed: P90)", ("length", "length_p90"), False),
    ("entropy per token", ("entropy",), False),
    ("mismatch", ("mismatch",), True),
    ("share cut at the limit", ("truncated",), False),
)
MAP_PANELS: tuple[Panel, ...] = (
    ("mean M(q) of visited problems (tokens)", ("map/target_mean",), False),
    ("share of them solved", ("map/solved_fraction",), False),
    ("mean change of M(q) at a visit (tokens)", ("map/moved_mean",), False),
)


def embed(value: Any) -> str:
    """JSON that can stand inside a script element: pure ASCII, and nothing in it opens or closes a tag.

    >>> embed("</script>&\\u2028")
    '"\\\\u003c/script\\\\u003e\\\\u0026\\\\u2028"'
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII: also a lone surrogate is kept as it is
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def page(material: Material, data: Json, blocks: list[list[str]]) -> str:
    """report.html as text, from what was read and what content.content made of it."""
    template = files("nanolapo.report").joinpath("page.html").read_text(encoding="utf-8")
    [script] = re.findall(r"<script>(.*?)</script>", template, flags=re.DOTALL)
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    values = {
        "script_hash": f"sha256-{digest}",
        "training": figures(training(material.runs, PANELS)),
        "maps": figures(training(material.runs, MAP_PANELS) + map_figures(material)),
        "evaluations": "".join(evaluation_figures(material.evaluations)),
        "data": f'<script type="application/json" id="data">{embed(data)}</script>',
        "texts": "\n".join(
            f'<script type="application/json" class="texts">{embed(block)}</script>' for block in blocks
        ),
    }
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
    return text.encode("ascii", "xmlcharrefreplace").decode()  # of what is not ASCII, only the plots' text is left


def figures(pictures: Sequence[str]) -> str:
    return "\n".join(f"<figure>{picture}</figure>" for picture in pictures)


def map_figures(material: Material) -> list[str]:
    """One figure for each run that keeps a length map."""
    levels = known_levels(material)
    found = []
    for run in material.runs:
        if run.length_map is not None or any("map/target_mean" in line for line in run.metrics):
            targets = targets_by_level(run.length_map, levels) if run.length_map else {}
            found.append(lengths(run.name, visits(run), targets))
    return found


def evaluation_figures(evaluations: Sequence[Evaluation]) -> list[str]:
    """One figure for each table, with the numbers of evaluation and table in its id: the page puts it there."""
    found = []
    for i, e in enumerate(evaluations):
        rows = e.results["rows"] if e.results else []
        for k, (name, temperature) in enumerate(dict.fromkeys((r["set"], r["temperature"]) for r in rows)):
            same = [r for r in rows if (r["set"], r["temperature"]) == (name, temperature)]
            found.append(f'<figure id="plot-{i}-{k}">{evaluation(same)}</figure>\n')
    return found


def write_report(folders: Sequence[Path], out: Path, max_rows: int = 20_000) -> tuple[Material, list[str]]:
    """Write the page; returns what was read, and what of it could not be shown. Raises UserError."""
    material = read_all(folders)
    data, blocks = content(material, max_rows)
    text = page(material, data, blocks)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="ascii", newline="\n")
    return material, data["notes"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nanolapo.report.html", description=__doc__.split("\n")[0])
    parser.add_argument("folders", metavar="RUN_DIR", nargs="+", type=Path, help="of training runs and of evaluate.py")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--max-rows", type=int, default=20_000, help="rollouts, and samples, in the page (20000)")
    arguments = parser.parse_args()
    if arguments.out.is_dir():
        raise UserError(f"--out {arguments.out}: a directory; name a file, such as {arguments.out / 'report.html'}")
    if arguments.max_rows < 1:
        raise UserError(f"--max-rows {arguments.max_rows}: give 1 or more")
    material, notes = write_report(arguments.folders, arguments.out, arguments.max_rows)
    for note in notes:
        print(visible(note))
    told = [
        f"{len(x)} {word}{'s' * (len(x) != 1)}"
        for x, word in ((material.runs, "run"), (material.evaluations, "evaluation"))
    ]
    print(f"wrote {arguments.out}: {' and '.join(told)}, {arguments.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main)
