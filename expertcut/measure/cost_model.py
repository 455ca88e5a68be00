"""What a model asks of a machine, from headers alone: a checkpoint, a plan and a profile in, a `ModelCost` out.

Invariant: without a plan, `ModelCost.nbytes` is what an engine loads: all tensors but multi-token prediction's. Every
tensor of the trunk is counted once: as a routed expert's, or as read by every step, or as an embedding or a tower,
which a step of text does not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import numpy as np

from expertcut.calibrate.profile import Profile
from expertcut.checkpoint.quantised import quantization_config
from expertcut.checkpoint.types import Checkpoint, TensorInfo
from expertcut.choose.plan import Plan, kept_by_block, numbers
from expertcut.errors import ProfileError
from expertcut.measure.cost_attention import Attention, read_attention
from expertcut.model import Geometry
from expertcut.model.geometry import ExpertTensor, MoeBlock, Sliced
from expertcut.model.places import LAYER, in_tower

_PACKED = ("I32", "U32", "I64", "U64", "U8")
"""dtypes that hold several parameters in an element; I8 does in some formats."""
_RARE = 1e-9
"""Popularity of an expert that no token of the profile chose: it is still there to be chosen when others go."""


class Weights(NamedTuple):
    """Bytes on disk and parameters computed with; scales are bytes only."""

    nbytes: float
    parameters: float

    def plus(self, other: Weights, times: float = 1) -> Weights:
        """Return this and `times` the other."""
        return Weights(self.nbytes + times * other.nbytes, self.parameters + times * other.parameters)


@dataclass(frozen=True, eq=False)
class MoeCost:
    """The routed experts of one layer."""

    chosen: np.ndarray
    """(E,) the probability that a token uses each expert; adds up to the top-k."""
    popular: np.ndarray
    """(K, E) with a top-k of 1 to K, in proportion: how many tokens use each expert; one row if k does not matter."""
    expert: Weights
    """One routed expert, of those that text uses."""
    row: Weights
    """One row of the router, read by every step."""
    nbytes: float
    """What dropping one expert saves in memory: its row, and its twin's where there is one."""

    def narrowed(self, experts: int | None = None, top_k: float | None = None) -> MoeCost:
        """Keep the experts that are most popular with a top-k; the others' tokens go to them in proportion."""
        k = top_k or float(self.chosen.sum())
        return self.kept(np.argsort(-self._popular(k), kind="stable")[:experts], k)

    def kept(self, ids: np.ndarray, top_k: float) -> MoeCost:
        """Keep these experts, with a top-k of at most as many."""
        chosen = spread(self._popular(top_k)[ids], min(top_k, len(ids)))
        return replace(self, chosen=chosen, popular=self.popular[:, ids])

    def _popular(self, top_k: float) -> np.ndarray:
        row: np.ndarray = self.popular[min(max(round(top_k), 1), len(self.popular)) - 1]
        return row


@dataclass(frozen=True, eq=False)
class ModelCost:
    """What a model asks of a machine, layer by layer."""

    moe: tuple[MoeCost, ...]
    dense: Weights
    """What every token passes through in all layers, routers apart: attention, dense layers, shared experts."""
    head: Weights
    """Read by every step, computed with for tokens that a successor is drawn for."""
    attention: Attention
    layers: int
    hidden: int
    fixed_nbytes: float
    """Memory of all that is no routed expert; embeddings and towers included."""
    fp8: bool
    """True if FP8 units compute with the experts."""
    profiled: bool
    """True if `chosen` is from a profile, False if every expert is taken as equally popular."""
    notes: tuple[str, ...] = ()
    """What was assumed."""

    @property
    def expert_nbytes(self) -> float:
        """Memory of the routed experts."""
        return sum(len(moe.chosen) * moe.nbytes for moe in self.moe)

    @property
    def nbytes(self) -> float:
        """Memory of the weights."""
        return self.fixed_nbytes + self.expert_nbytes

    def with_counts(self, experts: int | None = None, top_k: float | None = None) -> ModelCost:
        """Return the model with so many experts and such a top-k in every layer, at most what is there.

        The experts stay that are most popular with that top-k.
        """
        return self.routed(lambda moe: moe.narrowed(experts, top_k))

    def routed(self, change: Callable[[MoeCost], MoeCost]) -> ModelCost:
        """Return the model with other popularities; layers that share an array go on sharing one."""
        seen: dict[int, MoeCost] = {}
        for moe in self.moe:
            if id(moe.chosen) not in seen:
                seen[id(moe.chosen)] = change(moe)
        alike = (seen[id(moe.chosen)] for moe in self.moe)
        return replace(self, moe=tuple(
            replace(moe, chosen=one.chosen, popular=one.popular) for moe, one in zip(self.moe, alike, strict=True)
        ))  # fmt: skip


