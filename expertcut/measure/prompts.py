"""A file of prompts, or a seed, in; the token ids that every variant of a benchmark is given in a round out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from expertcut.calibrate.tokenizer import Tokenizer
from expertcut.errors import DataError
from expertcut.measure.bench import Cell

MARGIN = 16
"""Random ids keep off this fraction of the vocabulary at either end, where special tokens are."""
LEAST = 4
"""Requests of a load in a round, at least: a single one says too little."""
FIELDS = ("prompt", "text")


@dataclass(frozen=True)
class Prompts:
    """Given prompts, in turns; or random ones of the wanted length."""

    given: Sequence[Sequence[int]]
    vocabulary: int
    seed: int
    requests: int
    """Of every client in a round, and more if there are fewer than `LEAST` clients."""

    def draw(self, cell: Cell, number: int) -> list[list[int]]:
        """Return the prompts of a load in one round, number 0 being the warm-up."""
        count = cell.concurrency * max(self.requests, -(-LEAST // cell.concurrency))
        if self.given:
            return [list(self.given[(number * count + i) % len(self.given)]) for i in range(count)]
        random = np.random.default_rng([self.seed, number, cell.concurrency, cell.input_len, cell.output_len])
        least = self.vocabulary // MARGIN
        drawn = random.integers(least, self.vocabulary - least, (count, cell.input_len))
        return [[int(token) for token in prompt] for prompt in drawn]


def read_prompts(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """Read prompts and tokenise them: of a .jsonl file the field `prompt` or `text`, of any other its lines.

    Raises:
        DataError: it cannot be read, or there is no prompt in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    texts = list(_from_json(path, lines)) if path.suffix == ".jsonl" else lines
    found = [[int(token) for token in tokenizer.begin(text)] for text in texts if text.strip()]
    found = [prompt for prompt in found if prompt]
    if not found:
        raise DataError(f"{path}: found no prompts", "one a line, or .jsonl with a field `prompt` or `text`")
    return found


def _from_json(path: Path, lines: Sequence[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            yield next(record[field] for field in FIELDS if isinstance(record.get(field), str))
        except (ValueError, AttributeError, StopIteration, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: expected an object with a text in {' or '.join(FIELDS)}"
            ) from error
