"""What is known of a checkpoint's experts: the role of every tensor, the MoE blocks, and the config's keys for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertcut.checkpoint.types import Checkpoint
from expertcut.model.families import MTP_KEYS, MTP_SCOPE, Family, dig
from expertcut.model.places import LAYER, is_mtp


@dataclass(frozen=True, slots=True)
class Whole:
    """Kept as it is."""


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """Belongs to one routed expert and is kept, renamed or dropped with it; always kept if in the tail."""

    block: str
    expert: int
    """Number on disk; those of the tail, or of the second set of experts, are the expert count and up."""
    part: str
    """What follows the expert's number, e.g. `up_proj.weight`."""


@dataclass(frozen=True, slots=True)
class Sliced:
    """Rows `[e*unit, (e+1)*unit)` along `axis` belong to expert e of the block."""

    block: str
    axis: int
    unit: int = 1
    tail: int = 0
    """Rows behind those of the experts, always kept; only with unit 1."""
    sets: int = 1
    """2: the axis before has a row for each of the block's two sets of experts, which keep different ones."""


@dataclass(frozen=True, slots=True)
class Remapped:
    """An integer table (vocabulary, k) of expert ids: its values change, its shape does not."""

    block: str


Role = Whole | ExpertTensor | Sliced | Remapped
WHOLE = Whole()


@dataclass(frozen=True, slots=True)
class Twin:
    """A block's second set of experts, as many as the first; text does not use it, so no profile knows it."""

    prefix: str
    """The key of plans, e.g. `model.layers.3.mlp.vision_moe`."""
    router: str
    """Name of its router's weight."""


@dataclass(frozen=True, slots=True)
class MoeBlock:
    """One MoE block of one decoder layer."""

    prefix: str
    """Module prefix on disk, e.g. `model.layers.3.mlp`; the key of plans and profiles."""
    layer: int
    """Absolute layer number; layers of a separate multi-token-prediction stack count on behind the trunk."""
    mtp: bool
    router: str
    """Name of the router's weight, shape (E + tail, H), transposed if the family says so."""
    expert_prefix: str
    """What stands before an expert's number, e.g. `model.layers.3.mlp.experts.`."""
    tensors: tuple[str, ...]
    """All expert, sliced and remapped tensors, in checkpoint order; those of the twin included."""
    experts: int
    """Routed experts of each set."""
    top_k: int
    """Experts activated per token."""
    twin: Twin | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The prefixes under which plans keep the block's sets of experts."""
        return (self.prefix, self.twin.prefix) if self.twin else (self.prefix,)


@dataclass(frozen=True, slots=True)
class Edit:
    """One value of `config.json` to replace."""

    path: tuple[str, ...]
    old: Any
    new: Any


@dataclass(frozen=True)
class Geometry:
    """What expertcut knows about a checkpoint's experts."""

    family: Family
    roles: Mapping[str, Role]
    blocks: Mapping[str, MoeBlock]
    """By prefix: the trunk in layer order, then multi-token-prediction blocks."""
    num_experts: int
    """Of every block, unless the layers are uneven: then the largest number; `top_k` likewise."""
    top_k: int
    n_group: int
    """Expert groups that the router chooses among; 1 if it does not."""
    topk_group: int
    """Groups that a token may use."""
    hidden: int
    expert_width: int
    num_layers: int
    """Decoder layers of the trunk, dense ones included."""
    renormalise: bool
    tail: int = 0
    """Rows of the router behind those of the experts: zero experts, shared experts, a skip class. They always stay."""

    @property
    def uneven(self) -> bool:
        """True if the layers differ in expert count or top-k, which only models made by expertcut do."""
        return any((b.experts, b.top_k) != (self.num_experts, self.top_k) for b in self.blocks.values())

    @property
    def trunk(self) -> tuple[MoeBlock, ...]:
        """MoE blocks of the trunk, in layer order."""
        return tuple(b for b in self.blocks.values() if not b.mtp)

    @property
    def mtp(self) -> tuple[MoeBlock, ...]:
        """MoE blocks of multi-token-prediction layers."""
        return tuple(b for b in self.blocks.values() if b.mtp)

    @property
    def mtp_tensors(self) -> tuple[str, ...]:
        """Every tensor of multi-token-prediction layers and what belongs to them, in checkpoint order."""
        stacks = {place["stack"] for block in self.trunk if (place := LAYER.match(block.router))}
        return tuple(name for name in self.roles if is_mtp(name, self.num_layers, stacks))

    @property
    def keys(self) -> Mapping[str, MoeBlock]:
        """The block of every set of experts, by the prefix under which plans keep it, in the order of `blocks`."""
        return {key: block for block in self.blocks.values() for key in block.keys}

    def ids_on_disk(self, block: MoeBlock, kept: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
        """Return a block's kept experts by their numbers on disk, in the order of their new ones: set behind set.

        `kept` holds the kept ids of every set of experts, by its key.
        """
        return tuple(place * self.num_experts + e for place, key in enumerate(block.keys) for e in kept[key])

    def expert_nbytes(self, checkpoint: Checkpoint, prefix: str) -> int:
        """Bytes that dropping one expert of a block saves, its router row included (mean over the block's experts).

        With a twin: one of either set.
        """
        total, experts = 0, self.blocks[prefix].experts
        for name in self.blocks[prefix].tensors:
            role, nbytes = self.roles[name], checkpoint.tensors[name].nbytes
            if isinstance(role, Sliced):
                total += nbytes * experts // (experts + role.tail)
            elif isinstance(role, ExpertTensor) and role.expert < experts * self.family.sets:
                total += nbytes
        return total // experts

    def config_edits(self, config: Mapping[str, Any], experts: int, top_k: int) -> list[Edit]:
        """Return the values of the raw config that change, every alias that is present; lists in all entries."""
        wanted = dict.fromkeys(self.family.experts, (self.num_experts, experts))
        wanted |= dict.fromkeys(self.family.top_k, (self.top_k, top_k))
        return [
            Edit((*path, key), found, edited)
            for path in dict.fromkeys((self.family.root, ()))
            for key, (old, new) in wanted.items()
            if (found := (dig(config, path) or {}).get(key)) is not None
            and (edited := _edited(found, old, new)) != found
        ]

    def mtp_edits(self, config: Mapping[str, Any]) -> list[Edit]:
        """Return the values of the raw config that change when multi-token-prediction layers go: to 0, false, empty."""
        roots = dict.fromkeys((self.family.root, ()))
        return [
            Edit((*path, key), found, type(found)())
            for root in roots
            for path in (root, (*root, MTP_SCOPE))
            for key in MTP_KEYS
            if isinstance(found := (dig(config, path) or {}).get(key), int | str | list) and found
        ]


def _edited(found: Any, old: int, new: int) -> Any:
    if isinstance(found, list):
        return [_edited(entry, old, new) for entry in found]
    return new if found == old and not isinstance(found, bool) else found
