"""Files, and data sets by name, as documents."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneblock.data.text import read_text
from oneblock.errors import OneblockError, missing_extra

HUB = "hf:"  # before the name of a data set: hf:NAME, hf:NAME:CONFIG, hf:NAME:CONFIG:SPLIT


@dataclass(frozen=True)
class Reading:
    """How documents are found in files."""

    field: str = "text"  # of a line of jsonl, or a column
    separator: str = ""  # between the documents of a text file; without it each file is one


@dataclass(frozen=True)
class Document:
    text: str
    source: str
    number: int  # within its source, from 1


def documents(sources: Sequence[str], how: Reading) -> Iterator[Document]:
    """Every document, in the order of the sources. OneblockError names the source and the document at fault."""
    for source in sources:
        for i, text in enumerate(texts_of(source, how), 1):
            yield Document(text, source, i)


def texts_of(source: str, how: Reading) -> Iterator[str]:
    if source.startswith(HUB):
        return from_hub(source, how)
    path = Path(source)
    kinds = "".join(path.suffixes[-2:]).lower()
    if kinds.endswith((".jsonl", ".jsonl.gz", ".ndjson")):
        return from_lines(path, how)
    if kinds.endswith(".parquet"):
        return from_parquet(path, how)
    if kinds.endswith(".json"):
        raise OneblockError(f"{path} is one JSON value: write its documents as lines of a .jsonl file")
    return from_text(path, how)


def from_text(path: Path, how: Reading) -> Iterator[str]:
    text = read_text(path)
    yield from text.split(how.separator) if how.separator else [text]


def from_lines(path: Path, how: Reading) -> Iterator[str]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for i, line in enumerate(file, 1):
                if line.strip():
                    yield field_of(line, how.field, f"{path}, line {i}")
    except (OSError, EOFError, UnicodeDecodeError) as e:
        raise OneblockError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None


def field_of(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise OneblockError(f"{where} is no JSON ({e})") from None
    return text_in(row, field, where)


def text_in(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        names = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise OneblockError(f"{where} has no text in {field!r} (it has {names}): name the right one with --field")
    return row[field]


def from_parquet(path: Path, how: Reading) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise missing_extra(f"{path}: reading parquet", "pyarrow", "data") from None
    try:
        file = parquet.ParquetFile(path)
        if how.field not in file.schema_arrow.names:
            text_in(dict.fromkeys(file.schema_arrow.names), how.field, str(path))
        for batch in file.iter_batches(1024, columns=[how.field]):
            for i, text in enumerate(batch.column(0).to_pylist(), 1):
                yield text_in({how.field: text}, how.field, f"{path}, row {i} of a batch")
    except (OSError, pyarrow.ArrowException) as e:
        raise OneblockError(f"cannot read {path}: {str(e).splitlines()[0]}") from None


def from_hub(source: str, how: Reading) -> Iterator[str]:
    """Rows as they arrive: nothing is kept but what is being worked on."""
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise missing_extra(f"{source}: reading a data set from the hub", "datasets", "data") from None
    name, config, split = [*source.removeprefix(HUB).split(":"), "", ""][:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as e:  # whatever the library, the network or the name make of it
        raise OneblockError(f"cannot open the data set {name}: {str(e).splitlines()[0]}") from None
    for i, row in enumerate(rows, 1):
        yield text_in(row, how.field, f"{source}, row {i}")
