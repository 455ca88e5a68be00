"""The models that every law is checked on, and what the laws have in common."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_models import NAMES, tiny_model

from expertcut.checkpoint import Checkpoint, open_checkpoint
from expertcut.choose import LayerPlan, Plan, Source, make_plan
from expertcut.choose.plan import min_experts
from expertcut.model import Geometry, fingerprint, read_geometry

DEMO = "built-in model"
VARIABLE = "EXPERTCUT_MODELS"
_UNSET = pytest.mark.skip(reason=f"{VARIABLE} is unset: name a folder of checkpoints to check the laws on them too")


def _others() -> dict[str, Path]:
    """Checkpoints in the folder that the environment names."""
    folder = os.environ.get(VARIABLE)
    return {path.parent.name: path.parent for path in sorted(Path(folder).glob("*/config.json"))} if folder else {}


OTHERS = _others()
MODELS = [*NAMES, DEMO, *(OTHERS or [pytest.param(VARIABLE, marks=_UNSET)])]


class Model:
    """An opened checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        self.geometry: Geometry = read_geometry(self.checkpoint)

    @property
    def fewer(self) -> int:
        """About five eighths of the experts, equally many in every group."""
        groups = self.geometry.n_group
        least = max(min_experts(self.geometry), self.geometry.top_k)
        return max(self.geometry.num_experts * 5 // 8 // groups * groups, -(-least // groups) * groups)

    def random_plan(self, seed: int = 0, top_k: int | None = None) -> Plan:
        """Other experts in every layer."""
        return make_plan(self.checkpoint, self.geometry, strategy="random", experts=self.fewer, top_k=top_k, seed=seed)

    def plan(self, kept: Sequence[int], top_k: int | None = None) -> Plan:
        """The same experts in every layer."""
        layers = {
            prefix: LayerPlan(layer=b.layer, kept=tuple(kept), top_k=top_k)
            for b in self.geometry.trunk
            for prefix in b.keys
        }
        source = Source(name="model", fingerprint=fingerprint(self.checkpoint, self.geometry))
        return Plan(source=source, layers=layers)


def open_model(name: str, factory: pytest.TempPathFactory, demo_model: Path) -> Model:
    """One of `MODELS`. Read only."""
    if name in NAMES:
        return Model(tiny_model(name, factory))
    return Model(demo_model if name == DEMO else OTHERS[name])
