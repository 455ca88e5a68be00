"""Model, profile and options in; a validated plan out.

Invariant: the same inputs give the same plan, byte for byte; nothing in it tells the time or the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from expertcut.checkpoint.types import Checkpoint, valid_text
from expertcut.choose.budget import Budget, resolve_budget
from expertcut.choose.criteria import Criterion, Found, PatternStats, get_criterion, without_profile
from expertcut.choose.plan import LayerPlan, Plan, Source, validate
from expertcut.choose.protect import Protected, parse_protect, super_experts, union
from expertcut.choose.select import select_experts
from expertcut.choose.topk import MeanTopK, TopK, layer_top_k
from expertcut.choose.weights import Tell, WeightStats
from expertcut.errors import UsageError
from expertcut.model import Geometry, MoeBlock, check_fingerprint, fingerprint

if TYPE_CHECKING:
    from expertcut.calibrate.profile import Profile

Advance = Callable[[int, int], None]
"""Called with what is done and what there is in all."""
EVERYTHING = "first"
"""The criterion where nothing is chosen, because all experts stay."""
UNPROFILED = "router-norm"
"""The criterion for experts that text does not use, where the plan's own criterion looks at text."""
Walk = Callable[["Request"], tuple[dict[str, LayerPlan], "Profile"]]
"""Runs the model and chooses on the way; returns the layers of the plan, and what it saw of each."""


@dataclass(frozen=True)
class Request:
    """What is asked of a plan, checked, before any expert is looked at."""

    checkpoint: Checkpoint
    geometry: Geometry
    source: Source
    criterion: Criterion
    experts: int
    """To keep in every layer."""
    top_k: Mapping[str, int]
    """Experts activated per token, by prefix of the block."""
    per_layer: bool
    protected: Protected
    domain_weights: Mapping[str, float] | None
    seed: int
    tell: Tell

    def choose(self, block: MoeBlock, found: Found) -> dict[str, LayerPlan]:
        """Choose the experts of a block, by key: those that text uses by what the criterion found of them.

        Raises:
            PlanError: protection exceeds the budget, or what was found is not finite.
            CheckpointError: experts that text does not use are chosen by weights, which are quantised.
        """
        sets = {block.prefix: found}
        if block.twin is not None:
            own = self.criterion
            blind = get_criterion(UNPROFILED) if own.needs_profile or own.needs_replay else own
            sets[block.twin.prefix] = self.unread(blind, block.twin.prefix, self.geometry.num_layers + block.layer)
        return {
            key: self._entry(block, select_experts(
                one, self.experts, n_group=self.geometry.n_group, protected=self.protected.get(key, ()),
                layer=block.layer,
            ))
            for key, one in sets.items()
        }  # fmt: skip

    def judged(self, block: MoeBlock, profile: Profile | None) -> Found:
        """Return what the criterion finds of a block's experts, by a profile if it needs one."""
        if not self.criterion.needs_profile:
            return self.unread(self.criterion, block.prefix, block.layer)
        assert profile is not None
        found: Found = self.criterion.score(profile.layer(block.prefix, self.domain_weights))
        return found

    def unread(self, criterion: Criterion, prefix: str, draw: int) -> Found:
        """Return what a criterion finds of a set of experts that needs no text; `draw` is the set's number."""
        if criterion.needs_weights:
            stats: Any = WeightStats(self.checkpoint, self.geometry, prefix, self.tell)
        else:
            stats = PatternStats(self.geometry.num_experts, draw, self.seed)
        found: Found = criterion.score(stats)
        return found

    def draft(self, experts: int) -> Plan:
        """Return a plan of the right shape that keeps the first so many experts, equally many of every group."""
        size, quota = self.geometry.num_experts // self.geometry.n_group, experts // self.geometry.n_group
        kept = tuple(e for e in range(self.geometry.num_experts) if e % size < quota)
        layers = {key: self._entry(block, kept) for block in self.geometry.trunk for key in block.keys}
        return self.plan(layers)

    def plan(self, layers: dict[str, LayerPlan], provenance: Mapping[str, JsonValue] | None = None) -> Plan:
        """Return the plan of these layers, validated.

        Raises:
            PlanError: the result cannot be served.
        """
        plan = Plan(
            source=self.source, layers=layers, per_layer=True if self.per_layer else None,
            provenance=dict(provenance or {}),
        )  # fmt: skip
        validate(plan, self.geometry)
        return plan

    def _entry(self, block: MoeBlock, kept: tuple[int, ...]) -> LayerPlan:
        k = self.top_k[block.prefix]
        return LayerPlan(layer=block.layer, kept=kept, top_k=None if k == self.geometry.top_k else k)


