"""Numeric verification finds what the byte checks of a wrong plan or a wrong writer could not: wrong numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import Tensors, read_tensors, silent, tiny_model, tokens, write_shards

from expertcut.checkpoint import open_checkpoint
from expertcut.choose import Plan, make_plan
from expertcut.measure.numeric import verify_numeric
from expertcut.model import read_geometry
from expertcut.rewrite import prune
from expertcut.rewrite.verify import Check

DATA = tokens((24, 24), seed=31)
ROUTERS = {
    "qwen3_moe": "model.layers.1.mlp.gate.weight",
    "deepseek_v3": "model.layers.2.mlp.gate.weight",
    "gpt_oss": "model.layers.0.mlp.router.weight",
    "qwen3_vl_moe": "model.language_model.layers.1.mlp.gate.weight",
}


@pytest.fixture(params=ROUTERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(name, tmp_path_factory)


@pytest.fixture
def plan(source: Path) -> Plan:
    checkpoint = open_checkpoint(source)
    return make_plan(checkpoint, read_geometry(checkpoint), strategy="random", experts=6, seed=4)


@pytest.fixture
def out(source: Path, plan: Plan, tmp_path: Path) -> Path:
    checkpoint = open_checkpoint(source)
    prune(checkpoint, read_geometry(checkpoint), plan, tmp_path / "out")
    return tmp_path / "out"


def verify(out: Path, source: Path, plan: Plan) -> list[Check]:
    return verify_numeric(
        open_checkpoint(out), open_checkpoint(source), plan, DATA, device="cpu", notify=silent, advance=silent
    )


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.ok]


def damage(out: Path, change: Callable[[Tensors], None]) -> None:
    tensors = read_tensors(out)
    change(tensors)
    write_shards(out, tensors, 10**9)


def test_a_good_one_passes(out: Path, source: Path, plan: Plan) -> None:
    assert failed(verify(out, source, plan)) == []


def test_router_rows_in_another_order(name: str, out: Path, source: Path, plan: Plan) -> None:
    def swap(tensors: Tensors) -> None:
        tensors[ROUTERS[name]] = tensors[ROUTERS[name]][[1, 0, 2, 3, 4, 5]]

    damage(out, swap)
    assert len(failed(verify(out, source, plan))) == 2


def test_one_bit_of_one_expert(name: str, out: Path, source: Path, plan: Plan) -> None:
    """Too little for the tolerance of the mask, not for equality."""

    def flip(tensors: Tensors) -> None:
        expert = next(n for n in tensors if ".experts." in n and ROUTERS[name].rsplit(".", 2)[0] in n)
        changed = tensors[expert].contiguous().clone()
        changed.view(torch.int16).flatten()[5] ^= 1
        tensors[expert] = changed

    damage(out, flip)
    assert "numeric: logits equal the source's under the plan" in failed(verify(out, source, plan))


def test_experts_of_another_layer(out: Path, source: Path, plan: Plan) -> None:
    """A plan of the right form and the wrong ids: what was written is not what the plan says."""
    turned = zip(plan.layers.items(), reversed(plan.layers.values()), strict=True)
    layers = {prefix: entry.model_copy(update={"kept": other.kept}) for (prefix, entry), other in turned}
    wrong = plan.model_copy(update={"layers": layers})
    assert wrong != plan
    assert len(failed(verify(out, source, wrong))) == 2


def test_forgotten_correction_bias(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    source = tiny_model("deepseek_v3", tmp_path_factory)
    checkpoint = open_checkpoint(source)
    geometry = read_geometry(checkpoint)
    plan = make_plan(checkpoint, geometry, strategy="last", experts=6)
    prune(checkpoint, geometry, plan, tmp_path / "out")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"

    def first_ones(tensors: Tensors) -> None:
        tensors[bias] = read_tensors(source)[bias][:6]

    damage(tmp_path / "out", first_ones)
    assert len(failed(verify(tmp_path / "out", source, plan))) == 2


def test_padding_does_not_enter(source: Path, plan: Plan, out: Path) -> None:
    data = tokens((24, 9, 17), seed=32)
    checks = verify_numeric(
        open_checkpoint(out), open_checkpoint(source), plan, data, device="cpu", notify=silent, advance=silent
    )
    assert failed(checks) == []
    assert "50 tokens" in checks[0].detail


def test_several_micro_batches(source: Path, plan: Plan, out: Path) -> None:
    checks = verify_numeric(
        open_checkpoint(out), open_checkpoint(source), plan, DATA, device="cpu", notify=silent, advance=silent,
        micro_tokens=24,
    )  # fmt: skip
    assert failed(checks) == []
