"""Full-size checkpoints out of nothing: a golden's real config, index and headers, in files whose data are holes.

`write` makes files as long as the published ones that take no room on the disk; every tensor reads as zeros. Tensors
lie in layer order in as many shards as the golden names, or in shards of 5 GB.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

from golden_names import Golden, Tensor, expand_name

from expertcut.checkpoint import DTYPE_BITS, build_header

SHARD = 5 * 10**9
"""Bytes per shard where the published number is not known."""


def write(golden: Golden, folder: Path, thin: bool = False) -> Path:
    """Write the golden's checkpoint into a folder, which is made; `thin` as in `Golden.expand`."""
    folder.mkdir(parents=True)
    tensors = sorted(golden.expand(thin), key=lambda tensor: _natural(tensor[0]))
    names = list(expand_name(golden.shards)) if golden.shards and not thin else _names(sum(map(nbytes, tensors)))
    weight_map: dict[str, str] = {}
    for name, group in zip(names, _spread(tensors, len(names)), strict=True):
        _shard(folder / name, sorted(group, key=lambda tensor: (-DTYPE_BITS[tensor[1]], tensor[0])))
        weight_map |= dict.fromkeys((tensor[0] for tensor in group), name)
    if len(names) > 1:
        index = {"metadata": {"total_size": sum(map(nbytes, tensors))}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(golden.config, indent=2))
    return folder


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor."""
    return prod(tensor[2]) * DTYPE_BITS[tensor[1]] // 8


def _names(total: int) -> list[str]:
    shards = math.ceil(total / SHARD)
    if shards == 1:
        return ["model.safetensors"]
    return [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]


def _spread(tensors: Sequence[Tensor], shards: int) -> Iterator[list[Tensor]]:
    """Yield as many groups of neighbours, about equally large and none empty."""
    total, done, start = sum(map(nbytes, tensors)), 0, 0
    for shard in range(1, shards + 1):
        end = start
        last = len(tensors) - (shards - shard)  # the others need one each
        while end < last and (end == start or done < total * shard // shards):
            done += nbytes(tensors[end])
            end += 1
        yield list(tensors[start:end])
        start = end


def _shard(path: Path, tensors: Sequence[Tensor]) -> None:
    sizes = [nbytes(tensor) for tensor in tensors]
    header = build_header(((*tensor, size) for tensor, size in zip(tensors, sizes, strict=True)), {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(sizes))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
