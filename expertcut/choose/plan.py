"""The plan: which experts of every MoE block are kept, and the top-k. A JSON file that says for which model it is.

Invariant: what `validate` accepts, the rewriter can write: equal numbers per group, and no token that asks for more
experts than its groups hold. Stock runtimes load the result unless the plan says `per_layer`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PrivateAttr, StrictInt, ValidationError

from expertcut.checkpoint.jsonio import load_json, shown
from expertcut.checkpoint.textio import replace_text
from expertcut.errors import CheckpointError, PlanError
from expertcut.model import Fingerprint, Geometry, MoeBlock
from expertcut.model.uneven import LayerNumbers

SCHEMA: Literal["expertcut.plan/1"] = "expertcut.plan/1"
_AGAIN = "make the plan again with `expertcut plan`"

Natural = Annotated[StrictInt, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerPlan(_Record):
    """What happens to one MoE block."""

    layer: Natural
    """Absolute layer number."""
    kept: tuple[Natural, ...]
    """Original ids, ascending and distinct."""
    top_k: Annotated[StrictInt, Field(ge=1)] | None = None
    """Experts activated per token; None: unchanged."""
    gain: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Factor on what the routed experts add up to; None: 1."""


class Deltas(_Record):
    """Tensors that get new values, which lie in a file beside the plan."""

    file: Annotated[str, Field(pattern=r"^[^/\\]+$")]
    """Its name, in the plan's folder."""
    tensors: Annotated[dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]], Field(min_length=1)]
    """Name in the source → sha256 of the new bytes, those of kept experts only."""


class Source(_Record):
    """The model that a plan was made for."""

    name: str
    fingerprint: Fingerprint


class Plan(_Record):
    """Kept experts of every MoE block of the trunk, by prefix, in layer order; of every set where it has two.

    Blocks of multi-token-prediction layers may be absent: they keep what the last layer of the trunk keeps.
    """

    schema_version: Literal["expertcut.plan/1"] = Field(default=SCHEMA, alias="schema")
    source: Source
    layers: Annotated[dict[str, LayerPlan], Field(min_length=1)]
    per_layer: Literal[True] | None = None
    """Layers may differ in expert count and top-k, which only expertcut's plug-ins serve; absent: all are alike."""
    groups: Literal["keep"] = "keep"
    mtp: Literal["lockstep", "drop"] = "lockstep"
    """What becomes of multi-token-prediction layers: pruned like the others, or dropped with their config field."""
    deltas: Deltas | None = None
    """New values of tensors, as `heal` finds them; None: all are the source's."""
    provenance: dict[str, JsonValue] = {}
    """How the plan was made: criterion, budget, protection, profile, command."""
    _folder: Path | None = PrivateAttr(None)

    @property
    def experts(self) -> int:
        """Experts kept per block, the largest number."""
        return max(len(entry.kept) for entry in self.layers.values())

    def top_k(self, geometry: Geometry) -> int:
        """Return the experts activated per token under this plan, the largest number."""
        return max(entry.top_k or geometry.top_k for entry in self.layers.values())

    @property
    def deltas_path(self) -> Path:
        """Where the file of new values lies.

        Raises:
            PlanError: there is none, or the plan was not read from a file of its own.
        """
        if self.deltas is None or self._folder is None:
            raise PlanError("the new values of its tensors are not beside this plan", "pass the file that `heal` wrote")
        return self._folder / self.deltas.file

    def beside(self, folder: Path, deltas: Deltas | None) -> Self:
        """Return the plan with these new values of tensors, in a file of `folder`."""
        made = self.model_copy(update={"deltas": deltas})
        made._folder = folder if deltas else None
        return made

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan file. Whether it fits a model is for `validate` and `check_fingerprint` to say.

        Raises:
            PlanError: the file is missing, not JSON, of another schema, or has a wrong, missing or unknown field.
        """
        path = Path(path)
        if not os.path.isfile(path):  # of a name that is too long `Path.is_file` raises
            raise PlanError(f"{path}: no such file", "make a plan with `expertcut plan`")
        try:
            data = load_json(path)
        except CheckpointError as error:
            raise PlanError(error.message, _AGAIN) from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise PlanError(f"{path}: $.schema is {found!r}, expected {SCHEMA!r}", _AGAIN)
        try:
            plan = cls.model_validate(data)
        except ValidationError as error:
            raise PlanError(f"{path}: {_first_error(error)}", _AGAIN) from error
        return plan.beside(path.absolute().parent, plan.deltas) if plan.deltas else plan

    def to_text(self) -> str:
        """Return the file's contents: JSON, the kept ids of a layer on one line."""
        return _pretty(self.model_dump(mode="json", by_alias=True, exclude_none=True)) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan; replaces the file at once or not at all.

        Raises:
            DestinationError: the file cannot be written.
        """
        replace_text(Path(path), self.to_text(), "plan")


def kept_by_block(plan: Plan, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Return the kept ids of every set of experts of the geometry, multi-token-prediction blocks included.

    Entries for multi-token-prediction blocks that the checkpoint lacks are ignored: quantised siblings often lack them.

    Raises:
        PlanError: the plan lacks a block of the trunk, or names a block or layer number that the model has not.
    """
    keys = geometry.keys
    for prefix, entry in plan.layers.items():
        block = keys.get(prefix)
        if block is None and entry.layer < geometry.num_layers:
            raise PlanError(f"the plan names {shown(prefix)} (layer {entry.layer}), which the model lacks", _AGAIN)
        if block is not None and block.layer != entry.layer:
            raise PlanError(f"{prefix}: the plan says layer {entry.layer}, the model layer {block.layer}", _AGAIN)
    for block in geometry.trunk:
        if lost := [key for key in block.keys if key not in plan.layers]:
            raise PlanError(f"the plan lacks {lost[0]} (layer {block.layer})", _AGAIN)
    lockstep = [plan.layers[key] for key in geometry.trunk[-1].keys]
    return {
        key: plan.layers.get(key, stand_in).kept
        for block in geometry.blocks.values()
        for key, stand_in in zip(block.keys, lockstep, strict=True)
    }


