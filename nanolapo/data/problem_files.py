"""Reads the rows of a problem set from a local JSONL file or from a data set of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanolapo.config import SourceConfig, UserError


class BadRow(ValueError):
    """Why one row cannot be used."""


def source_key(source: SourceConfig) -> str:
    """The config key of a source, for error messages."""
    return f"data.sources[{source.name}]"


def read_rows(source: SourceConfig) -> Iterator[tuple[int, Any]]:
    """Yield (line number, row) for each row of a source. A line that is not JSON gives a BadRow that says why."""
    if source.path.endswith(".jsonl"):
        yield from _jsonl_rows(source)
        return
    import datasets  # heavy, and not needed for local files

    try:
        rows = datasets.load_dataset(source.path, source.subset or None, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{source_key(source)}: cannot load {source.path!r} from the Hugging Face hub ({reason}); check path, "
            "subset, split and network (gated sets need HF_TOKEN), or give a local .jsonl file as path"
        ) from error
    yield from enumerate(rows, start=1)


def _jsonl_rows(source: SourceConfig) -> Iterator[tuple[int, Any]]:
    try:
        content = Path(source.path).read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{source_key(source)}.path: cannot read {source.path} ({reason})") from error
    # Split bytes, not text: str.splitlines also cuts at characters that JSON allows inside a string.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            row = BadRow("not UTF-8")
        except (ValueError, RecursionError) as error:
            row = BadRow(f"not JSON ({error})")
        yield number, row
