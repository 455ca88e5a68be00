"""Calibration data: names of sources in, token sequences out, each of one domain. Held-out text goes the same way.

A budget of tokens is split over the sources named (equal shares), within a recipe by weight, and every share is
filled with whole documents in an order that the seed decides. Then, per domain:

- packed: documents, each ended by EOS, are joined and cut into windows of exactly `seq_len`; the rest at the end of
  a domain is a shorter window, dropped below 16 tokens unless it is all there is;
- padded: one document per sequence, cut at `seq_len`, so as long as it is. Padding is the executor's business.

No window mixes domains, and no sequence holds padding: a statistic over `ids` counts real tokens only.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Listed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from expertcut.calibrate.recipes import find_recipe
from expertcut.calibrate.selfsample import sample_self
from expertcut.calibrate.sources import Stream, open_source
from expertcut.calibrate.tokenizer import Ids, Tokenizer
from expertcut.errors import DataError, UsageError

MIN_TAIL = 16


@dataclass(frozen=True)
class Sequence:
    """Tokens of one domain: `ids` (T,) int64, 2 <= T <= seq_len, without padding."""

    ids: Ids
    domain: str


@dataclass(frozen=True)
class CalibrationSet:
    """What a model is run over, and where it came from."""

    sequences: tuple[Sequence, ...]
    """Grouped by domain, in the order of `domains`."""
    domains: tuple[str, ...]
    seq_len: int
    packed: bool
    seed: int
    fingerprint: str
    """sha256 over every sequence's domain and ids."""
    sources: list[dict[str, Any]]
    """One record per source and domain: name, where from, documents and tokens read. JSON values."""
    warnings: tuple[str, ...] = ()
    """One line each, for stderr."""

    @property
    def tokens(self) -> int:
        """Sum over all sequences."""
        return sum(len(sequence.ids) for sequence in self.sequences)

    @property
    def tokens_by_domain(self) -> dict[str, int]:
        """Tokens of every domain."""
        counts = dict.fromkeys(self.domains, 0)
        for sequence in self.sequences:
            counts[sequence.domain] += len(sequence.ids)
        return counts

    def parted(self, every: int) -> tuple[CalibrationSet, CalibrationSet]:
        """Return the set without every so manieth sequence of each domain, and those.

        Of a domain with fewer sequences, but more than one, it is the last.
        """
        count, place = Counter(sequence.domain for sequence in self.sequences), Counter[str]()
        parts: tuple[list[Sequence], list[Sequence]] = ([], [])
        for sequence in self.sequences:
            place[sequence.domain] += 1
            step = min(every, max(2, count[sequence.domain]))
            parts[place[sequence.domain] % step == 0].append(sequence)
        rest, chosen = (replace(self, sequences=tuple(p), fingerprint=_fingerprint(p)) for p in parts)
        return rest, chosen


@dataclass(frozen=True)
class SelfModel:
    """What the source `self` samples from."""

    path: Path
    device: str = "auto"
    dtype: str | None = None


