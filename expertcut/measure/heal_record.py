"""What the provenance of a healed plan says of the healing. `heal` and `prune --heal` write it; others only show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from expertcut.choose.plan import Plan
from expertcut.measure.intervals import Estimate

KEY = "healing"
"""Its name in the provenance."""


@dataclass(frozen=True)
class LayerHealed:
    """What was done to one MoE layer."""

    layer: int
    ridge: float | None
    """None: no ridge helped on held-back text, so that nothing changed."""
    changed: int
    """Down projections with new values."""
    maps: int
    """Down projections in all, shared experts' included."""
    left: float
    """Share of the squared residual that is left, on the text that was fitted."""

    @property
    def row(self) -> tuple[str, str, str, str]:
        """In words: layer, ridge, projections refitted, residual left."""
        ridge = "none helps" if self.ridge is None else f"{self.ridge:g}"
        return (str(self.layer), ridge, f"{self.changed} of {self.maps}", f"{self.left:.1%}")


@dataclass(frozen=True)
class Tried:
    """One of the plans that were compared."""

    name: str
    layers: int
    """How many layers, the first ones, had new values."""
    change: Estimate
    """Of the loss beside the unchanged model's, nats per token."""
    beside: Estimate
    """Of the loss beside that of the plan as it came, nats per token."""


class HealRecord(BaseModel):
    """How a plan was healed, and what that gave on text that was not fitted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    of: str
    """Hash of what was healed: the plan, both texts and the dtype."""
    command: str
    tokens: int
    """Of the text that was fitted."""
    judged_tokens: int
    """That were predicted, of the text that was not."""
    kept: str
    """The name of what was kept, of those in `tried`: of the plan as it came if nothing helps."""
    domains: dict[str, Estimate]
    """What `beside` is for what was kept, by domain of the text that it was judged on; empty if there is only one."""
    distilled: bool
    layers: list[LayerHealed]
    tried: list[Tried]
    """What has a finite loss, the plan as it came first."""

    @classmethod
    def of_plan(cls, plan: Plan) -> HealRecord | None:
        """Return what a plan says; None if it was not healed, or says so in a form that is not this one."""
        try:
            return cls.model_validate(plan.provenance.get(KEY))
        except ValidationError:
            return None

    @classmethod
    def of_healed(cls, plan: Plan) -> HealRecord | None:
        """Return what a plan says if healing changed it."""
        found = cls.of_plan(plan)
        return found if found is not None and found.helped else None

    @property
    def refitted(self) -> str:
        """Which layers have new values, in words; empty if none."""
        layers, whole = self.best.layers, len(self.layers)
        part = f"all {whole} MoE layers" if layers == whole else f"the first {layers} of {whole} MoE layers"
        return f"down projections in {part}" if layers else ""

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """What was tried: name, change of the loss, that beside the plan as it came, and which was kept."""
        return [
            (one.name, one.change.shown, one.beside.shown if at else "", "kept" if one.name == self.kept else "")
            for at, one in enumerate(self.tried)
        ]

    @property
    def best(self) -> Tried:
        """What was kept."""
        return next(one for one in self.tried if one.name == self.kept)

    @property
    def helped(self) -> bool:
        """False if the plan is as it came."""
        return self.kept != self.tried[0].name

    @property
    def harmed(self) -> list[str]:
        """Domains that do significantly worse than with the plan as it came."""
        return [name for name, change in self.domains.items() if change.sign > 0]

    @property
    def told(self) -> str:
        """What came of it, in one line."""
        if not self.helped:
            return "nothing kept: held-out text does not show that it helps"
        on = f"nats per token beside the plan as it came, on {self.judged_tokens:,} tokens"
        worse = f"; worse in {', '.join(self.harmed)}" if self.harmed else ""
        return f"{self.kept}: {self.best.beside.shown} {on}{worse}"

    @model_validator(mode="after")
    def _kept_is_tried(self) -> Self:
        if self.kept not in (one.name for one in self.tried):
            raise ValueError(f"kept {self.kept!r}, which was not tried")
        return self
