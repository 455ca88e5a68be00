"""A trained checkpoint in; its widened twin out: the same function, but experts N times as wide.

On a small model an engine spends its time beside the experts, so that its speed says nothing about fewer of them. The
twin's experts weigh what a large model's do, and answer as the small one: speed and quality are of one model. Gate and
up projections get zero rows and the down projection zero columns, so that every added unit is act(0)·0 = 0. Shared
experts whose width the config derives from `moe_intermediate_size` get theirs too.

Invariant: but for the padding and that number of the config, all bytes are the source's. Memory: one tensor.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

from expertcut.checkpoint import DTYPE_BITS, Checkpoint, TensorInfo, build_header, open_checkpoint, read_bytes
from expertcut.checkpoint.local import INDEX
from expertcut.choose import format_size
from expertcut.errors import CheckpointError, DestinationError, ExpertcutError, UsageError
from expertcut.measure.cost_model import ModelCost, model_cost
from expertcut.measure.cost_traffic import Load, tally
from expertcut.model import Geometry, read_geometry
from expertcut.model.geometry import Edit, ExpertTensor
from expertcut.rewrite.config import config_bytes, edit_config

WIDTH = "moe_intermediate_size"
AXIS = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}
"""The axis of the expert's width, by the part of an expert."""
SHARED = re.compile(r"\.shared_experts\.(?P<part>[a-z_.]+)$")
SHARD = 500_000_000
"""Bytes of tensor data per file."""
CLIENTS = (8, 32)


def widen(source: Checkpoint, geometry: Geometry, out: Path, factor: int, shard: int = SHARD) -> None:
    """Write the twin to the directory `out`, which must not exist.

    Raises:
        UsageError: a factor below 2.
        CheckpointError: experts that are not three plain matrices each, or a config without their width.
        DestinationError: `out` exists.
    """
    if factor < 2:
        raise UsageError(f"--factor {factor}: expected 2 or more")
    if out.exists():
        raise DestinationError(f"{out}: exists", "name a new directory")
    shapes = _shapes(source, geometry, factor)
    config = edit_config(source.config, [_edit(source, geometry, factor)])
    groups = list(_shards(source, shapes, shard))
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    names: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        _write(part / file, source, group, shapes)
        names |= dict.fromkeys((tensor.name for tensor in group), file)
    for companion in source.companions:
        (part / companion).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / companion, part / companion)
    total = sum(_nbytes(tensor, shapes) for tensor in source.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    (part / "config.json").write_bytes(config_bytes(config))
    (part / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    part.rename(out)


def routed_share(work: ModelCost) -> float:
    """Return the routed experts' share of the parameters that a token passes through."""
    routed = sum(float(moe.chosen.sum()) * moe.expert.parameters for moe in work.moe)
    return routed / (routed + work.dense.parameters + work.head.parameters)


def read_share(work: ModelCost, clients: int) -> float:
    """Return the routed experts' share of the weights that a decode step reads, if they are equally popular."""
    step = tally(work, Load(clients))
    experts = step.expert_nbytes[0].sum()
    return float(experts / (experts + step.dense_nbytes[0]))


def _shapes(source: Checkpoint, geometry: Geometry, factor: int) -> dict[str, tuple[int, ...]]:
    """The new shape of every tensor that grows."""
    found = {}
    for name, tensor in source.tensors.items():
        role, shared = geometry.roles[name], SHARED.search(name)
        if isinstance(role, ExpertTensor):
            found[name] = _grown(tensor, role.part, geometry.expert_width, factor)
        elif shared:
            found[name] = _grown(tensor, shared["part"], geometry.expert_width, factor)
    for block in geometry.blocks.values():
        if found.keys().isdisjoint(block.tensors):
            raise CheckpointError(f"{block.prefix}: its experts share tensors, expected one for each projection")
    return found


def _grown(tensor: TensorInfo, part: str, width: int, factor: int) -> tuple[int, ...]:
    axis = AXIS.get(part)
    if axis is None or len(tensor.shape) != 2 or tensor.shape[axis] % width or DTYPE_BITS[tensor.dtype] < 16:
        raise CheckpointError(
            f"{tensor.name}: {tensor.dtype} {list(tensor.shape)}, expected one of {', '.join(AXIS)}, "
            f"unquantised and {width} wide"
        )
    return tuple(size * (factor if at == axis else 1) for at, size in enumerate(tensor.shape))


def _edit(source: Checkpoint, geometry: Geometry, factor: int) -> Edit:
    path = (*geometry.family.root, WIDTH)
    scope = source.config
    for key in geometry.family.root:
        scope = scope[key]
    if scope.get(WIDTH) != geometry.expert_width:
        raise CheckpointError(
            f"{source.name}: config.json: {WIDTH} is {scope.get(WIDTH)}, expected the experts' {geometry.expert_width}"
        )
    return Edit(path, geometry.expert_width, factor * geometry.expert_width)


def _nbytes(tensor: TensorInfo, shapes: dict[str, tuple[int, ...]]) -> int:
    return prod(shapes.get(tensor.name, tensor.shape)) * DTYPE_BITS[tensor.dtype] // 8


def _shards(source: Checkpoint, shapes: dict[str, tuple[int, ...]], most: int) -> Iterator[list[TensorInfo]]:
    """Tensors in the source's order, in groups of at most so many bytes, or of one tensor."""
    group: list[TensorInfo] = []
    for tensor in source.tensors.values():
        if group and sum(_nbytes(t, shapes) for t in [*group, tensor]) > most:
            yield group
            group = []
        group.append(tensor)
    yield group


def _write(path: Path, source: Checkpoint, group: Sequence[TensorInfo], shapes: dict[str, tuple[int, ...]]) -> None:
    entries = ((t.name, t.dtype, shapes.get(t.name, t.shape), _nbytes(t, shapes)) for t in group)
    with path.open("wb") as file:
        file.write(build_header(entries, {"format": "pt"}))
        for tensor in group:
            raw = read_bytes(source, tensor.name)
            file.write(_padded(raw, tensor.shape, shapes[tensor.name]) if tensor.name in shapes else raw)


def _padded(raw: bytes, old: Sequence[int], new: Sequence[int]) -> bytes:
    """A matrix with zero bytes for the columns and rows that it lacks: they are zero in every dtype."""
    row = len(raw) // old[0]
    gap = bytes(row * (new[1] - old[1]) // old[1])
    wide = b"".join(raw[start : start + row] + gap for start in range(0, len(raw), row)) if gap else raw
    return wide + bytes((row + len(gap)) * (new[0] - old[0]))


def _told(folder: Path) -> str:
    checkpoint = open_checkpoint(folder)
    geometry = read_geometry(checkpoint)
    work = model_cost(checkpoint, geometry)
    read = ", ".join(f"{read_share(work, clients):.1%} at {clients}" for clients in CLIENTS)
    return (
        f"{folder.name}: {format_size(checkpoint.nbytes)}, experts {geometry.expert_width} wide; routed experts are "
        f"{routed_share(work):.1%} of the activated parameters, and of the weights that a decode step reads {read}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/widen", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint with a tensor for each projection")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new directory")
    parser.add_argument("--factor", type=int, required=True, help="how many times as wide its experts become")
    given = parser.parse_args()
    try:
        source = open_checkpoint(given.model)
        widen(source, read_geometry(source), given.out, given.factor)
    except ExpertcutError as error:
        sys.exit(f"error: {error}")
    print(_told(given.model), _told(given.out), sep="\n")


if __name__ == "__main__":
    main()
