"""The texts that a recipe's sources name: local files, the shipped text, arithmetic, datasets of the Hub.

A recipe source in, streams of texts out, one per domain, in an order that depends on the seed alone. Nothing is
tokenised here and nothing is cut. `datasets` is imported only for a Hub source, pyarrow only for a parquet file.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from expertcut.calibrate.arithmetic import arithmetic
from expertcut.calibrate.hub import hub_texts
from expertcut.calibrate.recipes import (
    TEXT_SUFFIXES,
    ArithmeticSource,
    BuiltinSource,
    FileSource,
    HubSource,
    SelfSource,
    Source,
    calibration_dir,
)
from expertcut.calibrate.tokenizer import Tokenizer
from expertcut.errors import DataError


@dataclass(frozen=True)
class Text:
    """One document."""

    text: str
    rendered: bool = False
    """True if it brings its own special tokens (a chat rendered by the model's template)."""


@dataclass(frozen=True)
class Stream:
    """The documents of one source in one domain."""

    source: str
    """What the user called the source it belongs to."""
    domain: str
    weight: float
    texts: Callable[[], Iterator[Text]] | None
    """None: the model itself writes them."""
    detail: dict[str, Any] = field(default_factory=dict)
    """Where the text comes from, for the record: JSON values."""
    endless: bool = False
    """True if the source is read until a number of tokens is reached, and has no end to speak of."""
    warnings: list[str] = field(default_factory=list)
    """Filled while the texts are read."""


def open_source(name: str, source: Source, tokenizer: Tokenizer, seed: int) -> list[Stream]:
    """Open one source of a recipe: a stream per domain. Raises: DataError, HubError."""
    detail = source.model_dump(mode="json", exclude_defaults=True, exclude={"weight"})
    if isinstance(source, FileSource):
        return _file_streams(name, source, seed)
    if isinstance(source, BuiltinSource):
        texts = _shuffled(_builtin(source), source.domain, seed)
        return [Stream(name, source.domain, source.weight, lambda: iter(texts), detail)]
    if isinstance(source, ArithmeticSource):
        drawn = [Text(text) for text in islice(arithmetic(source.part, seed), source.documents)]
        return [Stream(name, source.domain, source.weight, lambda: iter(drawn), detail)]
    if isinstance(source, SelfSource):
        return [Stream(name, source.domain, source.weight, None, detail, endless=True)]
    return [_hub_stream(name, source, tokenizer, seed, detail)]


def _hub_stream(name: str, source: HubSource, tokenizer: Tokenizer, seed: int, detail: dict[str, Any]) -> Stream:
    warnings: list[str] = []

    def texts() -> Iterator[Text]:
        for text, rendered in hub_texts(source, tokenizer, seed, warnings):
            yield Text(text, rendered)

    return Stream(name, source.domain, source.weight, texts, detail, endless=True, warnings=warnings)


def _builtin(source: BuiltinSource) -> list[Text]:
    folder = calibration_dir() / "text" / source.part / source.domain
    files = sorted(folder.glob("*.txt"))
    if not files:
        known = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
        raise DataError(f"no shipped text in domain {source.domain!r}: expected one of {', '.join(known)}")
    return [Text(file.read_text(encoding="utf-8")) for file in files]


def _file_streams(name: str, source: FileSource, seed: int) -> list[Stream]:
    domains: dict[str, list[Text]] = {}
    for text, own in read_file(source.path):
        domain = source.domain or own or source.path.stem
        domains.setdefault(domain, []).append(Text(text))
    if not domains:
        raise DataError(f"{source.path}: no text in it")
    detail = {"kind": "file", "path": str(source.path)}
    weight = source.weight / len(domains)
    shuffled = {domain: _shuffled(texts, domain, seed) for domain, texts in sorted(domains.items())}
    return [
        Stream(name, domain, weight, texts.__iter__, {**detail, "domain": domain}) for domain, texts in shuffled.items()
    ]


def _shuffled(texts: list[Text], domain: str, seed: int) -> list[Text]:
    order = np.random.default_rng([seed, zlib.crc32(domain.encode())]).permutation(len(texts))
    return [texts[i] for i in order]


def read_file(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield (text, domain or None) for each document of a .txt, .jsonl or .parquet file; empty ones are left out.

    Raises: DataError naming file and line (or row).
    """
    readers = dict(zip(TEXT_SUFFIXES, (_read_txt, _read_jsonl, _read_parquet), strict=True))
    if path.suffix not in readers:
        raise DataError(f"{path}: found {path.suffix or 'no suffix'}, expected one of {', '.join(readers)}")
    try:
        for text, domain in readers[path.suffix](path):
            if text.strip():
                yield text, domain
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror or error}") from error


def _read_txt(path: Path) -> Iterator[tuple[str, str | None]]:
    with path.open("rb") as file:
        yield "".join(_decode(raw, f"{path}:{number}") for number, raw in enumerate(file, start=1)), None


def _read_jsonl(path: Path) -> Iterator[tuple[str, str | None]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = f"{path}:{number}"
            line = _decode(raw, place)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
            yield _row(row, place)


def _read_parquet(path: Path) -> Iterator[tuple[str, str | None]]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                raise DataError(f"{path}: found columns {', '.join(names)}, expected a column text")
            row = 0
            for batch in file.iter_batches(columns=[name for name in ("text", "domain") if name in names]):
                for values in batch.to_pylist():
                    row += 1
                    yield _row(values, f"{path}: row {row}")
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from error


def _row(row: Any, place: str) -> tuple[str, str | None]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: found {type(row).__name__}, expected an object with text and, if wanted, domain")
    if not isinstance(row.get("text"), str):
        found = type(row["text"]).__name__ if "text" in row else f"fields {', '.join(map(str, row)) or 'none'}"
        raise DataError(f"{place}: found {found}, expected a string in field text")
    domain = row.get("domain")
    if domain is not None and not (isinstance(domain, str) and domain):
        raise DataError(f"{place}: found domain {domain!r}, expected a name")
    return row["text"], domain


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8: byte {raw[error.start]:#04x}") from error