def spread(weights: np.ndarray, top_k: float) -> np.ndarray:
    """Scale popularities so that they add up to a top-k and none exceeds 1: (E,), 0 < top_k ≤ E → (E,) float64."""
    weights = np.maximum(np.asarray(weights, np.float64), _RARE)
    full = np.zeros(len(weights), bool)
    while True:  # each turn fills at least one more expert
        share = np.where(full, 1.0, weights * ((top_k - full.sum()) / max(weights[~full].sum(), _RARE)))
        over = (share > 1) & ~full
        if not over.any():
            return share
        full |= over


def model_cost(checkpoint: Checkpoint, geometry: Geometry, profile: Profile | None = None) -> ModelCost:
    """Count what a checkpoint asks of a machine. Reads no tensor.

    Raises:
        ProfileError: the profile lacks a layer, or is of a model with another number of experts.
    """
    bits, moe, routed = _bits(checkpoint), [], Weights(0, 0)
    uniform: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for block in geometry.trunk:
        if profile is None:
            share = np.full(block.experts, block.top_k / block.experts)
            chosen, popular = uniform.setdefault(block.experts, (share, np.ones((1, block.experts))))
        else:
            popular = _popularity(profile, block)
            chosen = spread(popular[-1], block.top_k)
        expert, row, always = _split(checkpoint, geometry, block, bits)
        moe.append(MoeCost(chosen, popular, expert, row, geometry.expert_nbytes(checkpoint, block.prefix)))
        routed = routed.plus(always)
    layers, head = _always(checkpoint, geometry, bits)
    gone = sum(checkpoint.tensors[name].nbytes for name in geometry.mtp_tensors)
    fixed = checkpoint.nbytes - gone - sum(b.experts * m.nbytes for b, m in zip(geometry.trunk, moe, strict=True))
    attention, notes = read_attention(checkpoint.config, geometry)
    return ModelCost(
        tuple(moe), routed.plus(layers), head, attention, geometry.num_layers, geometry.hidden, fixed,
        _fp8(checkpoint, geometry), profile is not None, notes,
    )  # fmt: skip


def planned(work: ModelCost, geometry: Geometry, plan: Plan) -> ModelCost:
    """Return what a plan leaves of a model; layers may differ.

    Raises:
        PlanError: the plan is of another model.
    """
    kept, top_k = kept_by_block(plan, geometry), numbers(plan, geometry).top_k
    seen: dict[tuple[int, int, int], MoeCost] = {}
    found = []
    for block, moe in zip(geometry.trunk, work.moe, strict=True):
        ids, k = np.array(kept.get(block.prefix, range(block.experts))), top_k.get(block.layer, block.top_k)
        if work.profiled:
            found.append(moe.kept(ids, k))
            continue
        one = seen.setdefault((block.experts, len(ids), k), moe.kept(ids, k))  # which ones does not matter
        found.append(replace(moe, chosen=one.chosen, popular=one.popular))
    return replace(work, moe=tuple(found))


