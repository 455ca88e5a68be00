"""What tells the cost of dropping a set of experts in, the set that goes out. numpy only. Legend: E experts, S sets.

As many go from every group of the router, in every set that is tried. Invariant: the same costs give the same set.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expertcut.choose.criteria import SetLosses
from expertcut.choose.subset import Mask, count_sets, every_set

MAX_TRIED = 5_000
"""Up to so many sets all are tried."""


def least_tried(losses: SetLosses, drop: int, may_go_E: Mask, n_group: int = 1) -> Mask:
    """Return which experts go, (E,): `drop` of every group, all of them from `may_go_E`, at the least loss.

    Exact where at most `MAX_TRIED` sets come into question. Else greedy: in every round one more of each group goes,
    the one that costs least beside those already gone. Of equal losses the higher ids go.
    """
    size = may_go_E.size
    groups = [ids[may_go_E[ids]][::-1] for ids in np.arange(size).reshape(n_group, -1)]  # the first of equals goes
    if count_sets(groups, drop) <= MAX_TRIED:
        sets_SE = every_set(groups, drop, size)
        best: Mask = sets_SE[losses(sets_SE).argmin()]
        return best
    gone_E = np.zeros(size, np.bool_)
    for _ in range(drop):
        gone_E = _one_more_each(losses, gone_E, groups)
    return gone_E


def _one_more_each(losses: SetLosses, gone_E: Mask, groups: list[NDArray[np.intp]]) -> Mask:
    """Group by group; routers want equal groups, so in those whose turn comes later the highest id is out meanwhile."""
    left = [ids[~gone_E[ids]] for ids in groups]
    goes = [int(ids[0]) for ids in left]
    for group, ids in enumerate(left):
        tried_SE = np.repeat(gone_E[None], ids.size, axis=0)
        tried_SE[:, goes[:group] + goes[group + 1 :]] = True
        tried_SE[np.arange(ids.size), ids] = True
        goes[group] = int(ids[losses(tried_SE).argmin()])
    gone_E = gone_E.copy()
    gone_E[goes] = True
    return gone_E
