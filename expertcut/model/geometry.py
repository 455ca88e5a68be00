"""Checkpoint and family in; the role of every tensor out, each classified exactly once.

Invariant: `roles` has the same keys, in the same order, as the checkpoint's tensors. What is neither an expert's, nor
sliced, nor known to be whole, and still has an expert-sized axis inside a MoE block, stops the run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from expertcut.checkpoint.types import Checkpoint, TensorInfo
from expertcut.errors import ConfigConflictError, UnknownTensorError
from expertcut.model.families import Family, resolve_family

_LAYER = re.compile(r"(?P<stack>(?:[^.]+\.)*?)layers\.(?P<layer>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True, slots=True)
class Whole:
    """Kept as it is."""


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """Belongs to one routed expert and is kept, renamed or dropped with it."""

    block: str
    expert: int
    part: str
    """What follows the expert's number, e.g. `up_proj.weight`."""


@dataclass(frozen=True, slots=True)
class Sliced:
    """Rows `[e*unit, (e+1)*unit)` along `axis` belong to expert e of the block."""

    block: str
    axis: int
    unit: int = 1


Role = Whole | ExpertTensor | Sliced
WHOLE = Whole()


@dataclass(frozen=True, slots=True)
class MoeBlock:
    """One MoE block of one decoder layer."""

    prefix: str
    """Module prefix on disk, e.g. `model.layers.3.mlp`; the key of plans and profiles."""
    layer: int
    """Absolute layer number; layers of a separate multi-token-prediction stack count on behind the trunk."""
    mtp: bool
    router: str
    """Name of the router's weight, shape (E, H)."""
    expert_prefix: str
    """What stands before an expert's number, e.g. `model.layers.3.mlp.experts.`."""
    tensors: tuple[str, ...]
    """All expert and sliced tensors, in checkpoint order."""


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

    @property
    def trunk(self) -> tuple[MoeBlock, ...]:
        """MoE blocks of the trunk, in layer order."""
        return tuple(b for b in self.blocks.values() if not b.mtp)

    @property
    def mtp(self) -> tuple[MoeBlock, ...]:
        """MoE blocks of multi-token-prediction layers."""
        return tuple(b for b in self.blocks.values() if b.mtp)

    def expert_nbytes(self, checkpoint: Checkpoint, prefix: str) -> int:
        """Bytes that dropping one expert of a block saves, its router row included (mean over the block's experts)."""
        return sum(checkpoint.tensors[n].nbytes for n in self.blocks[prefix].tensors) // self.num_experts

    def config_edits(self, config: Mapping[str, Any], experts: int, top_k: int) -> list[Edit]:
        """Return the values of the raw config that change, every alias that is present."""
        scope = _scope(config, self.family)
        wanted = dict.fromkeys(self.family.experts, experts) | dict.fromkeys(self.family.top_k, top_k)
        return [
            Edit((*self.family.root, key), scope[key], new)
            for key, new in wanted.items()
            if scope.get(key) is not None and scope[key] != new
        ]


def read_geometry(checkpoint: Checkpoint) -> Geometry:
    """Classify every tensor of a checkpoint.

    Raises:
        UnknownTensorError: no row for the model type, no routed experts, or an expert-sized tensor without a rule.
        ConfigConflictError: config and tensors disagree, or an expert is incomplete.
    """
    family = resolve_family(checkpoint.config)
    scope = _scope(checkpoint.config, family)
    experts, top_k = _agreed(scope, family.experts), _agreed(scope, family.top_k)
    if not 1 <= top_k <= experts:
        raise ConfigConflictError(f"config.json: {family.top_k[0]}={top_k} of {experts} experts")
    layers = _number(scope, "num_hidden_layers")
    roles, blocks = _classify(checkpoint, family, experts, layers)
    if not blocks:
        raise UnknownTensorError(
            f"{checkpoint.name}: no routed experts found where {family.model_type} keeps them "
            f"(layers.*.{family.block}.{family.expert}.*)"
        )
    n_group, topk_group = _groups(scope, family, experts)
    renormalise = (
        family.renormalise
        if isinstance(family.renormalise, bool)
        else bool(scope.get(family.renormalise, family.renormalise_default))
    )
    return Geometry(
        family, roles, blocks, experts, top_k, n_group, topk_group,
        _number(scope, "hidden_size"), _number(scope, family.width), layers, renormalise,
    )  # fmt: skip


