"""Scores in, kept ids out. Protection is a constraint on the choice; no score is ever edited. Legend: E experts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from expertcut.errors import PlanError


def select_experts(
    scores_E: NDArray[np.float64], experts: int, *, n_group: int = 1, protected: Iterable[int] = (), layer: int
) -> tuple[int, ...]:
    """Return the ids of the `experts` best, equally many of each group, the protected ones first; ascending.

    Equal scores: the lower id is kept. `experts` is a multiple of `n_group`, and so is E.

    Raises:
        PlanError: a score is not finite, or a group protects more experts than it may keep.
    """
    bad = np.flatnonzero(~np.isfinite(scores_E))
    if bad.size:
        raise PlanError(
            f"layer {layer}: the score of expert {bad[0]} is {scores_E[bad[0]]}, expected a finite number",
            "profile again in float32, or use another --strategy",
        )
    assert experts % n_group == 0 and scores_E.size % n_group == 0
    must_E = np.zeros(scores_E.size, np.bool_)
    must_E[list(protected)] = True
    quota = experts // n_group
    _check_quota(must_E.reshape(n_group, -1).sum(axis=1), quota, n_group, layer)
    kept: list[int] = []
    for ids in np.arange(scores_E.size).reshape(n_group, -1):
        order = np.lexsort((ids, -scores_E[ids], ~must_E[ids]))  # the last key counts most
        kept.extend(sorted(ids[order[:quota]].tolist()))
    return tuple(kept)


def _check_quota(protected_per_group: NDArray[np.int_], quota: int, n_group: int, layer: int) -> None:
    group = int(protected_per_group.argmax())
    most = int(protected_per_group[group])
    if most > quota:
        where = f"layer {layer}" if n_group == 1 else f"layer {layer}, group {group} of {n_group}"
        raise PlanError(
            f"{where}: {most} experts are protected, but only {quota} are kept",
            f"keep at least {most * n_group} experts or protect fewer",
        )