def make_plan(
    checkpoint: Checkpoint,
    geometry: Geometry,
    *,
    strategy: str | None = None,
    experts: int | None = None,
    keep: float | None = None,
    drop: int | None = None,
    fit: int | None = None,
    tp: int = 1,
    fit_candidates: Sequence[int] | None = None,
    top_k: TopK | None = None,
    per_layer: bool = False,
    profile: Profile | None = None,
    domain_weights: Mapping[str, float] | None = None,
    protect: Sequence[str] = (),
    protect_super: bool = False,
    seed: int = 0,
    command: str = "",
    advance: Advance = lambda done, total: None,
    walk: Walk | None = None,
    sequential: bool = False,
) -> Plan:
    """Choose the experts to keep, equally many in every layer and group, and the top-k.

    Exactly one of `experts`, `keep` (fraction), `drop` and `fit` (bytes per device, of `tp` devices; the largest of
    `fit_candidates` that fits, None: of all counts) is the budget; what it came to stands in the plan's provenance as
    `budget`, with a note to print. `domain_weights` multiply each domain's sums, absent domains count 0.
    Without a `strategy` and a budget all experts stay, and only `top_k` changes; `per_layer` allows it to differ.
    `protect` takes `LAYER:ID[,ID…]` or `ID[,ID…]`; `protect_super` adds the super experts of the whole profile.
    `advance` hears of the bytes of weights that are read, where the strategy looks at the experts themselves.
    `walk` chooses while it runs the model, without a profile: for the strategies that replay layers, and for those that
    read a profile `sequential`ly, every layer behind the pruned ones.

    Raises:
        UsageError: options out of range or that do not go together, an unknown strategy, domain, layer or expert.
        PlanError: the profile is another model's, protection exceeds the budget, or the result cannot be served.
        ProfileError: a layer was not profiled, or the profile lacks what the strategy needs.
        CheckpointError: the strategy looks at weights, which are quantised so that it cannot.
    """
    criterion = get_criterion(strategy or EVERYTHING)
    _check_walk(criterion, walk is not None, profile, protect_super or isinstance(top_k, MeanTopK))
    if walk is None:
        _check_options(criterion, profile, domain_weights, protect_super, isinstance(top_k, MeanTopK))
    if strategy is None and top_k is None:
        raise UsageError("no strategy given", "for example --profile PROFILE --strategy reap, or --top-k K alone")
    if strategy is None and (experts, keep, drop, fit) == (None,) * 4:
        experts = geometry.num_experts
    tops = layer_top_k(top_k, geometry, profile, domain_weights)
    budget = resolve_budget(
        checkpoint, geometry, experts=experts, keep=keep, drop=drop, fit=fit, tp=tp, candidates=fit_candidates,
        top_k=max(tops.values()),
    )  # fmt: skip
    if strategy is None and budget.experts < geometry.num_experts:
        raise UsageError(f"{budget.option} needs --strategy", "for example --profile PROFILE --strategy reap")
    budget = _with_blind_note(budget, criterion, geometry)
    named = parse_protect(protect, geometry)
    if profile is not None:
        own = check_fingerprint(profile.meta.fingerprint, checkpoint, geometry, what="profile")
    else:
        own = fingerprint(checkpoint, geometry)
    supers = _super_experts(profile, geometry) if profile is not None and protect_super else {}
    request = Request(
        checkpoint, geometry, Source(name=checkpoint.public_name, fingerprint=own), criterion, budget.experts, tops,
        per_layer, union(named, supers), domain_weights, seed, _counted(advance, checkpoint, geometry),
    )  # fmt: skip
    layers: dict[str, LayerPlan] = {}
    if walk is not None:
        layers, profile = walk(request)
    else:
        for block in geometry.trunk:
            layers |= request.choose(block, request.judged(block, profile))
    facts = _provenance(strategy, budget, top_k, named, supers, profile, domain_weights, seed, command)
    return request.plan(layers, facts | ({"sequential": True} if sequential else {}))


