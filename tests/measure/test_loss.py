"""Held-out loss: transformers' cross entropy, for a model and for plans, in one read of the weights."""

from pathlib import Path

import pytest
import torch
from reference import load, logits
from tiny_models import calibration, counted_reads, silent, tiny_model, tokens

from expertcut.calibrate.data import CalibrationSet, Sequence
from expertcut.calibrate.run import ProfileOptions
from expertcut.checkpoint import open_checkpoint
from expertcut.choose import Plan, make_plan
from expertcut.errors import DataError, PlanError, ProfileError
from expertcut.measure.loss import BASE, ModelLoss, evaluate
from expertcut.model import read_geometry
from expertcut.rewrite import prune

DATA = tokens((20, 9, 33, 14, 2), seed=21)
FAMILIES = ["qwen3_moe", "deepseek_v3", "deepseek_v2", "gpt_oss", "qwen3_vl_moe", "qwen3_5_moe", "qwen2_moe"]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(request.param, tmp_path_factory)


def run(folder: Path, data: CalibrationSet = DATA, **plans: Plan) -> list[ModelLoss]:
    checkpoint = open_checkpoint(folder)
    options = ProfileOptions(device="cpu", micro_tokens=70)
    return evaluate(checkpoint, read_geometry(checkpoint), data, plans, options, notify=silent, advance=silent)


def random_plan(folder: Path, experts: int, top_k: int | None = None, seed: int = 0) -> Plan:
    checkpoint = open_checkpoint(folder)
    geometry = read_geometry(checkpoint)
    return make_plan(checkpoint, geometry, strategy="random", experts=experts, top_k=top_k, seed=seed)


def by_hand(folder: Path, domain: str | None = None) -> tuple[float, int]:
    """Mean loss in nats and number of predicted tokens, every sequence by itself."""
    model, total, count = load(folder), 0.0, 0
    for sequence in DATA.sequences:
        if domain in (None, sequence.domain):
            ids = torch.from_numpy(sequence.ids)
            scores = logits(model, ids[None])[0, :-1].double().log_softmax(-1)
            total -= float(scores[torch.arange(len(ids) - 1), ids[1:]].sum())
            count += len(ids) - 1
    return total / count, count


def test_loss_is_the_mean_over_predicted_tokens(folder: Path) -> None:
    (found,) = run(folder)
    assert found.name == BASE
    nll, count = by_hand(folder)
    assert found.overall.tokens == count == DATA.tokens - len(DATA.sequences)
    assert found.overall.nll == pytest.approx(nll, rel=1e-5)
    assert found.overall.perplexity == pytest.approx(torch.tensor(nll).exp().item(), rel=1e-4)
    assert list(found.domains) == list(DATA.domains)
    for domain, loss in found.domains.items():
        nll, count = by_hand(folder, domain)
        assert loss.nll == pytest.approx(nll, rel=1e-5)
        assert loss.tokens == count


def test_plans_are_what_they_would_be_once_written(folder: Path, tmp_path: Path) -> None:
    """What-if against the real thing, for other experts and for another top-k."""
    plans = {"six": random_plan(folder, 6), "six-2": random_plan(folder, 6, top_k=2, seed=1)}
    base, *planned = run(folder, DATA, **plans)
    assert base.overall == run(folder)[0].overall
    for (name, plan), found in zip(plans.items(), planned, strict=True):
        checkpoint = open_checkpoint(folder)
        prune(checkpoint, read_geometry(checkpoint), plan, tmp_path / name)
        (written,) = run(tmp_path / name)
        assert found.name == name
        assert found.overall == written.overall
        assert found.domains == written.domains
        assert found.overall.nll != base.overall.nll


def test_any_number_of_plans_costs_one_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = counted_reads(monkeypatch)
    run(folder, DATA, **{f"plan-{seed}": random_plan(folder, 6, seed=seed) for seed in range(3)})
    assert set(reads.values()) == {1}


def test_identity_plan_changes_nothing(folder: Path) -> None:
    experts = read_geometry(open_checkpoint(folder)).num_experts
    base, same = run(folder, same=random_plan(folder, experts))
    assert (same.overall, same.domains) == (base.overall, base.domains)


def test_chunks_of_logits_do_not_matter(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Longer than one chunk of 256 positions, and padded across its end."""
    folder = tiny_model("qwen3_moe", tmp_path_factory)
    data = tokens((300, 257, 40, 256), domains=("prose",), seed=3)
    together, apart = run(folder, data)[0].overall, [run(folder, calibration([s], ("prose",))) for s in data.sequences]
    assert together.tokens == sum(found.overall.tokens for (found,) in apart) == 300 + 257 + 40 + 256 - 4
    mean = sum(found.overall.nll * found.overall.tokens for (found,) in apart) / together.tokens
    assert together.nll == pytest.approx(mean, rel=1e-5)


def test_domain_without_a_predicted_token_has_no_loss(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_model("qwen3_moe", tmp_path_factory)
    sequences = [*tokens((12,), domains=("prose",)).sequences, Sequence(DATA.sequences[0].ids[:1], "code")]
    (found,) = run(folder, calibration(sequences, ("prose", "code")))
    assert list(found.domains) == ["prose"]
    with pytest.raises(DataError, match="nothing to predict"):
        run(folder, calibration(sequences[1:], ("code",)))


def test_what_does_not_fit_is_refused_before_long_work(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_model("qwen3_moe", tmp_path_factory)
    with pytest.raises(PlanError, match="another geometry"):
        run(folder, foreign=random_plan(tiny_model("olmoe", tmp_path_factory), 6))
    with pytest.raises(ProfileError, match="513 tokens"):
        run(folder, tokens((513,)))
    plan = random_plan(folder, 6)
    broken = plan.model_copy(update={"layers": dict(list(plan.layers.items())[:-1])})
    with pytest.raises(PlanError, match="lacks"):
        run(folder, broken=broken)
