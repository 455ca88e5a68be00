"""A plan in; new values of its down projections out, fitted in closed form on calibration text. No gradients.

The base and the plan go through the model side by side. In every MoE layer, on what the plan itself brings to it, the
down projections of the kept experts, and of shared experts, are refitted so that the layer's output meets the base's:
the residual stream is what counts, so that a layer also mends what those before it left. Where a model does not plainly
add the experts' sum to the stream, the sum alone is brought back.

Invariant: the values that the next layer is fitted behind are those of the file, but for their rounding to its dtype.
Memory, beside that of a what-if: the residual in float32 and the experts' inputs of one layer, for all tokens.

Shapes: T tokens without padding, H hidden, I width of a map's input, K top-k.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expertcut.calibrate.batches import make_batches
from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.executor import LayerStream, find_experts
from expertcut.calibrate.passage import Advance, Notify, Passage
from expertcut.calibrate.quantised import Coded, recodable
from expertcut.calibrate.residual import joining_factor
from expertcut.calibrate.run import ProfileOptions, open_stream
from expertcut.calibrate.transfer import fetch, park, settle
from expertcut.checkpoint.types import Checkpoint
from expertcut.choose.plan import Deltas, Plan, kept_by_block, validate
from expertcut.errors import PlanError
from expertcut.measure.heal_inputs import Seen
from expertcut.measure.heal_record import LayerHealed
from expertcut.measure.refit import Linear, adopt, best_ridge, refit
from expertcut.measure.variants import Variant
from expertcut.model import ExpertTensor, Geometry, MoeBlock, Role, Sliced, check_fingerprint
from expertcut.rewrite.deltas import DeltaFile, new_shape
from expertcut.rewrite.gain import LAST, ROUNDING, last_projections

RIDGES = (0.3, 1.0, 3.0)
"""Strengths of regularisation that are tried, in mean diagonals of a map's Gram matrix."""
ROUNDS = 2
"""How often each map of a layer is improved."""
SHARED = re.compile(r"shared_(?:experts?|mlp)\.")
"""Shared experts, in the name of a tensor below its block."""
_PLAIN = {"weight", "", "bias"}
"""What there is of a projection that is not quantised, as its tensors' names end."""
HELD = 4
"""Every so manieth sequence is held back while a layer's ridge is chosen."""


def fit_deltas(
    checkpoint: Checkpoint, geometry: Geometry, plan: Plan, data: CalibrationSet, path: Path, options: ProfileOptions,
    *, notify: Notify, advance: Advance,
) -> tuple[Deltas, list[LayerHealed]]:  # fmt: skip
    """Fit new values for a plan, and write them to the file `path`.

    Raises:
        PlanError: the plan does not fit the checkpoint, or its format or family cannot be healed.
        DestinationError: the file cannot be written.
    """
    names, coded = _names(checkpoint, geometry, plan)
    domains = [data.domains.index(s.domain) for s in data.sequences]
    batches = make_batches([s.ids for s in data.sequences], domains, options.micro_tokens)
    with ExitStack() as opened:
        stream = opened.enter_context(open_stream(checkpoint, geometry, data, options, notify))
        if joining_factor(stream.config) is None:
            names = {block.layer: [n for n in names[block.layer] if n in block.tensors] for block in geometry.trunk}
        announced = [
            (name, checkpoint.tensors[name].dtype, new_shape(checkpoint, geometry, plan, name))
            for name in chain.from_iterable(names.values())
        ]
        file = opened.enter_context(DeltaFile(path, announced))
        run, done = _Run(stream, plan, Passage(stream, batches, 1, notify), coded), []
        for index, base in stream.layers():
            block = stream.block(index)
            if block is None:
                run.pass_by(index, base)
            else:
                healed, values = run.heal(block, base, names[index])
                for name, value in values:
                    file.add(name, value.contiguous().view(torch.uint8).flatten().numpy())
                done.append(healed)
            advance(index + 1, len(stream))
        return file.finish(), done


def check_healable(checkpoint: Checkpoint, geometry: Geometry, plan: Plan) -> None:
    """Check by headers that a plan can be healed, before any text is read.

    Raises:
        PlanError: it is of another model, has new values already, or the format cannot be given any.
    """
    _names(checkpoint, geometry, plan)


def _names(checkpoint: Checkpoint, geometry: Geometry, plan: Plan) -> tuple[dict[int, list[str]], set[str]]:
    """The tensors of every layer that get new values, and quantised ones that may. Raises: PlanError."""
    if plan.deltas:
        raise PlanError("the plan is healed already", "heal the plan that it was made from")
    check_fingerprint(plan.source.fingerprint, checkpoint, geometry)
    validate(plan, geometry)
    coded = recodable(checkpoint)
    return {block.layer: list(_healable(checkpoint, geometry, plan, block, coded)) for block in geometry.trunk}, coded