def gains(plan: Plan, geometry: Geometry) -> dict[str, float]:
    """Return the gain of every set of experts of the geometry; multi-token-prediction blocks follow the last layer."""
    lockstep = [plan.layers[key] for key in geometry.trunk[-1].keys]
    return {
        key: plan.layers.get(key, stand_in).gain or 1.0
        for block in geometry.blocks.values()
        for key, stand_in in zip(block.keys, lockstep, strict=True)
    }


def deltas_of(plan: Plan, block: MoeBlock) -> dict[str, str]:
    """Return the tensors of a block that the plan has new values for, the router's and shared experts' included.

    By their names in the source; with the sha256 of the new bytes.
    """
    named = plan.deltas.tensors.items() if plan.deltas else ()
    own = {block.router, *block.tensors}
    return {name: digest for name, digest in named if name in own or name.startswith(f"{block.prefix}.")}


def numbers(plan: Plan, geometry: Geometry) -> LayerNumbers:
    """Return the expert count and the top-k of every MoE layer under a plan.

    Raises:
        PlanError: see `kept_by_block`.
    """
    kept = kept_by_block(plan, geometry)
    lockstep = plan.layers[geometry.trunk[-1].prefix]
    return LayerNumbers(
        {block.layer: len(kept[block.prefix]) for block in geometry.blocks.values()},
        {b.layer: plan.layers.get(b.prefix, lockstep).top_k or geometry.top_k for b in geometry.blocks.values()},
    )


def dropped_tensors(plan: Plan, geometry: Geometry) -> frozenset[str]:
    """Return the names of tensors that go altogether: those of multi-token-prediction layers that the plan drops."""
    return frozenset(geometry.mtp_tensors) if plan.mtp == "drop" else frozenset()


def validate(plan: Plan, geometry: Geometry) -> None:
    """Check that a plan can be carried out on a model of this geometry and leaves a model that runtimes load.

    Raises:
        PlanError: naming the layer, found against expected.
    """
    if geometry.uneven:
        raise PlanError("the layers of the model differ already", "plan for the model that it was made from")
    every = {(geometry.keys[prefix].layer, prefix): kept for prefix, kept in kept_by_block(plan, geometry).items()}
    for (layer, _), kept in every.items():
        _check_ids(kept, f"layer {layer}", geometry.num_experts)
    found = numbers(plan, geometry)
    if not plan.per_layer:
        _check_uniform("experts", found.experts)
        _check_uniform("top_k", found.top_k)
    for (layer, prefix), kept in every.items():
        if len(kept) != found.experts[layer]:
            raise PlanError(f"{prefix} keeps {len(kept)} experts, expected {found.experts[layer]} as its twin", _AGAIN)
        _check_groups(kept, f"layer {layer}", geometry)
        _check_top_k(found.top_k[layer], len(kept), f"layer {layer}", geometry)


