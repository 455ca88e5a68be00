"""Plans in; a gain for each of their layers out, fitted on calibration text and judged on other text.

The gain c of a layer is the factor on what its routed experts add up to that brings a plan's output y' nearest to the
whole layer's output y: c = Σ⟨y', y⟩ / Σ‖y'‖². Layers are fitted in order: both outputs are taken on the hidden states
that the plan itself, with its gains so far, brings to the layer. Invariant: no gain is kept that held-out text does not
show to help.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from expertcut.calibrate.batches import make_batches
from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.executor import LayerStream, find_experts
from expertcut.calibrate.passage import Advance, Notify, Passage
from expertcut.calibrate.run import ProfileOptions, open_stream
from expertcut.checkpoint.types import Checkpoint
from expertcut.choose.plan import Plan
from expertcut.errors import PlanError
from expertcut.measure.quality import WhatIf
from expertcut.measure.variants import Variant
from expertcut.measure.whatif import evaluate
from expertcut.model import Geometry
from expertcut.rewrite.gain import folded

DIGITS = 4
"""Decimals of a gain: finer ones are below what text can tell."""
ONE, EACH = "one gain", "a gain per layer"


@dataclass(frozen=True)
class Gained:
    """A plan as it came, and with the gains that help it."""

    name: str
    plan: Plan
    """With gains, if any were kept."""
    kept: str | None
    """Which: `ONE` for all layers, or `EACH`; None if no gain helps."""

    @property
    def shown(self) -> str:
        """The plan's name in what the pass found."""
        return self.name if self.kept is None else f"{self.name}, {self.kept}"


def gain_plans(
    checkpoint: Checkpoint, geometry: Geometry, plans: Mapping[str, Plan], fit_on: CalibrationSet,
    judge_on: CalibrationSet, options: ProfileOptions, *, notify: Notify, advance: Advance,
) -> tuple[dict[str, Gained], WhatIf]:  # fmt: skip
    """Fit gains for every plan, and keep those that lower the loss on `judge_on`; also what was found there.

    One gain for all layers is tried beside one per layer, and preferred unless the other does significantly better: it
    is simpler, often as good, and where the config has a factor on the routed experts it leaves all weights alone. All
    plans go through the model together: three runs of each MoE layer and plan to fit, one for each candidate to judge.

    Raises:
        PlanError: a gain cannot be carried by this family or format at all.
    """
    fitted = fit_gains(checkpoint, geometry, plans, fit_on, options, notify=notify, advance=advance)
    candidates: dict[str, Plan] = {}
    for name, plan in plans.items():
        candidates |= {name: plan} | {
            f"{name}, {kind}": p for kind, p in gain_kinds(checkpoint, geometry, plan, fitted[name])
        }
    found = evaluate(checkpoint, geometry, judge_on, candidates, options, notify=notify, advance=advance)
    return {name: _best(name, candidates, found) for name in plans}, found


