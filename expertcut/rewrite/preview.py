"""What a rewrite would write, without writing: every file and its bytes. Refuses what the rewrite would refuse."""

from __future__ import annotations

from pathlib import Path

from expertcut.checkpoint import Checkpoint
from expertcut.choose.plan import Plan
from expertcut.model import Geometry
from expertcut.rewrite.destination import check_replaceable, check_space
from expertcut.rewrite.layout import MAX_SHARD_SIZE, Layout
from expertcut.rewrite.writer import prepare


def preview(
    ckpt: Checkpoint,
    geometry: Geometry,
    plan: Plan,
    out: str | Path,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    force: bool = False,
) -> tuple[Layout, dict[str, int]]:
    """Return the layout, and the name and bytes of every file that `prune` with the same arguments would write.

    Raises:
        PlanError, CheckpointError, DestinationError: as `prune` would, before its first byte.
    """
    job = prepare(ckpt, geometry, plan, out, max_shard_size)
    check_replaceable(job.target, force)
    check_space(job.target, job.needed)
    return job.layout, job.files
