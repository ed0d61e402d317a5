"""Read documents from text, JSON lines, parquet and the Hugging Face hub, and tokenize them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oneblock.data.tokens import Tokens, id_dtype
from oneblock.errors import OneblockError, missing_extra
from oneblock.files import read_text
from oneblock.text import Tokenizer

HUB = "hf:"  # prefix of a data set's name: hf:NAME, hf:NAME:CONFIG, hf:NAME:CONFIG:SPLIT
CHUNK = 1 << 20  # characters of documents that are tokenized together
PIECE = 100_000  # characters of a long document that are encoded at a time
PIECES = 64  # pieces of one call of the tokenizer
LINE_START = re.compile(r"(?<=\S\n)(?=\S)")  # splitting here does not change the tokens


@dataclass(frozen=True)
class DocumentFormat:
    """Where documents are in files."""

    text_field: str = "text"  # field of a JSON line, or column of a table, with the document
    separator: str = ""  # string between the documents of a text file; default: the file is one document


@dataclass(frozen=True)
class Document:
    """A text and its place: the source and the number in it, from 1."""

    text: str
    source: str
    number: int


def read_documents(
    sources: Sequence[str], layout: DocumentFormat | None = None, skip_empty: bool = False
) -> Iterator[Document]:
    """Yield the documents in the order of the sources. OneblockError names the source and document at fault."""
    for source in sources:
        for number, text in enumerate(_read_source(source, layout or DocumentFormat()), 1):
            if text.strip():
                yield Document(text, source, number)
            elif not skip_empty:
                raise OneblockError(
                    f"{source}: document {number:,} is empty: remove it, or use oneblock data prepare --skip-empty"
                )


def read_texts(paths: Sequence[Path], layout: DocumentFormat | None = None) -> list[str]:
    """The text of every document of the files."""
    if not paths:
        raise OneblockError("no training text: give files with --data FILE ...")
    return [document.text for document in read_documents([str(path) for path in paths], layout)]


def _read_source(source: str, layout: DocumentFormat) -> Iterator[str]:
    if source.startswith(HUB):
        return _read_hub(source, layout)
    path = Path(source)
    suffixes = "".join(path.suffixes[-2:]).lower()
    if suffixes.endswith((".jsonl", ".jsonl.gz", ".ndjson")):
        return _read_json_lines(path, layout)
    if suffixes.endswith(".parquet"):
        return _read_parquet(path, layout)
    if suffixes.endswith(".json"):
        raise OneblockError(f"{path} is one JSON value: write its documents as lines of a .jsonl file")
    return _read_text_file(path, layout)


def _read_text_file(path: Path, layout: DocumentFormat) -> Iterator[str]:
    text = read_text(path)
    if not text.strip():
        raise OneblockError(f"{path} is empty: give a file with text")
    yield from text.split(layout.separator) if layout.separator else [text]


def _read_json_lines(path: Path, layout: DocumentFormat) -> Iterator[str]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse_line(line, layout.text_field, f"{path}, line {number}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise OneblockError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _parse_line(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OneblockError(f"{where} is not valid JSON ({error})") from None
    return _text_of_row(row, field, where)


def _text_of_row(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        names = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise OneblockError(f"{where} has no text in {field!r} (it has {names}): name the field with --text-field")
    return row[field]


def _read_parquet(path: Path, layout: DocumentFormat) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise missing_extra(f"{path}: reading parquet", "pyarrow", "data") from None
    try:
        file = parquet.ParquetFile(path)
        if layout.text_field not in file.schema_arrow.names:
            _text_of_row(dict.fromkeys(file.schema_arrow.names), layout.text_field, str(path))
        for batch in file.iter_batches(1024, columns=[layout.text_field]):
            for number, text in enumerate(batch.column(0).to_pylist(), 1):
                yield _text_of_row({layout.text_field: text}, layout.text_field, f"{path}, row {number} of a batch")
    except (OSError, pyarrow.ArrowException) as error:
        raise OneblockError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


def _read_hub(source: str, layout: DocumentFormat) -> Iterator[str]:
    """Stream the rows of a data set."""
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise missing_extra(f"{source}: reading a data set from the hub", "datasets", "data") from None
    name, config, split = [*source.removeprefix(HUB).split(":"), "", ""][:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the library, the network or the name may raise anything
        raise OneblockError(f"cannot open the data set {name}: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows, 1):
        yield _text_of_row(row, layout.text_field, f"{source}, row {number}")


# ------------------------------------------------------------------ tokenization


def split_text(text: str, size: int = PIECE) -> Iterator[str]:
    """Split a text at line starts into pieces of about `size` characters."""
    start = 0
    while len(text) - start > size:
        line_start = LINE_START.search(text, start + size)
        end = line_start.start() if line_start else len(text)
        yield text[start:end]
        start = end
    yield text[start:]


def chunk_texts(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts into lists of about CHUNK characters."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode_documents(texts: Sequence[str], tokenizer: Tokenizer) -> list[NDArray[Any]]:
    """The ids of each document, followed by the end-of-text id if the tokenizer has one."""
    dtype = id_dtype(tokenizer.vocab_size)
    pieces = [(i, piece) for i, text in enumerate(texts) for piece in split_text(text)]
    ids: list[list[NDArray[Any]]] = [[] for _ in texts]
    for first in range(0, len(pieces), PIECES):
        batch = pieces[first : first + PIECES]
        batch_ids = tokenizer.encode_batch([piece for _, piece in batch], bos=False)
        for (i, _), piece_ids in zip(batch, batch_ids, strict=True):
            ids[i].append(np.array(piece_ids, dtype))
    end = np.array(tokenizer.eos_ids[:1], dtype)
    return [np.concatenate([*parts, end]) for parts in ids]


def tokenize(texts: Iterable[str], tokenizer: Tokenizer) -> Tokens:
    """All documents as one token sequence, which knows where each document ends."""
    ids = [document for chunk in chunk_texts(texts) for document in encode_documents(chunk, tokenizer)]
    return Tokens([np.concatenate(ids)], np.cumsum([len(document) for document in ids]))
