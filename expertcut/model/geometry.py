"""Checkpoint and family in; the role of every tensor out, each classified exactly once.

Invariant: `roles` has the same keys, in the same order, as the checkpoint's tensors. What is neither an expert's, nor
sliced, nor remapped, nor known to be whole, and still has an expert-sized axis inside a MoE block, stops the run; so
does an expert's tensor outside of every known block.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from expertcut.checkpoint.types import Checkpoint, TensorInfo
from expertcut.errors import ConfigConflictError, UnknownTensorError
from expertcut.model.families import HIDDEN_KEYS, MTP_KEYS, MTP_SCOPE, TOWERS, Family, dig, resolve_family
from expertcut.model.numbers import Numbers
from expertcut.model.uneven import KEY, LayerNumbers, layer_numbers, stock_config

_LAYER = re.compile(
    r"(?P<stack>(?:[^.]+\.)*?)(?P<list>layers|blocks|mtp|mtp_layers|mtp_block)\.(?P<layer>\d+)\.(?P<rest>.+)"
)
_EXPERT = re.compile(r"(?<!shared_)experts\.\d+\.")
_MTP = re.compile(r"(^|\.)mtp(_layers|_block)?\.")


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
        stacks = {place["stack"] for block in self.trunk if (place := _LAYER.match(block.router))}
        return tuple(name for name in self.roles if _is_mtp(name, self.num_layers, stacks))

    @property
    def keys(self) -> Mapping[str, MoeBlock]:
        """The block of every set of experts, by the prefix under which plans keep it, in the order of `blocks`."""
        return {key: block for block in self.blocks.values() for key in block.keys}

    def numbers(self, block: MoeBlock, kept: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
        """Return a block's kept experts by their numbers on disk, in the order of their new ones: set behind set.

        `kept` holds the kept ids of every set of experts, by its key.
        """
        return tuple(place * self.num_experts + e for place, key in enumerate(block.keys) for e in kept[key])

    def expert_nbytes(self, checkpoint: Checkpoint, prefix: str) -> int:
        """Bytes that dropping one expert of a block saves, its router row included (mean over the block's experts).

        With a twin: one of either set.
        """
        total = 0
        for name in self.blocks[prefix].tensors:
            role, nbytes = self.roles[name], checkpoint.tensors[name].nbytes
            if isinstance(role, Sliced):
                total += nbytes * self.num_experts // (self.num_experts + role.tail)
            elif isinstance(role, ExpertTensor) and role.expert < self.num_experts * self.family.sets:
                total += nbytes
        return total // self.num_experts

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


def read_geometry(checkpoint: Checkpoint) -> Geometry:
    """Classify every tensor of a checkpoint.

    Raises:
        UnknownTensorError: no row for the model type, no routed experts, or an expert-sized tensor without a rule.
        ConfigConflictError: config and tensors disagree, or an expert is incomplete.
    """
    config = stock_config(checkpoint.config)
    family = resolve_family(config)
    numbers = Numbers(config, family)
    experts, top_k = numbers.agreed(family.experts), numbers.agreed(family.top_k)
    own = layer_numbers(checkpoint.config)
    if not 1 <= top_k <= experts:
        raise ConfigConflictError(f"config.json: {family.top_k[0]}={top_k} of {experts} experts")
    tail = family.tail if isinstance(family.tail, int) else int(numbers.scope.get(family.tail) or 0)
    layers = numbers.layers()
    roles, blocks = _Classifier(checkpoint, family, experts, top_k, own, tail, layers).run()
    if not blocks:
        where = ".".join(part for part in ("layers.*", family.block, family.expert, "*") if part)
        raise UnknownTensorError(
            f"{checkpoint.name}: no routed experts found where {family.model_type} keeps them ({where})"
        )
    n_group, topk_group = numbers.groups(family, experts)
    renormalise = (
        family.renormalise
        if isinstance(family.renormalise, bool)
        else bool(numbers.scope.get(family.renormalise, family.renormalise_default))
    )
    return Geometry(
        family, roles, blocks, experts, top_k, n_group, topk_group,
        numbers.first(HIDDEN_KEYS), numbers.first(family.width, per_set=family.sets > 1), layers, renormalise, tail,
    )  # fmt: skip


class _Classifier:
    """Gives every tensor of a checkpoint its role. Only a layer with a router holds a MoE block."""

    def __init__(
        self, checkpoint: Checkpoint, family: Family, experts: int, top_k: int, own: LayerNumbers | None, tail: int,
        layers: int,
    ) -> None:  # fmt: skip
        self.checkpoint, self.family, self.tail, self.layers = checkpoint, family, tail, layers
        self.experts, self.top_k, self.own = experts, top_k, own
        self.router = f"{family.router}.weight"
        self.inside = f"{family.block}." if family.block else ""
        self.places: dict[str, re.Match[str] | None] = {
            name: None if in_tower(name) else _LAYER.match(name) for name in checkpoint.tensors
        }
        leaf = self.inside + self.router
        self.bases = {
            name[: place.start("rest")] for name, place in self.places.items() if place and place["rest"] == leaf
        }  # fmt: skip

    def run(self) -> tuple[dict[str, Role], dict[str, MoeBlock]]:
        """Return roles in checkpoint order and blocks in layer order."""
        roles: dict[str, Role] = {}
        members: dict[tuple[bool, int, str], list[str]] = {}
        for tensor in self.checkpoint.tensors.values():
            place = self.places[tensor.name]
            role: Role = WHOLE
            if place and place["rest"].startswith(self.inside):
                base, rest = tensor.name[: place.start("rest")], place["rest"][len(self.inside) :]
                order = self._order(tensor.name, place, base)
                if base in self.bases:
                    experts, _ = self._numbers(order[1])
                    role = self._role(tensor, (base + self.inside).rstrip("."), rest, experts)
                elif self._is_routed(rest):
                    raise ConfigConflictError(
                        f"{base}{self.inside}{self.router} is missing: {tensor.name} is an expert's, but has no router"
                    )
                if role is not WHOLE:
                    members.setdefault(order, []).append(tensor.name)
            if role is WHOLE and not in_tower(tensor.name) and _EXPERT.search(tensor.name):
                raise UnknownTensorError(
                    f"{tensor.name}: looks like an expert's, but lies in no place where "
                    f"{self.family.model_type} keeps experts",
                    "see CONTRIBUTING.md, 'Add a family'",
                )
            roles[tensor.name] = role
        blocks = {}
        for (mtp, layer, base), names in sorted(members.items()):
            inside = base + self.inside
            prefix, expert = inside.rstrip("."), f"{self.family.expert}." if self.family.expert else ""
            blocks[prefix] = MoeBlock(
                prefix, layer, mtp, inside + self.router, inside + expert, tuple(names), *self._numbers(layer),
                self._twin(prefix, inside),
            )  # fmt: skip
            self._check_block(blocks[prefix], roles)
        return roles, blocks

    def _twin(self, prefix: str, inside: str) -> Twin | None:
        if self.family.twin is None:
            return None
        name, router = self.family.twin
        if inside + router not in self.checkpoint.tensors:
            raise ConfigConflictError(f"{inside}{router} is missing: {prefix} has one router only, expected two")
        return Twin(f"{prefix}.{name}", inside + router)

    def _numbers(self, layer: int) -> tuple[int, int]:
        """Expert count and top-k of a layer."""
        if self.own is None:
            return self.experts, self.top_k
        if layer not in self.own.experts or layer not in self.own.top_k:
            raise ConfigConflictError(f"config.json: {KEY} has no numbers for layer {layer}, which has routed experts")
        return self.own.experts[layer], self.own.top_k[layer]

    def _order(self, name: str, place: re.Match[str], base: str) -> tuple[bool, int, str]:
        layer, separate = int(place["layer"]), _MTP.search(base) is not None
        return _is_mtp(name, self.layers), layer + self.layers * separate, base

    def _is_routed(self, rest: str) -> bool:
        """True for a tensor that only a MoE block holds."""
        family = self.family
        numbered = bool(family.expert) and re.match(rf"{re.escape(family.expert)}\.\d+\.", rest) is not None
        patterns = (*(pattern for pattern, _ in family.sliced), *family.flattened)
        return numbered or any(fnmatchcase(rest, pattern) for pattern in patterns)

    def _role(self, tensor: TensorInfo, prefix: str, rest: str, experts: int) -> Role:
        family = self.family
        head, _, below = rest.partition(f"{family.expert}.") if family.expert else (rest, "", "")
        number, _, part = below.partition(".")
        if not head and number.isdecimal() and part:
            if int(number) >= experts * family.sets + self.tail:
                raise ConfigConflictError(f"{tensor.name}: expert {number}, but the config counts {experts} experts")
            return ExpertTensor(prefix, int(number), part)
        for pattern, axis in ((self.router, family.router_axis), *family.sliced):
            if fnmatchcase(rest, pattern):
                return self._sliced(tensor, prefix, axis, experts)
        if family.twin and rest == family.twin[1]:
            return self._sliced(tensor, f"{prefix}.{family.twin[0]}", family.router_axis, experts)
        if family.twin and rest == family.correction_bias:
            if tensor.shape != (family.sets, experts):
                expected = [family.sets, experts]
                raise ConfigConflictError(f"{tensor.name}: shape {list(tensor.shape)}, expected {expected}")
            return Sliced(prefix, 1, sets=family.sets)
        if any(fnmatchcase(rest, pattern) for pattern in family.flattened):
            if not tensor.shape or tensor.shape[0] % experts:
                raise ConfigConflictError(
                    f"{tensor.name}: shape {list(tensor.shape)}, expected a multiple of {experts} experts on axis 0"
                )
            return Sliced(prefix, 0, tensor.shape[0] // experts)
        if family.hash_table and fnmatchcase(rest, family.hash_table):
            return Remapped(prefix)
        whole = any(fnmatchcase(rest, pattern) for pattern in family.whole)
        if whole or not {experts, experts + self.tail} & {*tensor.shape}:
            return WHOLE
        raise UnknownTensorError(
            f"{tensor.name}: shape {list(tensor.shape)} has an axis as long as the {experts} experts "
            f"and no rule of family {family.model_type} explains it",
            "if it has one entry per expert, add it to the family's row; see CONTRIBUTING.md, 'Add a family'",
        )

    def _sliced(self, tensor: TensorInfo, prefix: str, axis: int, experts: int) -> Sliced:
        length = tensor.shape[axis] if axis < len(tensor.shape) else -1
        if length not in (experts, experts + self.tail):
            raise ConfigConflictError(
                f"{tensor.name}: shape {list(tensor.shape)}, expected the config's {experts} experts on axis {axis}"
            )
        return Sliced(prefix, axis, tail=length - experts)

    def _check_block(self, block: MoeBlock, roles: Mapping[str, Role]) -> None:
        parts: dict[str, set[int]] = {}
        fused, everything = False, set(range(block.experts * self.family.sets))
        for name in block.tensors:
            role = roles[name]
            if isinstance(role, ExpertTensor) and role.expert in everything:
                parts.setdefault(role.part, set()).add(role.expert)
            elif isinstance(role, Sliced):
                fused |= role.unit > 1 or len(self.checkpoint.tensors[name].shape) > 2
        for part, ids in parts.items():
            if ids != everything:
                raise ConfigConflictError(
                    f"{block.expert_prefix}{min(everything - ids)}.{part} is missing: "
                    f"found {len(ids)} of {len(everything)} experts"
                )
        if not parts and not fused:
            raise ConfigConflictError(f"block {block.prefix} has a router but no experts")


def _edited(found: Any, old: int, new: int) -> Any:
    if isinstance(found, list):
        return [_edited(entry, old, new) for entry in found]
    return new if found == old and not isinstance(found, bool) else found


def in_tower(name: str) -> bool:
    """True if a tensor or module belongs to a part that is no language model."""
    return any(map(_is_tower, name.split(".", 3)[:3]))


@lru_cache(maxsize=1024)  # names are many, their first parts few
def _is_tower(part: str) -> bool:
    return any(fnmatchcase(part, tower) for tower in TOWERS)


def _is_mtp(name: str, layers: int, stacks: Collection[str] | None = None) -> bool:
    """True if a tensor belongs to multi-token prediction: a stack of its own, or layers behind the last of `stacks`."""
    if in_tower(name):
        return False
    if any(part == "mtp" or part.startswith("mtp_") for part in name.split(".")[:3]):
        return True
    place = _LAYER.match(name)
    if place is None or int(place["layer"]) < layers:
        return False
    return stacks is None or place["stack"] in stacks
