"""Prints the story of a step as console text and as one HTML page, with the same cells and sentences in the same order.

The page opens from disk, without a network and without a script. Text from a model or a data set is escaped, and control
characters, which would move a terminal's cursor, are written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0; border-top: 1px solid #ddd; padding-top: 1rem; }
.where { color: #777; margin: 0 0 .6rem; font-size: .85rem; }
p { margin: .4rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; white-space: pre; vertical-align: top; border-bottom: 1px solid #eee; }
th { font-weight: 600; color: #555; }
.text { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; }
/* A column of words is never narrower than its name, that of whole answers not than a phone. */
th.text { white-space: pre; overflow-wrap: normal; }
td.text:last-child { min-width: 20rem; }
"""
CONSOLE_WIDTH = 116


@dataclass(frozen=True)
class Table:
    """A table whose cells are text. The columns named in `words` are left-aligned."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """One thing that happens in the step. `where` names the code that does it; `body` holds sentences and tables."""

    title: str
    where: str
    body: Sequence[str | Table]


def visible(text: str) -> str:
    """Control characters written out, so that a model's answer cannot move a terminal's cursor or hide.

    >>> visible("a\\x1b[2Jb\\nc")
    'a\\\\x1b[2Jb\\\\nc'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def console(sections: Sequence[Section]) -> str:
    """The sections as plain text, with tables in columns."""
    lines = []
    for number, section in enumerate(sections, start=1):
        lines += ["", f"{number}. {section.title}", f"   [{section.where}]"]
        for item in section.body:
            lines += columns(item) if isinstance(item, Table) else wrapped(item)
    return "\n".join(lines)


def wrapped(sentence: str) -> list[str]:
    return wrap(visible(sentence), CONSOLE_WIDTH, initial_indent="   ", subsequent_indent="   ", break_on_hyphens=False)


def columns(table: Table) -> list[str]:
    """A table in columns two blanks apart.

    >>> columns(Table(["i", "name"], [["1", "a"], ["10", "b"]], words=["name"]))
    ['    i  name', '    1  a', '   10  b']
    """
    grid = [[visible(cell) for cell in row] for row in (table.head, *table.rows)]
    widths = [max(len(row[i]) for row in grid) for i in range(len(table.head))]
    left = [name in table.words for name in table.head]

    def line(row: Sequence[str]) -> str:
        cells = [c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(row, widths, left, strict=True)]
        return ("   " + "  ".join(cells)).rstrip()

    return [line(row) for row in grid]


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole HTML document."""
    parts = [
        f"<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n<title>{escape(visible(title))}</title>",
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(visible(title))}</h1>",
    ]
    for number, section in enumerate(sections, start=1):
        parts.append(f"<h2>{number}. {escape(section.title)}</h2>\n<p class='where'>{escape(section.where)}</p>")
        for item in section.body:
            parts.append(html_table(item) if isinstance(item, Table) else f"<p>{escape(visible(item))}</p>")
    return "\n".join([*parts, "</body>\n</html>\n"])


def html_table(table: Table) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        kinds = [" class='text'" if name in table.words else "" for name in table.head]
        return "".join(f"<{tag}{k}>{escape(visible(c))}</{tag}>" for k, c in zip(kinds, cells, strict=True))

    rows = [f"<tr>{row('th', table.head)}</tr>", *(f"<tr>{row('td', cells)}</tr>" for cells in table.rows)]
    return "<div class='scroll'><table>\n" + "\n".join(rows) + "\n</table></div>"
