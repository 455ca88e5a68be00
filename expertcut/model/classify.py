"""Checkpoint and family in; the role of every tensor out, each classified exactly once.

Invariant: `roles` has the same keys, in the same order, as the checkpoint's tensors. What is neither an expert's, nor
sliced, nor remapped, nor known to be whole, and still has an expert-sized axis inside a MoE block, stops the run; so
does an expert's tensor outside of every known block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from expertcut.checkpoint.types import Checkpoint, TensorInfo
from expertcut.errors import ConfigConflictError, UnknownTensorError
from expertcut.model.families import HIDDEN_KEYS, Family, resolve_family
from expertcut.model.geometry import WHOLE, ExpertTensor, Geometry, MoeBlock, Remapped, Role, Sliced, Twin
from expertcut.model.numbers import Numbers
from expertcut.model.places import LAYER, in_tower, is_mtp
from expertcut.model.uneven import KEY, LayerNumbers, layer_numbers, stock_config

_EXPERT = re.compile(r"(?<!shared_)experts\.\d+\.")
_MTP = re.compile(r"(^|\.)mtp(_layers|_block)?\.")


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
            name: None if in_tower(name) else LAYER.match(name) for name in checkpoint.tensors
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
        return is_mtp(name, self.layers), layer + self.layers * separate, base

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