def _popularity(profile: Profile, block: MoeBlock) -> np.ndarray:
    """Share of the profile's tokens that use each expert with every top-k up to its own, by their ranks: (K, E)."""
    stats = profile.layer(block.prefix)
    if len(stats.count) != block.experts:
        raise ProfileError(f"{block.prefix}: the profile knows {len(stats.count)} experts, the model {block.experts}")
    lower = np.cumsum(stats.rank_count, axis=1).T[:-1]
    share: np.ndarray = np.vstack([lower, stats.count]) / max(stats.tokens, 1)
    return share


def _split(
    checkpoint: Checkpoint, geometry: Geometry, block: MoeBlock, bits: Mapping[str, int]
) -> tuple[Weights, Weights, Weights]:
    """One expert (the mean of those that text uses), one row of the router, and what of the block is always used."""
    expert, router, always = Weights(0, 0), Weights(0, 0), Weights(0, 0)
    for name in block.tensors:
        role, found = geometry.roles[name], _weights(checkpoint.tensors[name], bits)
        if isinstance(role, ExpertTensor):
            if role.expert < block.experts:
                expert = expert.plus(found)
            elif geometry.family.sets == 1:
                always = always.plus(found)  # the tail; a second set is for images
        elif name == block.router:
            router = router.plus(found)
        elif isinstance(role, Sliced):
            part = block.experts / (block.experts + role.tail)
            expert, always = expert.plus(found, part / role.sets), always.plus(found, 1 - part)
    return Weights(0, 0).plus(expert, 1 / block.experts), Weights(0, 0).plus(router, 1 / block.experts), always


def _always(checkpoint: Checkpoint, geometry: Geometry, bits: Mapping[str, int]) -> tuple[Weights, Weights]:
    """What lies outside MoE blocks and is read by every step: layers, and the head, which may be the embedding."""
    other = {*geometry.mtp_tensors, *(name for block in geometry.blocks.values() for name in block.tensors)}
    left = [name for name in checkpoint.tensors if name not in other and not in_tower(name)]
    outside = [name for name in left if not LAYER.match(name) and len(checkpoint.tensors[name].shape) == 2]
    vocabulary = max((checkpoint.tensors[name].shape[0] for name in outside), default=0)
    tables = {name for name in outside if checkpoint.tensors[name].shape[0] == vocabulary}
    heads = [name for name in tables if "head" in name or "output" in name] or tables
    layers = (name for name in left if name not in tables)
    return _sum(checkpoint, layers, bits), _sum(checkpoint, heads, bits)


def _sum(checkpoint: Checkpoint, names: Iterable[str], bits: Mapping[str, int]) -> Weights:
    total = Weights(0, 0)
    for name in names:
        total = total.plus(_weights(checkpoint.tensors[name], bits))
    return total


def _weights(tensor: TensorInfo, bits: Mapping[str, int]) -> Weights:
    leaf = tensor.name.rpartition(".")[2]
    if "scale" in leaf or "zero" in leaf or leaf == "g_idx":
        return Weights(tensor.nbytes, 0)
    packed = tensor.dtype in bits
    return Weights(tensor.nbytes, tensor.nbytes * 8 / bits[tensor.dtype] if packed else prod(tensor.shape))


def _bits(checkpoint: Checkpoint) -> dict[str, int]:
    """Bits of a parameter in the dtypes that may hold several in an element."""
    found = quantization_config(checkpoint.config)
    groups = [(group.get("weights") or {}).get("num_bits") for group in (found.get("config_groups") or {}).values()]
    stated = next((bits for bits in (found.get("bits"), *groups) if isinstance(bits, int) and bits > 0), None)
    small = 4 if checkpoint.config.get("expert_dtype") == "fp4" else stated or 8
    return dict.fromkeys(_PACKED, stated or 4) | {"I8": small}


def _fp8(checkpoint: Checkpoint, geometry: Geometry) -> bool:
    dtypes = {checkpoint.tensors[name].dtype for block in geometry.trunk[:1] for name in block.tensors}
    return bool(dtypes & {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
