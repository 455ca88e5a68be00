"""Empty pictures for what measuring found; matplotlib comes with the extra `report`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expertcut.errors import RuntimeLintError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float = 8, columns: int = 1) -> tuple[Figure, list[Any]]:
    """Return an empty picture so many inches wide, and its diagrams from left to right.

    Raises:
        RuntimeLintError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeLintError("a picture needs matplotlib", "pip install 'expertcut[report]'") from error
    figure = Figure(figsize=(width, 5), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])