def fit_gains(
    checkpoint: Checkpoint, geometry: Geometry, plans: Mapping[str, Plan], data: CalibrationSet,
    options: ProfileOptions, *, notify: Notify, advance: Advance,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Return the fitted gain of every MoE block of the trunk, by prefix, for every plan.

    Where a layer does what it did, or nothing can be told, the gain is 1. Gains that a plan has are not looked at.
    """
    domains = [data.domains.index(s.domain) for s in data.sequences]
    batches = make_batches([s.ids for s in data.sequences], domains, options.micro_tokens)
    found: dict[str, dict[str, float]] = {name: {} for name in plans}
    with open_stream(checkpoint, geometry, data, options, notify) as stream:
        variants = [Variant(stream, with_gains(plan, {})) for plan in plans.values()]
        passage = Passage(stream, batches, len(variants), notify)
        for index, base in stream.layers():
            for track, (name, variant) in enumerate(zip(plans, variants, strict=True)):
                gain = _through(stream, passage, track, index, base, variant)
                block = stream.block(index)
                if block is not None:
                    found[name][block.prefix] = gain
            advance(index + 1, len(stream))
    return found


def with_gains(plan: Plan, gains: Mapping[str, float]) -> Plan:
    """Return the plan with these gains, by prefix; a gain of 1 is none."""
    layers = {
        prefix: entry.model_copy(update={"gain": gains[prefix] if gains.get(prefix, 1.0) != 1.0 else None})
        for prefix, entry in plan.layers.items()
    }
    return plan.model_copy(update={"layers": layers})


def _through(stream: LayerStream, passage: Passage, track: int, index: int, base: nn.Module, variant: Variant) -> float:
    """Take a track through a layer with the gain that fits, and return it."""
    layer, experts = variant.layer(index, base), find_experts(base)
    if experts is None:
        passage.step(index, layer, track)
        return 1.0
    inner, fit, trial = base.get_submodule(experts), _Fit(), passage.branch(track)
    with fit.watching(inner):
        passage.step(index, _Both(base, layer), trial, fit)
    passage.drop()
    hook = inner.register_forward_hook(lambda module, args, out: out * fit.gain)
    passage.step(index, layer, track)
    hook.remove()
    return fit.gain


class _Both(nn.Module):
    """Runs the whole layer and then the plan's on the same input; hands on what the plan's makes of it."""

    def __init__(self, whole: nn.Module, planned: nn.Module) -> None:
        super().__init__()
        self.whole, self.planned = whole, planned

    def forward(self, *args: object, **kwargs: object) -> object:
        self.whole(*args, **kwargs)
        return self.planned(*args, **kwargs)


class _Fit:
    """Sums of Σ⟨y', y⟩ and Σ‖y'‖² over tokens; padding left out."""

    def __init__(self) -> None:
        self.domain_T: torch.Tensor | None = None
        self._seen: list[torch.Tensor] = []
        self._sums = torch.zeros(2, dtype=torch.float64)

    @contextmanager
    def watching(self, experts: nn.Module) -> Iterator[None]:
        hook = experts.register_forward_hook(lambda module, args, out: self._seen.append(out.flatten(0, -2)))
        yield
        hook.remove()

    def commit(self) -> None:
        assert self.domain_T is not None
        whole, planned = (out[self.domain_T >= 0].float() for out in self._seen)
        self._sums += torch.stack([(planned * other).sum(1).double().sum() for other in (whole, planned)]).cpu()
        self._seen.clear()

    def discard(self) -> None:
        self._seen.clear()

    @property
    def gain(self) -> float:
        cross, square = self._sums.tolist()
        gain = round(cross / square, DIGITS) if square else 1.0
        return gain if gain > 0 else 1.0


def gain_kinds(
    checkpoint: Checkpoint, geometry: Geometry, plan: Plan, fitted: Mapping[str, float]
) -> Iterator[tuple[str, Plan]]:
    """Yield the plan with one gain and with one per layer, as far as they differ and the checkpoint can carry them.

    Raises:
        PlanError: it can carry neither.
    """
    changed = [gain for gain in fitted.values() if gain != 1.0]
    if not changed:
        return
    one = with_gains(plan, dict.fromkeys(fitted, round(sum(fitted.values()) / len(fitted), DIGITS)))
    each = with_gains(plan, fitted)
    failed = []
    for kind, made in ((ONE, one), *[(EACH, each)] * (one != each)):
        try:
            folded(checkpoint, geometry, made)
        except PlanError as error:
            failed.append(error)
        else:
            yield kind, made
    if len(failed) == 1 + (one != each):
        raise failed[0]


def _best(name: str, candidates: Mapping[str, Plan], found: WhatIf) -> Gained:
    tried = {kind: f"{name}, {kind}" for kind in (ONE, EACH) if f"{name}, {kind}" in candidates}
    helping = {kind: full for kind, full in tried.items() if found.difference(full, name).sign < 0}
    if not helping:
        return Gained(name, candidates[name], None)
    kind = ONE if ONE in helping else EACH
    if len(helping) == 2 and found.difference(helping[EACH], helping[ONE]).sign < 0:
        kind = EACH
    return Gained(name, candidates[helping[kind]], kind)
