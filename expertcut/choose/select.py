"""What a criterion found in, kept ids out. Protection is a constraint on the choice; no score is ever edited.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from expertcut.choose.criteria import Found
from expertcut.choose.subset import least_loss
from expertcut.choose.trials import least_tried
from expertcut.errors import PlanError


def select_experts(
    found: Found, experts: int, *, n_group: int = 1, protected: Iterable[int] = (), layer: int
) -> tuple[int, ...]:
    """Return the ids of the `experts` to keep, equally many of each group, the protected ones among them; ascending.

    `found` is (E,) scores: the highest are kept, of equal ones the lower id. Or (E, E), the losses of dropping two
    experts together: the set goes whose pairs, the diagonal included, lose least. Or what tells the losses of whole
    sets. `experts` is a multiple of `n_group`, and so is E.

    Raises:
        PlanError: a number is not finite, or a group protects more experts than it may keep.
    """
    size = len(found)
    assert experts % n_group == 0 and size % n_group == 0
    if isinstance(found, np.ndarray):
        _check_finite(found, layer)
    must_E = np.zeros(size, np.bool_)
    must_E[list(protected)] = True
    quota = experts // n_group
    _check_quota(must_E.reshape(n_group, -1).sum(axis=1), quota, n_group, layer)
    if not isinstance(found, np.ndarray):
        goes_E = least_tried(found, size // n_group - quota, ~must_E, n_group)
        return tuple(np.flatnonzero(~goes_E).tolist())
    if found.ndim == 2:
        goes_E = least_loss(found, size // n_group - quota, ~must_E, n_group)
        return tuple(np.flatnonzero(~goes_E).tolist())
    kept: list[int] = []
    for ids in np.arange(size).reshape(n_group, -1):
        order = np.lexsort((ids, -found[ids], ~must_E[ids]))  # the last key counts most
        kept.extend(sorted(ids[order[:quota]].tolist()))
    return tuple(kept)


def _check_finite(found: NDArray[np.float64], layer: int) -> None:
    bad = np.argwhere(~np.isfinite(found)).tolist()
    if bad:
        what = "the score of expert" if found.ndim == 1 else "the loss of experts"
        raise PlanError(
            f"layer {layer}: {what} {', '.join(map(str, bad[0]))} is {found[tuple(bad[0])]}, expected a finite number",
            "profile again in float32, or use another --strategy",
        )


def _check_quota(protected_per_group: NDArray[np.int_], quota: int, n_group: int, layer: int) -> None:
    group = int(protected_per_group.argmax())
    most = int(protected_per_group[group])
    if most > quota:
        where = f"layer {layer}" if n_group == 1 else f"layer {layer}, group {group} of {n_group}"
        raise PlanError(
            f"{where}: {most} experts are protected, but only {quota} are kept",
            f"keep at least {most * n_group} experts or protect fewer",
        )
