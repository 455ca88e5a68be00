"""What a plan would do: transformers' own numbers, those of the written checkpoint, in one read of the weights."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import load, logits
from tiny_models import calibration, counted_reads, silent, tiny_model, tokens
from tiny_types import tiny_type

from expertcut.calibrate import executor
from expertcut.calibrate.data import CalibrationSet, Sequence
from expertcut.calibrate.passage import Passage
from expertcut.calibrate.run import ProfileOptions
from expertcut.checkpoint import open_checkpoint
from expertcut.choose import Plan, make_plan
from expertcut.choose.topk import Schedule
from expertcut.errors import DataError, PlanError, ProfileError, UsageError
from expertcut.measure.whatif import BASE, METRICS, WhatIf, evaluate
from expertcut.model import read_geometry
from expertcut.rewrite import prune

DATA = tokens((20, 9, 33, 14, 2), seed=21)
FAMILIES = ["qwen3_moe", "deepseek_v3", "deepseek_v2", "gpt_oss", "qwen3_vl_moe", "qwen3_5_moe", "qwen2_moe"]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(request.param, tmp_path_factory)


@pytest.fixture
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3_moe", tmp_path_factory)


def run(folder: Path, data: CalibrationSet = DATA, plans: Mapping[str, Plan] | None = None) -> WhatIf:
    checkpoint = open_checkpoint(folder)
    options = ProfileOptions(device="cpu", micro_tokens=70)
    return evaluate(
        checkpoint, read_geometry(checkpoint), data, plans or {}, options, notify=silent, advance=silent
    )  # fmt: skip


def random_plan(folder: Path, experts: int, top_k: int | None = None, seed: int = 0) -> Plan:
    checkpoint = open_checkpoint(folder)
    geometry = read_geometry(checkpoint)
    return make_plan(checkpoint, geometry, strategy="random", experts=experts, top_k=top_k, seed=seed)


def layered(folder: Path, *changed: int, experts: int = 6) -> Plan:
    """A plan that drops experts in some of the MoE layers only."""
    checkpoint = open_checkpoint(folder)
    geometry = read_geometry(checkpoint)
    plan = random_plan(folder, experts)
    whole = tuple(range(geometry.num_experts))
    layers = {
        prefix: entry if entry.layer in changed else entry.model_copy(update={"kept": whole})
        for prefix, entry in plan.layers.items()
    }
    return plan.model_copy(update={"layers": layers, "per_layer": True})


def written(folder: Path, plan: Plan, out: Path) -> Path:
    checkpoint = open_checkpoint(folder)
    prune(checkpoint, read_geometry(checkpoint), plan, out)
    return out


def by_hand(base: torch.Tensor, other: torch.Tensor, ids: torch.Tensor) -> list[float]:
    """Sums of the metrics over one sequence, from logits (S, V), in float64 and by their definitions."""
    p, q = (scores[:-1].double().softmax(-1) for scores in (base, other))
    target = torch.arange(len(ids) - 1), ids[1:]
    agree = (base[:-1].argmax(-1) == other[:-1].argmax(-1)).sum()
    return [float(v) for v in (-q.log()[target].sum(), (p * (p / q).log()).sum(), agree, torch.minimum(p, q).sum())]


@pytest.mark.parametrize("experts", [None, 6])
def test_the_figures_are_those_of_transformers(folder: Path, experts: int | None, tmp_path: Path) -> None:
    """Every sequence by itself, through transformers' models of both checkpoints."""
    plans = {} if experts is None else {"six": random_plan(folder, experts)}
    found = run(folder, DATA, plans)
    other = folder if experts is None else written(folder, plans["six"], tmp_path / "out")
    assert found.names == (BASE, *plans)
    assert found.tokens.tolist() == [len(s.ids) - 1 for s in DATA.sequences]
    models = load(folder), load(other)
    for i, sequence in enumerate(DATA.sequences):
        ids = torch.from_numpy(sequence.ids)
        base, pruned = (logits(model, ids[None])[0] for model in models)
        expected = by_hand(base, pruned, ids)
        values = [getattr(found, metric)[-1, i] for metric in METRICS]
        np.testing.assert_allclose(values, expected, rtol=2e-5, atol=2e-5)
        assert DATA.sequences[i].domain == found.domains[found.domain[i]]


def test_plans_are_what_they_would_be_once_written(folder: Path, tmp_path: Path) -> None:
    """What-if against the real thing, bit for bit: other experts, another top-k."""
    plans = {"six": random_plan(folder, 6), "six-2": random_plan(folder, 6, top_k=2, seed=1)}
    found = run(folder, DATA, plans)
    for name, plan in plans.items():
        real = run(written(folder, plan, tmp_path / name))
        assert np.array_equal(real.nll[0], found.nll[found.names.index(name)])
        assert found.mean("nll", name) != found.mean("nll", BASE)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2-lite", "olmoe", "mixtral"])
