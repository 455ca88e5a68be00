"""Timed replies in; per variant and load, medians over rounds and paired ratios out, as a file that others read.

A round measures every variant once, in turns, so that what disturbs the machine disturbs all of them. Invariant: a
ratio compares figures of the same rounds, and a file that says `complete` holds every cell that was asked for.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expertcut.checkpoint.jsonio import load_json
from expertcut.errors import CheckpointError, DataError
from expertcut.measure.completions import Reply
from expertcut.measure.intervals import geometric

SCHEMA: Literal["expertcut.bench/1"] = "expertcut.bench/1"
FILE = "bench.json"
TAIL = 0.95


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Variant(_Record):
    """What is measured: a checkpoint, or one with another top-k put on it by the engine."""

    variant: str
    """Its name, which no other has."""
    model: str
    """The checkpoint's name."""
    experts: int | float
    """Per MoE layer; the mean where layers differ. `top_k` likewise."""
    top_k: int | float


class Cell(_Record):
    """A load."""

    concurrency: int
    """Clients that send one request after the other."""
    input_len: int
    """Tokens of a prompt; the rounded mean of given ones."""
    output_len: int


class Row(Cell, Variant):
    """What one variant does under one load; times in seconds, memory in bytes."""

    rounds: tuple[int, ...]
    """The numbers of the rounds that it took part in."""
    requests: int
    """Of all rounds."""
    tokens_per_s: float
    """Tokens written per second; the median over rounds."""
    tokens_per_s_values: tuple[float, ...]
    """By round."""
    total_tokens_per_s: float
    """Those of the prompts too; the median over rounds."""
    ttft: float
    """Time to the first token: the median over all requests, and below what 95 % of them lie."""
    ttft_p95: float
    tpot: float | None
    """Time per further token, likewise; None if each answer is one token."""
    tpot_p95: float | None
    ratio: float | None
    """Of `tokens_per_s` to the first variant's in the same rounds: geometric mean, 95 % interval; None for itself."""
    ratio_low: float | None
    """None too if there is only one round."""
    ratio_high: float | None
    memory: int | None
    """Peak of the engine's processes under load; None if it runs elsewhere."""
    gpu_memory: int | None
    """In use on all GPUs of the machine behind the runs, at most; None if there are none to be seen."""
    client_share: float
    """Of a core, what the client itself used: near 1, it is what was measured."""
    counted: bool
    """True: the server does not say how many tokens it wrote, so that pieces of its streams stand for them."""


class Machine(_Record):
    """Where the engine ran."""

    cpu: str
    cores: int
    """That this process may use."""
    memory: int
    """Bytes."""
    gpus: tuple[str, ...]
    settings: dict[str, str]
    """Environment variables that decide how an engine uses it."""

    def __str__(self) -> str:
        return ", ".join((*self.gpus, f"{self.cores} cores of {self.cpu}"))


class Bench(_Record):
    """A whole run of `expertcut bench`."""

    schema_version: Literal["expertcut.bench/1"] = Field(default=SCHEMA, alias="schema")
    complete: bool
    """False: it was cut short, and holds what had been measured."""
    command: str
    engine: str
    """And its version."""
    machine: Machine | None
    """None: a server elsewhere."""
    prompts: str
    """random, or the name of the file that they are from."""
    seed: int
    rows: tuple[Row, ...]

    def save(self, path: Path) -> None:
        """Write it as JSON; replaces the file at once or not at all."""
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.model_dump(mode="json", by_alias=True), indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)


@dataclass(frozen=True)
class Sample:
    """One variant under one load in one round."""

    variant: Variant
    cell: Cell
    round: int
    replies: tuple[Reply, ...]
    client_share: float
    memory: int | None
    gpu_memory: int | None

    @property
    def seconds(self) -> float:
        """From the first request to the last token."""
        return max(reply.last for reply in self.replies) - min(reply.sent for reply in self.replies)

    @property
    def tokens_per_s(self) -> float:
        """Tokens written per second."""
        return sum(reply.tokens for reply in self.replies) / self.seconds

    @property
    def total_tokens_per_s(self) -> float:
        """Tokens read and written per second."""
        return sum(reply.prompt + reply.tokens for reply in self.replies) / self.seconds


def cells(concurrency: Sequence[int], input_len: Sequence[int], output_len: Sequence[int]) -> list[Cell]:
    """Return every load of a grid."""
    return [
        Cell(concurrency=clients, input_len=length, output_len=wanted)
        for length, wanted, clients in product(input_len, output_len, concurrency)
    ]


def summarise(samples: Sequence[Sample]) -> tuple[Row, ...]:
    """Return a row per variant and load, in the order of their first samples; ratios are to the first variant."""
    found: dict[tuple[Variant, Cell], list[Sample]] = {}
    for sample in samples:
        found.setdefault((sample.variant, sample.cell), []).append(sample)
    first = samples[0].variant if samples else None
    return tuple(
        _row(variant, cell, some, {} if variant == first else _by_round(found.get((first, cell), ())))  # type: ignore[arg-type]
        for (variant, cell), some in found.items()
    )


def load_bench(path: Path) -> Bench:
    """Read what `expertcut bench -o DIR` left: DIR, or the file in it. Whether it is complete, it says itself.

    Raises:
        DataError: there is no such file, or it is of another kind.
    """
    file = path / FILE if path.is_dir() else path
    again = "make it with expertcut bench DIR… -o OUT"
    if not file.is_file():
        raise DataError(f"{file}: no such file", again)
    try:
        return Bench.model_validate(load_json(file))
    except CheckpointError as error:
        raise DataError(error.message, again) from error
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("$", *wrong["loc"])))
        raise DataError(f"{file}: {where}: {wrong['msg']}, expected the fields of {SCHEMA}", again) from error


def save_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write one line per row under a header of field names; values by round stand between spaces."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, list(Row.model_fields))
        writer.writeheader()
        for row in rows:
            members = row.model_dump()
            writer.writerow({k: " ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in members.items()})


def _by_round(samples: Sequence[Sample]) -> Mapping[int, float]:
    return {sample.round: sample.tokens_per_s for sample in samples}


def _row(variant: Variant, cell: Cell, samples: Sequence[Sample], base: Mapping[int, float]) -> Row:
    replies = [reply for sample in samples for reply in sample.replies]
    ttft, tpot = [r.ttft for r in replies], [r.tpot for r in replies if r.tpot is not None]
    pairs = [sample.tokens_per_s / base[sample.round] for sample in samples if sample.round in base]
    ratio = geometric(np.asarray(pairs)) if pairs else None
    return Row(
        **variant.model_dump(), **cell.model_dump(),
        rounds=tuple(sample.round for sample in samples),
        requests=len(replies),
        tokens_per_s=float(np.median([sample.tokens_per_s for sample in samples])),
        tokens_per_s_values=tuple(sample.tokens_per_s for sample in samples),
        total_tokens_per_s=float(np.median([sample.total_tokens_per_s for sample in samples])),
        ttft=float(np.median(ttft)), ttft_p95=float(np.quantile(ttft, TAIL)),
        tpot=float(np.median(tpot)) if tpot else None, tpot_p95=float(np.quantile(tpot, TAIL)) if tpot else None,
        ratio=ratio.value if ratio else None, ratio_low=ratio.low if ratio else None,
        ratio_high=ratio.high if ratio else None,
        memory=_most([sample.memory for sample in samples]),
        gpu_memory=_most([sample.gpu_memory for sample in samples]),
        client_share=max(sample.client_share for sample in samples),
        counted=any(reply.counted for reply in replies),
    )  # fmt: skip


def _most(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