def _classify(
    checkpoint: Checkpoint, family: Family, experts: int, layers: int
) -> tuple[dict[str, Role], dict[str, MoeBlock]]:
    roles: dict[str, Role] = {}
    members: dict[tuple[bool, int, str], list[str]] = {}
    inside = family.block + "."
    for tensor in checkpoint.tensors.values():
        match = _LAYER.match(tensor.name)
        role: Role = WHOLE
        if match and match["rest"].startswith(inside):
            stack, layer = match["stack"], int(match["layer"])
            prefix = f"{stack}layers.{layer}.{family.block}"
            role = _role(tensor, prefix, match["rest"][len(inside) :], family, experts)
            if role is not WHOLE:
                separate = "mtp" in stack
                mtp = separate or layer >= layers
                members.setdefault((mtp, layer + layers * separate, prefix), []).append(tensor.name)
        roles[tensor.name] = role
    blocks = {}
    for (mtp, layer, prefix), names in sorted(members.items()):
        blocks[prefix] = MoeBlock(
            prefix, layer, mtp, f"{prefix}.{family.router}.weight", f"{prefix}.{family.expert}.", tuple(names)
        )
        _check_block(blocks[prefix], roles, experts)
    return roles, blocks


def _role(tensor: TensorInfo, prefix: str, rest: str, family: Family, experts: int) -> Role:
    head, _, tail = rest.partition(family.expert + ".")
    number, _, part = tail.partition(".")
    if not head and number.isdecimal() and part:
        if int(number) >= experts:
            raise ConfigConflictError(f"{tensor.name}: expert {number}, but the config counts {experts} experts")
        return ExpertTensor(prefix, int(number), part)
    for pattern, axis in ((f"{family.router}.weight", 0), *family.sliced):
        if fnmatchcase(rest, pattern):
            if len(tensor.shape) <= axis or tensor.shape[axis] != experts:
                raise ConfigConflictError(
                    f"{tensor.name}: shape {list(tensor.shape)}, expected the config's {experts} experts on axis {axis}"
                )
            return Sliced(prefix, axis)
    if any(fnmatchcase(rest, pattern) for pattern in family.whole) or experts not in tensor.shape:
        return WHOLE
    raise UnknownTensorError(
        f"{tensor.name}: shape {list(tensor.shape)} has an axis as long as the {experts} experts "
        f"and no rule of family {family.model_type} explains it",
        "if it has one entry per expert, add it to the family's row; see CONTRIBUTING.md, 'Add a family'",
    )


def _check_block(block: MoeBlock, roles: Mapping[str, Role], experts: int) -> None:
    if block.router not in roles:
        raise ConfigConflictError(f"{block.router} is missing: block {block.prefix} has experts but no router")
    parts: dict[str, set[int]] = {}
    fused = False
    for name in block.tensors:
        role = roles[name]
        if isinstance(role, ExpertTensor):
            parts.setdefault(role.part, set()).add(role.expert)
        elif name.startswith(block.expert_prefix):
            fused = True
    for part, ids in parts.items():
        if len(ids) != experts:
            lost = min(set(range(experts)) - ids)
            raise ConfigConflictError(
                f"{block.expert_prefix}{lost}.{part} is missing: found {len(ids)} of {experts} experts"
            )
    if not parts and not fused:
        raise ConfigConflictError(f"block {block.prefix} has a router but no experts")


def _scope(config: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    scope: Any = config
    for key in family.root:
        scope = scope.get(key)
        if not isinstance(scope, dict):
            raise ConfigConflictError(f"config.json: {'.'.join(family.root)} is missing or not an object")
    return scope  # type: ignore[no-any-return]


def _number(scope: Mapping[str, Any], key: str) -> int:
    value = scope.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigConflictError(f"config.json: {key} is {value!r}, expected a positive integer")
    return value


def _agreed(scope: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    present = {key: _number(scope, key) for key in keys if scope.get(key) is not None}
    if not present:
        raise ConfigConflictError(f"config.json: none of {', '.join(keys)} is set")
    if len(set(present.values())) > 1:
        raise ConfigConflictError(
            "config.json: " + " but ".join(f"{key}={value}" for key, value in present.items()),
            "make the aliases agree with the tensors",
        )
    return next(iter(present.values()))


def _groups(scope: Mapping[str, Any], family: Family, experts: int) -> tuple[int, int]:
    n_group = scope.get("n_group") or 1
    if n_group == 1 or (family.grouped_if and scope.get(family.grouped_if[0]) != family.grouped_if[1]):
        return 1, 1
    topk_group = _number(scope, "topk_group")
    if experts % _number(scope, "n_group") or topk_group > n_group:
        raise ConfigConflictError(
            f"config.json: {experts} experts in n_group={n_group} groups of which topk_group={topk_group} are used"
        )
    return n_group, topk_group
