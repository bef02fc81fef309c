"""Reads the rows of a problem set from a local file or from a data set of the Hugging Face hub.

Text files (JSON Lines, JSON, CSV, also gzipped) are read here: every value stays as it is written, where a table reader
would turn the answer 025 into 25 and NA into nothing, and one bad line of JSON costs one row. Parquet files and hub data
sets, whose values have types, are read by the `datasets` library.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nanolapo.config import SourceConfig, UserError

FILES = ".jsonl, .ndjson, .json or .csv, each also with .gz, or .parquet"
NUM_SHOWN = 10  # rows listed before "..."
Rows = Iterable[tuple[int, Any]]  # (number, row); a row that cannot be read is a BadRow


class BadRow(ValueError):
    """Why one row cannot be used."""


def source_key(source: SourceConfig) -> str:
    """The config key of a source, for error messages."""
    return f"data.sources[{source.name}]"


def read_rows(source: SourceConfig) -> tuple[str, Rows]:
    """Return the rows of a source, each with its number, and what the numbers count: "line" or "row".

    A row that is not JSON, or not UTF-8, or has too many cells is a BadRow that says why. Raises UserError where a whole
    file or data set cannot be read.
    """
    name = source.path.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return "line", _json_lines(_content(source))
    if name.endswith(".json"):
        return _json_rows(source)
    if name.endswith(".csv"):
        return "line", _csv_rows(source)
    return "row", _typed_rows(source)


def _content(source: SourceConfig) -> bytes:
    """The bytes of a file, without gzip and without a byte order mark."""
    try:
        content = Path(source.path).read_bytes()
        if source.path.lower().endswith(".gz"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(source, error) from error
    return content.removeprefix(b"\xef\xbb\xbf")


def _unreadable(source: SourceConfig, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"{source_key(source)}.path: cannot read {source.path} ({reason})")


def _json_lines(content: bytes) -> Iterator[tuple[int, Any]]:
    # Split bytes, not text: str.splitlines also cuts at characters that JSON allows inside a string.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            row = BadRow("not UTF-8")
        except (ValueError, RecursionError) as error:
            row = BadRow(f"not JSON ({error})")
        yield number, row


def _json_rows(source: SourceConfig) -> tuple[str, Rows]:
    """A .json file is a list of rows, or JSON Lines under another name."""
    content = _content(source)
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip().startswith(b"["):
            raise UserError(f"{source_key(source)}.path: {source.path} is not JSON ({error})") from error
        return "line", _json_lines(content)
    return "row", enumerate(rows if isinstance(rows, list) else [rows], start=1)


def _csv_rows(source: SourceConfig) -> Iterator[tuple[int, Any]]:
    content = _content(source)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source_key(source)}.path: {source.path} is not UTF-8 (line {line})") from error
    csv.field_size_limit(2**31 - 1)  # a column of generations, read or not, may have long cells
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)  # strict: an open quote would swallow the rest
    try:
        names = next(reader, [])
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(
                f"{source_key(source)}.path: {source.path} has two columns {min(twice)!r}; rename one of them"
            )
        number = reader.line_num + 1  # where the next row starts
        for cells in reader:
            if len(cells) == len(names):
                yield number, dict(zip(names, cells, strict=True))
            elif cells:  # a comma without quotes moves part of the question into the answer
                yield number, BadRow(f"{len(cells)} cells under {len(names)} names")
            number = reader.line_num + 1
    except csv.Error as error:
        line = reader.line_num
        raise UserError(f"{source_key(source)}.path: {source.path} is not CSV (line {line}: {error})") from error


def _typed_rows(source: SourceConfig) -> Iterator[tuple[int, Any]]:
    import datasets  # heavy, and not needed for text files

    failures = (OSError, ValueError, datasets.exceptions.DatasetsError)
    if source.path.lower().endswith(".parquet"):
        try:  # streaming leaves no copy in a cache
            file = glob.escape(str(Path(source.path).absolute()))
            rows = datasets.load_dataset("parquet", data_files=file, split="train", streaming=True)
            yield from enumerate(_named(rows), start=1)
        except failures as error:
            raise _unreadable(source, error) from error
        return
    if Path(source.path).is_file():
        raise UserError(f"{source_key(source)}.path: {source.path} is none of the files that are read: {FILES}")
    try:
        rows = datasets.load_dataset(source.path, source.subset or None, split=source.split)
    except failures as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{source_key(source)}: cannot load {source.path!r} from the Hugging Face hub ({reason}); check path, "
            "subset, split and network (gated sets need HF_TOKEN), or give a local file as path"
        ) from error
    yield from enumerate(_named(rows), start=1)


def _named(rows: Any) -> Iterator[dict[str, Any]]:
    """The rows of a data set, with the names of class labels in place of their numbers, and None for an unknown one."""
    names = {field: kind.names for field, kind in (rows.features or {}).items() if hasattr(kind, "int2str")}
    for row in rows:
        labels = {field: row[field] for field in names if row[field] is not None}
        yield row | {field: names[field][n] if 0 <= n < len(names[field]) else None for field, n in labels.items()}


def field_at(row: dict[str, Any], name: str) -> Any:
    """Return a field by its name, or by its path: keys and list positions, with dots between them.

    >>> field_at({"prompt": [{"content": "2+2?"}], "a.b": 1}, "prompt.0.content")
    '2+2?'
    """
    value: Any = row
    if name in row:
        return row[name]
    parts = name.split(".")
    for i, part in enumerate(parts):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise BadRow(f"no field {name!r} ({'.'.join(parts[:i]) or 'it'} {_contents(value)})")
    return value


def _contents(value: Any) -> str:
    if isinstance(value, dict):
        return f"has {', '.join(map(str, value)) or 'no fields'}"
    return f"has {len(value)} items" if isinstance(value, list) else f"is {type(value).__name__}"


def first_few(lines: list[str]) -> list[str]:
    return lines if len(lines) <= NUM_SHOWN else [*lines[:NUM_SHOWN], "..."]


def listing(bad: dict[str, list[int]], word: str) -> list[str]:
    """One line for each kind of bad row, with the first numbers of its rows.

    >>> listing({"field 'answer' is empty": [2, 7], "not UTF-8": [5]}, "line")
    ["line 2, 7: field 'answer' is empty", 'line 5: not UTF-8']
    """
    lines = []
    for reason, numbers in bad.items():
        more = ", ..." if len(numbers) > NUM_SHOWN else ""
        lines.append(f"{word} {', '.join(map(str, numbers[:NUM_SHOWN]))}{more}: {reason}")
    return first_few(lines)
