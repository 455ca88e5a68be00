"""Do two sets of sequences share text? Hashes of token 32-grams, thinned by their own value, tell cheaply.

Which hashes are kept depends on the text alone, so any two sketches made with the same tokenizer can be compared: a
shared passage of a few hundred tokens is found wherever it stands. A sketch of a million tokens is some 500 kB, and one
that is thinned further, to travel in a plan, five. numpy only.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from expertcut.calibrate.tokenizer import Ids
from expertcut.errors import DataError

if TYPE_CHECKING:
    from expertcut.calibrate.data import CalibrationSet

NGRAM = 32
EVERY = 16
MOST = 1024
"""Hashes that a plan carries."""
LIMIT = 0.5
"""Share of 32-grams beyond which a held-out text is none. Different manual pages of one project share up to a third, by
their sections on authors, bugs and licence: see docs/evaluation.md."""
NOTICED = 0.05
"""Share that is worth a warning."""
HITS = 8
"""Shared hashes below which nothing is concluded."""
_BASE = 0x9E3779B97F4A7C15
_STORED = np.uint64(32)
"""Upper bits of a hash that are compared: thinning goes by the lower ones."""


@dataclass(frozen=True)
class Sketch:
    """Which text a profile or plan was made from."""

    tokenizer: str
    """Its fingerprint: 32-grams of different tokenizers do not compare."""
    every: int
    """About one hash in so many was kept, a power of two."""
    hashes: NDArray[np.uint64]
    """(N,) ascending, distinct."""

    def thinned(self) -> Sketch:
        """Return a sketch of at most `MOST` hashes."""
        every, hashes = self.every, self.hashes
        while len(hashes) > MOST:
            every *= 2
            hashes = hashes[hashes % np.uint64(every) == 0]
        return Sketch(self.tokenizer, every, hashes)

    def __str__(self) -> str:
        upper = (self.hashes >> _STORED).astype("<u4")
        return f"{self.tokenizer}:{self.every}:{base64.b64encode(upper.tobytes()).decode()}"

    @classmethod
    def parse(cls, text: str) -> Sketch:
        """Read what `str` wrote; the lower halves of the hashes are gone. Raises: ValueError if it did not."""
        tokenizer, every, hashes = text.split(":")
        if int(every) < 1:
            raise ValueError(every)
        upper = np.frombuffer(base64.b64decode(hashes, validate=True), "<u4").astype(np.uint64)
        return cls(tokenizer, int(every), upper << _STORED)

    def shared(self, sequences: Iterable[Ids]) -> tuple[int, int]:
        """Return how many of a text's hashes are in this sketch, and of how many. Sequences: ids (T,) int64."""
        found = sequence_hashes(sequences, self.every) >> _STORED
        return int(np.isin(found, self.hashes >> _STORED).sum()), len(found)


def sequence_hashes(sequences: Iterable[Ids], every: int = EVERY) -> NDArray[np.uint64]:
    """Hash every run of 32 tokens and keep about one in `every`.

    sequences: ids (T,) int64, any lengths; shorter ones than 32 have no run. Returns (N,) uint64, ascending, distinct.
    """
    powers = np.array([pow(_BASE, NGRAM - 1 - i, 1 << 64) for i in range(NGRAM)], dtype=np.uint64)
    found = [np.zeros(0, dtype=np.uint64)]
    for ids in sequences:
        if len(ids) >= NGRAM:
            runs = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), NGRAM)
            hashes = _mix((runs * powers).sum(axis=1, dtype=np.uint64))
            found.append(hashes[hashes % np.uint64(every) == 0])
    return np.unique(np.concatenate(found))


def check_overlap(heldout: CalibrationSet, tokenizer: str, known: Mapping[str, Sketch | None]) -> list[str]:
    """Check that held-out text is not what something was calibrated on, domain by domain.

    `tokenizer` is the fingerprint of the one that made the held-out ids; `known` has the sketch of each profile's or
    plan's calibration text by name, None where it has none. Returns warnings: what is shared in part, what cannot be
    checked.

    Raises:
        DataError: more than `LIMIT` of a domain's 32-grams are in a calibration text.
    """
    warnings = []
    for name, sketch in known.items():
        if sketch is None:
            warnings.append(f"{name}: does not say what text it was calibrated on; overlap cannot be checked")
        elif sketch.tokenizer != tokenizer:
            warnings.append(f"{name}: was calibrated with another tokenizer; overlap cannot be checked")
        else:
            warnings += _check(heldout, name, sketch)
    return warnings


def _check(heldout: CalibrationSet, name: str, sketch: Sketch) -> list[str]:
    warnings = []
    for domain in (*heldout.domains, None):  # all together, too: many small domains tell nothing alone
        some = [s.ids for s in heldout.sequences if domain in (None, s.domain)]
        hits, count = sketch.shared(some)
        if hits < HITS or hits < NOTICED * count:
            continue
        what = f"{hits / count:.0%} of {_named(heldout, domain)} is in the calibration text of {name}"
        if hits > LIMIT * count:
            raise DataError(
                f"{what}, at most {LIMIT:.0%} may be", "measure on text that was not calibrated on, or calibrate again"
            )
        if domain is not None:
            warnings.append(f"{what}: boilerplate, or the same documents?")
    return warnings


def _named(heldout: CalibrationSet, domain: str | None) -> str:
    if domain is None:
        return "the held-out text"
    sources = dict.fromkeys(str(record["name"]) for record in heldout.sources if record.get("domain") == domain)
    return f"the held-out domain {domain}" + f" ({', '.join(sources)})" * bool(sources)


def _mix(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # splitmix64's finaliser: spreads the polynomial's regularities, so that thinning by remainder is fair.
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