def group_best(geometry: Geometry) -> int:
    """Return how many experts of a group the router looks at to rank the group; 1 if it ranks no groups."""
    family = geometry.family
    return family.group_best if geometry.n_group > 1 or family.ranks_one_group else 1


def min_experts(geometry: Geometry) -> int:
    """Return the smallest expert count that the router can rank its groups with; 1 if it ranks none."""
    best = group_best(geometry)
    return geometry.n_group * min(best, geometry.num_experts // geometry.n_group)


def reachable(geometry: Geometry, experts: int) -> int:
    """Return how many of `experts` kept experts one token can use: those of its groups."""
    return experts if geometry.n_group == 1 else geometry.topk_group * (experts // geometry.n_group)


def experts_for(geometry: Geometry, top_k: int) -> int:
    """Return the smallest group-equal expert count of which one token can use `top_k`; the inverse of `reachable`."""
    return top_k if geometry.n_group == 1 else geometry.n_group * -(-top_k // geometry.topk_group)


def _check_ids(kept: tuple[int, ...], where: str, experts: int) -> None:
    if not kept:
        raise PlanError(f"{where} keeps no experts", _AGAIN)
    for before, after in zip(kept, kept[1:], strict=False):
        if after <= before:
            raise PlanError(f"{where}: kept ids must be ascending and distinct, but {after} follows {before}", _AGAIN)
    if kept[-1] >= experts or kept[0] < 0:
        wrong = kept[-1] if kept[-1] >= experts else kept[0]
        raise PlanError(f"{where}: expert {wrong} is kept, but ids go from 0 to {experts - 1}", _AGAIN)


def _check_groups(kept: tuple[int, ...], where: str, geometry: Geometry) -> None:
    size = geometry.num_experts // geometry.n_group
    numbers = [sum(1 for e in kept if e // size == group) for group in range(geometry.n_group)]
    if len(set(numbers)) > 1:
        raise PlanError(
            f"{where}: the groups keep {numbers} experts, expected equal numbers in all {geometry.n_group} groups",
            _AGAIN,
        )
    least = min_experts(geometry)
    if len(kept) < least:
        raise PlanError(
            f"{where}: {numbers[0]} expert kept per group, but the router ranks groups, even a single one, by their "
            f"{geometry.family.group_best} best",
            f"keep at least {least} experts",
        )


def _check_uniform(what: str, counts: Mapping[int, int]) -> None:
    first, expected = next(iter(counts.items()))
    for layer, count in counts.items():
        if count != expected:
            raise PlanError(
                f"layer {layer}: {what} is {count}, expected {expected} as in layer {first}: stock runtimes load only "
                "layers that are alike",
                "plan with --per-layer, and serve with expertcut's plug-ins",
            )


def _check_top_k(top_k: int, experts: int, where: str, geometry: Geometry) -> None:
    if geometry.family.fixed_top_k and top_k != geometry.top_k:
        raise PlanError(f"top_k={top_k}, but the router of {geometry.family.model_type} knows {geometry.top_k} only")
    usable = reachable(geometry, experts)
    if top_k > usable:
        groups = f" in the {geometry.topk_group} of {geometry.n_group} groups that a token uses"
        enough = experts_for(geometry, top_k)
        raise PlanError(
            f"top_k={top_k} exceeds the {usable} experts kept in {where}{groups if geometry.n_group > 1 else ''}",
            (f"keep at least {enough} or " if enough <= geometry.num_experts else "") + f"pass --top-k {usable}",
        )


def _first_error(error: ValidationError) -> str:
    """`$.layers["model.layers.3.mlp"].kept[2]: Input should be a valid integer, found 'x' (and 3 more)`."""
    details = error.errors(include_url=False)
    place = "$"
    for step in details[0]["loc"]:
        if isinstance(step, int):
            place += f"[{step}]"
        else:
            place += f".{step}" if step.isidentifier() else f"[{json.dumps(step)}]"
    found = "" if details[0]["type"] == "missing" else f", found {_short(details[0]['input'])}"
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{place}: {details[0]['msg']}{found}{more}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _pretty(value: Any, indent: str = "") -> str:
    """JSON with one line per member of an object and lists on one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    deeper = indent + "  "
    members = (f"{deeper}{json.dumps(k, ensure_ascii=False)}: {_pretty(v, deeper)}" for k, v in value.items())
    return "{\n" + ",\n".join(members) + f"\n{indent}}}"