def _healable(
    checkpoint: Checkpoint, geometry: Geometry, plan: Plan, block: MoeBlock, coded: Collection[str]
) -> Iterator[str]:  # fmt: skip
    """Yield the stored down projections of a block's kept experts, and of its shared ones.

    Raises:
        PlanError: they are stored in a format that is too coarse for new values.
    """
    kept = set(kept_by_block(plan, geometry)[block.prefix])
    for key, parts in last_projections(geometry, block):
        if key != block.prefix:
            continue
        weight = parts.get("weight", parts.get(""))
        plain = weight is not None and checkpoint.tensors[weight].dtype in ROUNDING and parts.keys() <= _PLAIN
        if weight is None or not (plain or (weight in coded and _one_by_one(geometry.roles[weight]))):
            name = weight or next(iter(parts.values()))
            info = checkpoint.tensors[name]
            raise PlanError(
                f"{info.shard}: {name} is {info.dtype}, in a format that cannot be given new values; expected "
                f"{', '.join(ROUNDING)}, or 8 bits with scales",
                "heal another checkpoint of the model, such as the BF16 one, and quantise that",
            )
        role = geometry.roles[weight]
        if isinstance(role, Sliced) or (isinstance(role, ExpertTensor) and role.expert in kept):
            yield weight
    for name, info in checkpoint.tensors.items():
        below = name.removeprefix(f"{block.prefix}.")
        shared = below != name and name not in block.tensors and SHARED.match(below) and len(info.shape) == 2
        if shared and below.endswith(".weight") and LAST.search(below) and (info.dtype in ROUNDING or name in coded):
            yield name


def _one_by_one(role: Role) -> bool:
    """True if what is stored of one expert is a tensor, or a row of a stack."""
    return isinstance(role, ExpertTensor) or (isinstance(role, Sliced) and (role.axis, role.unit) == (0, 1))


class _Run:
    """Text on its way through base (track 0) and plan."""

    def __init__(self, stream: LayerStream, plan: Plan, passage: Passage, coded: Collection[str]) -> None:
        """`coded` are quantised tensors that may get new values."""
        self.stream, self.passage, self.coded = stream, passage, coded
        self.variant = Variant(stream, plan)
        self.factor = joining_factor(stream.config)
        self.track: int | None = None
        """The plan's, once it does something else."""

    def pass_by(self, index: int, base: nn.Module) -> None:
        """Take both through a layer without experts."""
        for track in range(len(self.passage.hidden)):
            self.passage.step(index, base, track)

    def heal(self, block: MoeBlock, base: nn.Module, names: list[str]) -> tuple[LayerHealed, list[Any]]:
        """Take both through an MoE layer, the plan through the healed one; also the new values by name, in order."""
        index, passage = block.layer, self.passage
        if self.track is None:
            self.track = passage.branch(0)
        layer, experts = self.variant.layer(index, base), find_experts(base)
        assert experts is not None
        watched: Any = layer.get_submodule(experts)
        if getattr(watched, "has_post_expert_norm", False):
            family = self.stream.geometry.family.model_type
            raise PlanError(f"{family}: a norm follows each expert, so that no down projection can be refitted")
        shared = [self._place(index, name) for name in names if name not in block.tensors]
        seen = Seen(layer, experts, shared, sums=self.factor is None)
        if self.factor is None:
            whole = Seen(base, experts, [], sums=True)
            with whole.watching():
                passage.step(index, base, 0, whole)
            trial = passage.branch(self.track)
            with seen.watching():
                passage.step(index, layer, trial, seen)
            passage.drop()
            left_TH = whole.sums() - seen.sums()
        else:
            passage.step(index, base, 0)
            with seen.watching():
                passage.step(index, layer, self.track, seen)
            left_TH = self._apart()
        before = left_TH.square().sum().item()
        maps = seen.maps(self.variant.kept[index], self.factor or 1.0)
        ridge, _ = best_ridge(list(maps.values()), left_TH, self._held(), RIDGES)
        if ridge is not None:
            refit(list(maps.values()), left_TH, ridge, ROUNDS)
        values = list(self._values(block, layer, watched, names, maps, left_TH))
        healed = LayerHealed(
            index, ridge, sum(linear.change is not None for linear in maps.values()), len(watched.kept) + len(shared),
            left_TH.square().sum().item() / before if ridge is not None else 1.0,
        )  # fmt: skip
        if self.factor is None:
            _add(watched, maps)
            passage.step(index, layer, self.track)
        else:
            self._bring_back(left_TH)
        return healed, values

    def _place(self, index: int, name: str) -> str:
        """The module, in its layer, whose weight a stored tensor is."""
        prefix = f"{self.stream.prefix}.{index}"
        (target,) = self.stream.loader.made_of([name], prefix)
        return target.removeprefix(f"{prefix}.").rpartition(".")[0]

    def _valid(self, at: int) -> torch.Tensor:
        return self.passage.prepared[at].batch.domain.flatten() >= 0

    def _apart(self) -> torch.Tensor:
        """(T, H) float32: the base's hidden states minus the plan's."""
        passage, device = self.passage, self.stream.device
        assert self.track is not None
        settle(device)
        return torch.cat([
            (fetch(whole, device).flatten(0, -2).float() - fetch(planned, device).flatten(0, -2).float())[
                self._valid(at).to(device)
            ]
            for at, (whole, planned) in enumerate(zip(passage.hidden[0], passage.hidden[self.track], strict=True))
        ])  # fmt: skip

    def _held(self) -> torch.Tensor:
        """(T,) bool: tokens of the sequences that are held back."""
        parts = []
        for at, prepared in enumerate(self.passage.prepared):
            batch = prepared.batch
            rows = torch.tensor(batch.rows)[:, None].expand_as(batch.ids).flatten()
            parts.append((rows % HELD == HELD - 1)[self._valid(at)])
        return torch.cat(parts).to(self.stream.device)

    def _bring_back(self, left_TH: torch.Tensor) -> None:
        """Let the plan's hidden states be the base's but for what is left."""
        passage, device, done = self.passage, self.stream.device, 0
        assert self.track is not None
        for at, whole in enumerate(passage.hidden[0]):
            valid = self._valid(at).to(device)
            count = int(valid.sum())
            hidden = fetch(passage.hidden[self.track][at], device).clone()
            mended = fetch(whole, device).flatten(0, -2)[valid].float() - left_TH[done : done + count]
            hidden.flatten(0, -2)[valid] = mended.to(hidden.dtype)
            passage.hidden[self.track][at] = park(hidden)
            done += count

    def _values(
        self, block: MoeBlock, layer: nn.Module, experts: Any, names: list[str], maps: dict[int | str, Linear],
        left_TH: torch.Tensor,
    ) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
        """What is stored of every tensor after healing, rounded to nearest.

        Rounding to 8 bits is coarse: their changes become those that the codes make, and `left_TH` what these leave.
        """
        kept = self.variant.kept[block.layer]
        for name in names:
            role, coded = self.stream.geometry.roles[name], name in self.coded
            if isinstance(role, Sliced):
                stored, some = None if coded else self.variant.stored(name), []
                for place, e in enumerate(kept):
                    weight, linear = _matrix(experts, e), maps.get(place)
                    if stored is None:
                        some.append(_recoded(name, self.variant.coded(name, e), weight, linear, left_TH))
                    else:
                        part = stored.narrow(role.axis, e * role.unit, role.unit)
                        some.append(_changed(name, part, weight, linear))
                yield name, torch.cat(some, dim=role.axis)
                continue
            if isinstance(role, ExpertTensor):
                place = kept.index(role.expert)
                weight, linear = _matrix(experts, role.expert), maps.get(place)
            else:
                where = self._place(block.layer, name)
                shared: Any = layer.get_submodule(where)
                weight, linear = shared.weight, maps.get(where)
            if coded:
                yield name, _recoded(name, self.variant.coded(name), weight, linear, left_TH)
            else:
                yield name, _changed(name, self.variant.stored(name), weight, linear)