def test_so_are_plans_whose_layers_differ(
    family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Plans that begin alike share their way until they part, and so do those that begin like the base."""
    folder = tiny_model(family, tmp_path_factory)
    checkpoint = open_checkpoint(folder)
    geometry = read_geometry(checkpoint)
    first, *_, last = (block.layer for block in geometry.trunk)
    schedule = make_plan(checkpoint, geometry, top_k=Schedule(3, 2, 1, 2), per_layer=True)
    plans = {
        "first": layered(folder, first), "last": layered(folder, last), "both": layered(folder, first, last),
        "fewer": layered(folder, last, experts=5), "schedule": schedule,
    }  # fmt: skip
    found = run(folder, DATA, plans)
    for name, plan in plans.items():
        real = run(written(folder, plan, tmp_path / name))
        assert np.array_equal(real.nll[0], found.nll[found.names.index(name)]), name
    assert len({found.mean("nll", name) for name in found.names}) == 6


@pytest.mark.parametrize("name", ["deepseek_v4", "ernie4_5_vl_moe", "zaya", "longcat_flash", "gemma4", "jamba"])
def test_so_are_plans_for_unusual_routers(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:  # fmt: skip
    """Tables of ids, two sets of experts, layers that hand on more, experts that do nothing, ruled out tokens."""
    folder = tiny_type(name, tmp_path_factory)
    plans = {"six": random_plan(folder, 6), "all": random_plan(folder, 8)}
    found = run(folder, DATA, plans)
    real = run(written(folder, plans["six"], tmp_path / "six"))
    assert np.array_equal(real.nll[0], found.nll[1])
    assert np.isfinite(found.kl).all() and (found.kl[1] > 0).all()
    assert np.array_equal(found.nll[2], found.nll[0]) and not found.kl[2].any()


def test_any_number_of_plans_costs_one_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = counted_reads(monkeypatch)
    run(folder, DATA, {f"plan-{seed}": random_plan(folder, 6, seed=seed) for seed in range(8)})
    assert len(reads) > 20 and set(reads.values()) == {1}


def test_identity_plan_changes_nothing(folder: Path) -> None:
    experts = read_geometry(open_checkpoint(folder)).num_experts
    found = run(folder, DATA, {"same": random_plan(folder, experts)})
    for metric in METRICS:
        sums = getattr(found, metric)
        assert np.array_equal(sums[1], sums[0])
    assert not found.kl.any() and (found.acceptance == found.tokens).all()


def test_layers_that_plans_do_alike_are_run_once(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: Counter[int] = Counter()
    step = Passage.step

    def counted(self: Passage, index: int, layer: torch.nn.Module, track: int = 0) -> None:
        steps[index] += 1
        step(self, index, layer, track)

    monkeypatch.setattr(Passage, "step", counted)
    plan = random_plan(qwen3, 6)
    plans = {"a": plan, "b": plan, "last": layered(qwen3, 2), "middle": layered(qwen3, 1), "none": layered(qwen3)}
    found = run(qwen3, DATA, plans)
    assert [steps[index] for index in range(3)] == [2, 3, 4]
    assert np.array_equal(found.nll[1], found.nll[2])
    assert np.array_equal(found.nll[5], found.nll[0])


def test_chunks_of_logits_do_not_matter(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than one chunk, and padded across its end."""
    data, plans = tokens((30, 25, 4, 26), seed=3), {"six": random_plan(qwen3, 6)}
    whole = run(qwen3, data, plans)
    monkeypatch.setattr(executor, "CHUNK_TOKENS", 7)
    parts = run(qwen3, data, plans)
    for metric in METRICS:
        np.testing.assert_allclose(getattr(parts, metric), getattr(whole, metric), rtol=1e-5, atol=1e-6)


def test_what_predicts_nothing_does_not_count(qwen3: Path) -> None:
    lone = Sequence(DATA.sequences[0].ids[:1], "code")
    found = run(qwen3, calibration([*tokens((12,), domains=("prose",)).sequences, lone], ("prose", "code")))
    assert found.domains == ("prose",) and found.tokens.tolist() == [11]
    with pytest.raises(DataError, match="nothing to predict"):
        run(qwen3, calibration([lone], ("code",)))


def test_what_does_not_fit_is_refused_before_long_work(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(PlanError, match="another geometry"):
        run(qwen3, DATA, {"foreign": random_plan(tiny_model("olmoe", tmp_path_factory), 6)})
    with pytest.raises(ProfileError, match="513 tokens"):
        run(qwen3, tokens((513,)))
    plan = random_plan(qwen3, 6)
    broken = plan.model_copy(update={"layers": dict(list(plan.layers.items())[:-1])})
    with pytest.raises(PlanError, match="lacks"):
        run(qwen3, DATA, {"broken": broken})
    with pytest.raises(UsageError, match="named 'base'"):
        run(qwen3, DATA, {BASE: plan})
