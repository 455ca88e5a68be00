"""Shard layout, byte copying, config edits, journal and verification. No torch, no transformers."""

from expertcut.rewrite.layout import MAX_SHARD_SIZE, Layout, plan_layout
from expertcut.rewrite.verify import Check, require, verify_bytes, verify_structure
from expertcut.rewrite.writer import Progress, PruneResult, prune

__all__ = [
    "MAX_SHARD_SIZE", "Check", "Layout", "Progress", "PruneResult", "plan_layout", "prune", "require", "verify_bytes",
    "verify_structure",
]  # fmt: skip