def _with_blind_note(budget: Budget, criterion: Criterion, geometry: Geometry) -> Budget:
    """The budget, its note saying so where a second set of experts is chosen without the profile."""
    looks = criterion.needs_profile or criterion.needs_replay
    if not (geometry.family.twin and looks and budget.experts < geometry.num_experts):
        return budget
    blind = f"those that text does not use are chosen by {UNPROFILED}: no profile knows them"
    return replace(budget, note=f"{budget.note}; {blind}" if budget.note else blind)


def parse_domain_weights(text: str) -> dict[str, float]:
    """Parse `name=weight,…`; whether the domains exist is the profile's to say.

    Raises:
        UsageError: not of that form, a name twice, or a weight that is negative or not finite.
    """
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, equals, number = (part.strip() for part in item.rpartition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (name and equals and math.isfinite(weight) and weight >= 0):
            raise UsageError(
                f"domain weight {item.strip()!r}: expected NAME=WEIGHT, 0 or more", "for example code=2,math=1"
            )
        if name in weights:
            raise UsageError(f"domain {name!r} has two weights, {weights[name]:g} and {weight:g}")
        weights[name] = weight
    return weights


def _check_options(
    criterion: Criterion,
    profile: Profile | None,
    domain_weights: Mapping[str, float] | None,
    protect_super: bool,
    weighs: bool,
) -> None:
    if criterion.needs_profile and profile is None:
        raise UsageError(
            f"strategy {criterion.name} needs --profile; strategies that need none: {', '.join(without_profile())}",
            "expertcut profile MODEL -o PROFILE",
        )
    if protect_super and profile is None:
        raise UsageError("protecting super experts needs --profile", "expertcut profile MODEL -o PROFILE")
    if domain_weights is not None and not criterion.needs_profile and not weighs:
        raise UsageError(f"domain weights have no effect on strategy {criterion.name}, which looks at no data")


def _check_walk(criterion: Criterion, walks: bool, profile: Profile | None, needs_all: bool) -> None:
    if criterion.needs_replay and not walks:
        raise UsageError(f"strategy {criterion.name} runs the model", "expertcut plan MODEL --calibration TEXT")
    if not walks:
        return
    if not (criterion.needs_profile or criterion.needs_replay):
        raise UsageError(f"strategy {criterion.name} looks at no data, so that --sequential has no effect on it")
    if profile is not None or needs_all:
        raise UsageError(
            "a profile has no part in a choice that is made while the model runs: leave out --profile, --protect-super "
            "and --mean-top-k"
        )


def _super_experts(profile: Profile, geometry: Geometry) -> Protected:
    return super_experts({block.prefix: profile.layer(block.prefix).act_max for block in geometry.trunk})


def _counted(advance: Advance, checkpoint: Checkpoint, geometry: Geometry) -> Tell:
    """Return what adds up the bytes of weights that were read, of those of all experts, and passes them on."""
    done = total = 0

    def tell(nbytes: int) -> None:
        nonlocal done, total
        if not total:
            total = sum(geometry.expert_nbytes(checkpoint, block.prefix) * block.experts for block in geometry.trunk)
        done += nbytes
        advance(done, total)

    return tell


def _provenance(
    strategy: str | None,
    budget: Budget,
    top_k: TopK | None,
    named: Protected,
    supers: Protected,
    profile: Profile | None,
    domain_weights: Mapping[str, float] | None,
    seed: int,
    command: str,
) -> dict[str, JsonValue]:
    paper = get_criterion(strategy).paper if strategy else None
    facts: dict[str, JsonValue] = {"criterion": strategy, "paper": paper, "seed": seed}
    facts["budget"] = {"option": budget.option, "experts": budget.experts, "note": budget.note}
    facts["top_k"] = None if top_k is None else f"--top-k {top_k}" if isinstance(top_k, int) else str(top_k)
    facts["protected"] = _ids(named)
    facts["super_experts"] = _ids(supers)
    facts["domain_weights"] = dict(domain_weights) if domain_weights is not None else None
    facts["profile"] = profile.digest() if profile is not None else None
    sketch = profile.sketch if profile is not None else None
    facts["calibration_text"] = str(sketch.thinned()) if sketch is not None else None
    facts["command"] = valid_text(command)
    return facts


def _ids(protected: Protected) -> dict[str, JsonValue]:
    return {prefix: list[JsonValue](sorted(ids)) for prefix, ids in protected.items()}
