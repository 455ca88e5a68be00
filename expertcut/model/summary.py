"""What a checkpoint is, in numbers for people: sizes, parameters, dtypes. Headers and config only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from expertcut.checkpoint.types import Checkpoint
from expertcut.model.fingerprint import geometry_hash
from expertcut.model.geometry import ExpertTensor, Geometry, MoeBlock


@dataclass(frozen=True)
class Summary:
    """Facts about a checkpoint; sizes are bytes of tensor data."""

    family: str
    layers: int
    """Decoder layers of the trunk."""
    moe_layers: tuple[int, ...]
    """Absolute numbers of the trunk's layers with routed experts."""
    mtp_layers: tuple[int, ...]
    """Multi-token-prediction layers with routed experts."""
    experts: int
    """The most of any layer; `top_k` likewise."""
    top_k: int
    layer_experts: tuple[int, ...]
    """By layer of `moe_layers`: all alike, unless made so by expertcut."""
    layer_top_k: tuple[int, ...]
    n_group: int
    topk_group: int
    scoring: str
    renormalise: bool
    hidden: int
    expert_width: int
    positions: int | None
    """Longest sequence, from `max_position_embeddings`; None if the config does not say."""
    nbytes: int
    nbytes_experts: int
    """Bytes of routed experts, router rows included."""
    nbytes_per_expert: int
    """What dropping one expert in every layer saves."""
    parameters: int | None
    """Elements of all tensors; None if the weights are quantised, where elements are not parameters."""
    activated: int | None
    """Parameters without the routed experts that a token does not use; of text, where images have their own."""
    dtypes: dict[str, int]
    """dtype → bytes, largest first."""
    shards: int
    geometry: str
    """The geometry's hash."""


def summarise(checkpoint: Checkpoint, geometry: Geometry) -> Summary:
    """Gather the facts that a checkpoint's headers and config tell."""
    scope = checkpoint.config
    for key in geometry.family.root:
        scope = scope[key]
    sizes = {name: prod(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    routed = [name for block in geometry.blocks.values() for name in block.tensors]
    unused = sum(_unused(geometry, block, sizes) for block in geometry.blocks.values())
    plain = not (checkpoint.config.get("quantization_config") or scope.get("quantization_config"))
    dtypes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype] += tensor.nbytes
    return Summary(
        geometry.family.model_type, geometry.num_layers, tuple(b.layer for b in geometry.trunk),
        tuple(b.layer for b in geometry.mtp), geometry.num_experts, geometry.top_k,
        tuple(b.experts for b in geometry.trunk), tuple(b.top_k for b in geometry.trunk), geometry.n_group,
        geometry.topk_group, geometry.family.scoring, geometry.renormalise, geometry.hidden, geometry.expert_width,
        max_positions(checkpoint, geometry), checkpoint.nbytes,
        sum(checkpoint.tensors[name].nbytes for name in routed),
        checkpoint.nbytes - nbytes_with(checkpoint, geometry, geometry.num_experts - 1),
        sum(sizes.values()) if plain else None, sum(sizes.values()) - unused if plain else None,
        dict(dtypes.most_common()), len(checkpoint.shards), geometry_hash(geometry),
    )  # fmt: skip


def _unused(geometry: Geometry, block: MoeBlock, sizes: Mapping[str, int]) -> int:
    """Elements of a block's tensors that a token of text does not use."""
    second = sum(sizes[name] for name in block.tensors if is_second(geometry, block, name))
    first = sum(sizes[name] for name in block.tensors) - second
    return second + first * (block.experts - block.top_k) // block.experts


def is_second(geometry: Geometry, block: MoeBlock, name: str) -> bool:
    """Return whether a tensor is of an expert that text does not use."""
    role = geometry.roles[name]
    return geometry.family.sets > 1 and isinstance(role, ExpertTensor) and role.expert >= block.experts


def by_layer(numbers: Sequence[int]) -> str:
    """Return one number where all layers agree, else their range and mean, for reading."""
    least, most = min(numbers), max(numbers)
    mean = sum(numbers) / len(numbers)
    return str(most) if least == most else f"{least} to {most} by layer, {mean:.2f} on average"


def max_positions(checkpoint: Checkpoint, geometry: Geometry) -> int | None:
    """Return the longest sequence that the config allows, None if it does not say."""
    scope = checkpoint.config
    for key in geometry.family.root:
        scope = scope[key]
    found = scope.get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else None


def nbytes_with(checkpoint: Checkpoint, geometry: Geometry, experts: int | Mapping[int, int], mtp: bool = True) -> int:
    """Return the bytes of tensor data that are left with `experts` experts in every block, or with so many by layer.

    Without `mtp` all that belongs to multi-token prediction goes.
    """
    blocks = geometry.blocks.values() if mtp else geometry.trunk
    gone = 0 if mtp else sum(checkpoint.tensors[name].nbytes for name in geometry.mtp_tensors)
    for block in blocks:
        left = experts if isinstance(experts, int) else experts[block.layer]
        gone += (geometry.num_experts - left) * geometry.expert_nbytes(checkpoint, block.prefix)
    return checkpoint.nbytes - gone