def load_calibration(
    sources: Listed[str | Path],
    tokenizer: Tokenizer,
    *,
    tokens: int | None,
    seq_len: int,
    seed: int = 0,
    packed: bool = True,
    model_dir: Path | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> CalibrationSet:
    """Read, tokenise and cut the named sources.

    sources: shipped recipes, recipe files, text files; a string may hold several, separated by commas.
    tokens: how many in all, None for all that finite sources have. Sources with less give what they have, with a
    warning. seq_len: tokens of a window. model_dir, device, dtype: the model that `self` samples from.

    Raises: DataError, HubError for text that cannot be had; UsageError for numbers out of range.
    """
    if seq_len < 2 or (tokens is not None and tokens < 2):
        raise UsageError(f"found {tokens} tokens in sequences of {seq_len}, expected at least 2 of both")
    streams = _open(_split_names(sources), tokenizer, seed)
    model = SelfModel(model_dir, device, dtype) if model_dir else None
    warnings: list[str] = []
    records: list[dict[str, Any]] = []
    documents: dict[str, list[Ids]] = {}
    for stream, budget in zip(streams, _budgets(streams, tokens), strict=True):
        read = _take(_documents(stream, budget, tokenizer, seq_len, seed, model), budget, None if packed else seq_len)
        count = sum(map(len, read))
        records.append({"name": stream.source, **stream.detail, "documents": len(read), "tokens": count})
        warnings += stream.warnings
        if budget is not None and count < budget - 1:
            warnings.append(f"{stream.source}: {stream.domain}: only {count:,} of {budget:,} tokens to be had")
        documents.setdefault(stream.domain, []).extend(read)
    return _assemble(documents, seq_len, packed, seed, records, warnings)


def _split_names(sources: Listed[str | Path]) -> list[str | Path]:
    names: list[str | Path] = []
    for source in sources:
        whole = isinstance(source, Path) or Path(source).is_file()
        names += [source] if whole else [part.strip() for part in str(source).split(",") if part.strip()]
    if not names:
        raise UsageError("no calibration source given", hint="pass --calibration builtin")
    return names


def _open(names: list[str | Path], tokenizer: Tokenizer, seed: int) -> list[Stream]:
    """Open every source; the weights of the streams of one name come to 1."""
    streams: list[Stream] = []
    for name in names:
        recipe = find_recipe(name)
        total = sum(source.weight for source in recipe.sources)
        for source in recipe.sources:
            share = source.model_copy(update={"weight": source.weight / total})
            streams += open_source(str(name), share, tokenizer, seed)
    return streams


def _budgets(streams: list[Stream], tokens: int | None) -> list[int | None]:
    """Split `tokens` by weight, in whole tokens that add up (largest remainders first)."""
    if tokens is None:
        for stream in streams:
            if stream.endless:
                raise UsageError(f"{stream.source}: {stream.domain} has no end", hint="pass --tokens")
        return [None] * len(streams)
    total = sum(stream.weight for stream in streams)
    exact = [tokens * stream.weight / total for stream in streams]
    budgets = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: budgets[i] - exact[i])
    for i in by_remainder[: tokens - sum(budgets)]:
        budgets[i] += 1
    if min(budgets) < 2:
        raise UsageError(f"found {tokens} tokens for {len(streams)} sources, expected at least 2 for each")
    return list(budgets)


def _documents(
    stream: Stream, budget: int | None, tokenizer: Tokenizer, seq_len: int, seed: int, model: SelfModel | None
) -> Iterator[Ids]:
    if stream.texts is not None:
        return (tokenizer.encode(text.text, special=not text.rendered) for text in stream.texts())
    if model is None or budget is None:
        raise DataError(f"{stream.source}: sampling needs the model itself", hint="use --calibration builtin")
    return iter(
        sample_self(
            model.path, tokenizer, tokens=budget, seq_len=seq_len, seed=seed, device=model.device, dtype=model.dtype
        )
    )


def _take(documents: Iterable[Ids], budget: int | None, longest: int | None) -> list[Ids]:
    """Take documents, each cut at `longest`, until they hold `budget` tokens; the last is cut to fit."""
    taken: list[Ids] = []
    left = math.inf if budget is None else budget
    for ids in documents:
        ids = ids[:longest]
        if left < len(ids):
            ids = ids[: int(left)]
        if len(ids) >= 2:
            taken.append(ids)
            left -= len(ids)
        if left < 2:
            break
    return taken


def _assemble(
    documents: dict[str, list[Ids]],
    seq_len: int,
    packed: bool,
    seed: int,
    records: list[dict[str, Any]],
    warnings: list[str],
) -> CalibrationSet:
    domains = tuple(domain for domain, read in documents.items() if read)
    if not domains:
        raise DataError(f"no text found in {', '.join(dict.fromkeys(str(record['name']) for record in records))}")
    sequences = tuple(
        Sequence(ids, domain)
        for domain in domains
        for ids in (_pack(documents[domain], seq_len) if packed else documents[domain])
    )
    fingerprint = _fingerprint(sequences)
    return CalibrationSet(sequences, domains, seq_len, packed, seed, fingerprint, records, tuple(warnings))


def _pack(documents: list[Ids], seq_len: int) -> list[Ids]:
    joined = np.concatenate(documents)
    windows = [joined[start : start + seq_len] for start in range(0, len(joined), seq_len)]
    if len(windows) > 1 and len(windows[-1]) < min(MIN_TAIL, seq_len):
        windows.pop()
    return windows


def _fingerprint(sequences: Iterable[Sequence]) -> str:
    digest = hashlib.sha256()
    for sequence in sequences:
        name = sequence.domain.encode()
        digest.update(len(name).to_bytes(8, "little") + name + len(sequence.ids).to_bytes(8, "little"))
        digest.update(sequence.ids.astype("<i8").tobytes())
    return digest.hexdigest()
