"""An opened checkpoint in; what is valid in its shards, but not as runtimes expect it, out, one line each."""

from __future__ import annotations

from collections.abc import Iterator

from expertcut.checkpoint import DTYPE_BITS, Checkpoint


def unfit_shards(ckpt: Checkpoint) -> Iterator[str]:
    """Yield shards whose header does not say that they are PyTorch's, and tensors that cannot be mapped in place."""
    for shard in ckpt.shards:
        if ckpt.metadata.get(shard, {}).get("format") != "pt":
            yield f'{ckpt.path / shard}: header metadata lacks "format": "pt"'
    for tensor in ckpt.tensors.values():
        if tensor.start % max(1, DTYPE_BITS[tensor.dtype] // 8):
            yield f"{ckpt.path / tensor.shard}: tensor {tensor.name} is not aligned to its {tensor.dtype} elements"