def _changed(name: str, stored: torch.Tensor, weight_HI: torch.Tensor, linear: Linear | None) -> torch.Tensor:
    """A stored weight plus its map's change."""
    if linear is None or linear.change is None:
        return stored
    change = linear.change.T if _turned(name, stored, weight_HI) else linear.change
    wide = stored.squeeze().to(torch.promote_types(stored.dtype, torch.float32)) + change.to(stored.device)
    return wide.to(stored.dtype).view(stored.shape)


def _recoded(
    name: str, coded: Coded, weight_HI: torch.Tensor, linear: Linear | None, left_TH: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    """The codes of a quantised weight plus its map's change, which becomes what they make."""
    if linear is None or linear.change is None:
        return coded.codes.cpu()
    values = coded.values
    turned = _turned(name, values, weight_HI)
    new = coded.nearest(values + (linear.change.T if turned else linear.change).reshape(values.shape))
    made = (new.values - values).squeeze()
    adopt(linear, made.T if turned else made, left_TH)
    return new.codes.cpu()


def _matrix(experts: Any, expert: int) -> torch.Tensor:
    """An expert's down projection in memory, (H, I)."""
    weight: torch.Tensor = experts.down_proj[expert]
    return weight.T if experts.is_transposed else weight


def _turned(name: str, stored: torch.Tensor, weight_HI: torch.Tensor) -> bool:
    """Whether a weight is stored in the other of two orders; `weight_HI` is the one in memory."""
    found = stored.squeeze().to(weight_HI.device, weight_HI.dtype)
    for turned in (False, True):
        if torch.equal(found, weight_HI.T if turned else weight_HI):
            return turned
    raise PlanError(f"{name}: is not stored as the experts' down projection is used, so that it cannot be healed")


def _add(experts: Any, maps: dict[int | str, Linear]) -> None:
    """Change the routed experts in memory."""
    for place, linear in maps.items():
        if linear.change is not None and isinstance(place, int):
            weight = _matrix(experts, int(experts.kept[place]))
            weight += linear.change.to(weight.dtype)
