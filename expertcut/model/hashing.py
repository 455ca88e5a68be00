"""Tables that route by token id: a dropped expert's tokens go to the kept experts that are most like it.

Such a layer has no scores to choose by, and the config knows one expert count, so that the layer cannot keep all of its
experts. The tables spread tokens evenly at random: which experts are used together says nothing about their likeness.
What a layer does know of its experts is the router, whose rows weigh them; so the nearest kept expert is the one with
the largest cosine between the rows. Within a token's row no expert is used twice.

Shapes: V vocabulary, K experts per token, E experts, N kept experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expertcut.checkpoint.types import TensorInfo
from expertcut.errors import CheckpointError

_ROWS = 8192


@dataclass(frozen=True, slots=True)
class StandIns:
    """Who takes over from whom in one layer."""

    kept: tuple[int, ...]
    """Original ids, ascending."""
    order: tuple[tuple[int, ...], ...]
    """For every original expert, the new numbers of the kept ones, most like it first."""


def table_of_ids(raw: bytes | bytearray, info: TensorInfo) -> npt.NDArray[Any]:
    """A stored table (V, K) of expert ids, from its bytes."""
    kind, bits = info.dtype[0].lower(), int(info.dtype[1:])
    return np.frombuffer(raw, f"<{kind}{bits // 8}").reshape(info.shape)


def stand_ins(router_EH: npt.NDArray[Any], kept: Sequence[int]) -> StandIns:
    """Rank the kept experts by likeness to every original one: the cosine between router rows."""
    rows = router_EH.astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    order = np.argsort(-(rows @ rows[list(kept)].T), axis=1, kind="stable")
    return StandIns(tuple(kept), tuple(tuple(map(int, row)) for row in order))


def remap(table_VK: npt.NDArray[Any], who: StandIns, top_k: int) -> npt.NDArray[Any]:
    """Return the table (V, top_k) of new numbers, in the table's own integer type; the last columns go first.

    Raises:
        CheckpointError: the table holds an id that is no expert's.
    """
    experts, table_VK = len(who.order), table_VK[:, :top_k]
    if table_VK.size and not 0 <= int(table_VK.min()) <= int(table_VK.max()) < experts:
        raise CheckpointError(f"a table of expert ids holds {table_VK.min()} to {table_VK.max()}, of {experts} experts")
    new_E = np.full(experts, -1)
    new_E[list(who.kept)] = np.arange(len(who.kept))
    out = np.empty_like(table_VK)
    for start in range(0, len(table_VK), _ROWS):
        out[start : start + _ROWS] = _remap_rows(table_VK[start : start + _ROWS], new_E, np.array(who.order))
    return out


def _remap_rows(
    table_RK: npt.NDArray[Any], new_E: npt.NDArray[Any], order_EN: npt.NDArray[Any]
) -> npt.NDArray[Any]:  # fmt: skip
    """Kept experts stay; then every dropped one, from left to right, takes the likest that its row does not use yet."""
    new: npt.NDArray[Any] = new_E[table_RK]
    used = np.zeros((len(new), order_EN.shape[1]), bool)
    rows, columns = np.nonzero(new >= 0)
    used[rows, new[rows, columns]] = True
    for column in range(new.shape[1]):
        rows = np.nonzero(new[:, column] < 0)[0]
        wishes = order_EN[table_RK[rows, column]]
        free = ~np.take_along_axis(used[rows], wishes, axis=1)
        chosen = np.take_along_axis(wishes, free.argmax(axis=1)[:, None], axis=1)[:, 0]
        new[rows, column], used[rows, chosen] = chosen, True
    return new
