"""Do two sets of sequences share text? Hashes of token 32-grams, thinned by their own value, tell cheaply.

Which hashes are kept depends on the text alone, so any two sketches made with the same tokenizer can be compared: a
shared passage of a few hundred tokens is found wherever it stands. A sketch of a million tokens is some 500 kB.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from expertcut.calibrate.tokenizer import Ids

NGRAM = 32
EVERY = 16
_BASE = 0x9E3779B97F4A7C15


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


def overlap(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """Return the fraction (0–1) of b's 32-grams that occur in a; both from `sequence_hashes` with one `every`."""
    if not len(b):
        return 0.0
    return float(np.isin(b, a, assume_unique=True).mean())


def _mix(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # splitmix64's finaliser: spreads the polynomial's regularities, so that thinning by remainder is fair.
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
