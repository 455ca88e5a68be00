"""`make_plan` on tiny checkpoints: every strategy, provenance, and options that do not go together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from choose_models import profile, write_checkpoint

from expertcut.calibrate.profile import CONTRIBUTION, MIXED_E, Profile
from expertcut.checkpoint import Checkpoint, read_array
from expertcut.choose import CRITERIA, Plan, make_plan, parse_domain_weights
from expertcut.errors import PlanError, ProfileError, UsageError
from expertcut.model import Geometry, check_fingerprint, read_geometry

Model = tuple[Checkpoint, Geometry]
ASCENDING = np.tile(np.arange(8.0), (2, 1))


@pytest.fixture(scope="module", params=["plain", "grouped"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("model"), grouped=request.param == "grouped")
    return checkpoint, read_geometry(checkpoint)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Model:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("plain"))
    return checkpoint, read_geometry(checkpoint)


def rising(model: Model) -> Profile:
    """Two domains; in both, every sum and maximum rises with the expert's id, and so do the losses on the diagonals."""
    sums = ("count", "gate_sum", "norm_sum", "norm_sq_sum", "gated_norm_sum", "gated_norm_sq_sum", "act_max")
    pairs = np.diag(ASCENDING.sum(axis=0))[np.tril_indices(8)][None]
    rest = {"out_sum": np.zeros((2, 8, 4)), "out_sq_sum_h": np.tile(ASCENDING[:, :, None], 4), "tokens": np.full(2, 99)}
    stats = (
        dict.fromkeys((*sums, *MIXED_E, CONTRIBUTION), ASCENDING) | dict.fromkeys(("coenergy", "gram"), pairs) | rest
    )
    return profile(model, stats)


def kept(plan: Plan) -> list[tuple[int, ...]]:
    return [layer.kept for layer in plan.layers.values()]


@pytest.mark.parametrize("strategy", [*CRITERIA, "unified:1,2,sum", "unified:2,1"])
def test_every_strategy_makes_a_plan_that_is_the_models(model: Model, strategy: str) -> None:
    plan = make_plan(*model, strategy=strategy, keep=0.5, profile=rising(model), command="expertcut plan …")
    assert list(plan.layers) == ["model.layers.0.mlp", "model.layers.1.mlp"], "prediction layers follow in lockstep"
    assert plan.experts == 4
    assert all(layer.top_k is None for layer in plan.layers.values())
    check_fingerprint(plan.source.fingerprint, *model)
    assert plan == make_plan(*model, strategy=strategy, keep=0.5, profile=rising(model), command="expertcut plan …")
    groups = [ids // 4 for ids in plan.layers["model.layers.0.mlp"].kept]
    assert model[1].n_group == 1 or groups == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("strategy", "flat", "grouped"),
    [
        ("odd", (1, 3, 5, 7), (1, 3, 5, 7)),
        ("even", (0, 2, 4, 6), (0, 2, 4, 6)),
        ("first", (0, 1, 2, 3), (0, 1, 4, 5)),
        ("last", (4, 5, 6, 7), (2, 3, 6, 7)),
        ("frequency", (4, 5, 6, 7), (2, 3, 6, 7)),
        ("easy-ep", (4, 5, 6, 7), (2, 3, 6, 7)),
        ("mone", (4, 5, 6, 7), (2, 3, 6, 7)),
        ("hope", (4, 5, 6, 7), (2, 3, 6, 7)),
        ("gram", (4, 5, 6, 7), (2, 3, 6, 7)),
        ("unified:1,2,sum", (4, 5, 6, 7), (2, 3, 6, 7)),
    ],
)
def test_half_of_each_group(model: Model, strategy: str, flat: tuple[int, ...], grouped: tuple[int, ...]) -> None:
    plan = make_plan(*model, strategy=strategy, experts=4, profile=rising(model))
    assert kept(plan) == [flat if model[1].n_group == 1 else grouped] * 2


def test_odd_takes_even_experts_last(plain: Model) -> None:
    assert kept(make_plan(*plain, strategy="odd", experts=6))[0] == (0, 1, 2, 3, 5, 7)
    assert kept(make_plan(*plain, strategy="odd", experts=2))[0] == (1, 3)


def test_router_norm_reads_the_routers(plain: Model) -> None:
    plan = make_plan(*plain, strategy="router-norm", experts=3)
    for prefix, layer in plan.layers.items():
        norms = np.linalg.norm(read_array(plain[0], f"{prefix}.gate.weight"), axis=1)
        assert set(layer.kept) == set(np.argsort(norms)[-3:].tolist())


def test_aimer_reads_the_experts_and_tells_how_far_it_is(plain: Model) -> None:
    heard: list[tuple[int, int]] = []
    plan = make_plan(*plain, strategy="aimer", experts=3, advance=lambda done, total: heard.append((done, total)))
    for prefix, layer in plan.layers.items():
        parts = [[f"{prefix}.experts.{e}.{part}_proj.weight" for part in ("gate", "up", "down")] for e in range(8)]
        weights = np.stack([[read_array(plain[0], name) for name in names] for names in parts]).reshape(8, -1)
        ratio = np.abs(weights).mean(axis=1) / np.sqrt((weights**2).mean(axis=1))
        assert set(layer.kept) == set(np.argsort(ratio)[:3].tolist())
    experts = 2 * 8 * 3 * 4 * 4 * 4
    assert [done for done, _ in heard] == list(range(64, experts + 1, 64))
    assert {total for _, total in heard} == {experts + 2 * 8 * 4 * 4}, "the routers' rows count, too"
    heard.clear()
    make_plan(*plain, strategy="router-norm", experts=3, advance=lambda done, total: heard.append((done, total)))
    assert not heard


@pytest.mark.parametrize("strategy", ["hope", "gram"])
def test_experts_that_lose_much_together_are_parted(plain: Model, strategy: str) -> None:
    """Alone 0 and 1 lose least; together they lose more than one of them and 2."""
    loss = np.diag([1.0, 1, 2, 9, 9, 9, 9, 9])
    loss[0, 1] = loss[1, 0] = 5
    made = profile(plain, {strategy_sum(strategy): loss[np.tril_indices(8)][None]})
    assert kept(make_plan(*plain, strategy=strategy, experts=6, profile=made))[0] == (0, 3, 4, 5, 6, 7)
    plan = make_plan(*plain, strategy=strategy, experts=6, profile=made, protect=["1"])
    assert kept(plan)[0] == (1, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("strategy", ["hope", "gram"])
def test_domain_weights_need_pairs_by_domain(plain: Model, strategy: str) -> None:
    made = rising(plain)
    with pytest.raises(ProfileError, match=f"{strategy_sum(strategy)}: statistics of pairs are pooled") as caught:
        make_plan(*plain, strategy=strategy, experts=4, profile=made, domain_weights={"code": 1})
    assert caught.value.hint == "profile again with --pair-domains"
    same = make_plan(*plain, strategy=strategy, experts=4, profile=made, domain_weights={"code": 2, "prose": 2})
    assert kept(same) == kept(make_plan(*plain, strategy=strategy, experts=4, profile=made))
    halves = np.stack([np.diag(order)[np.tril_indices(8)] for order in (np.arange(8.0), 2 * np.arange(8.0)[::-1])])
    by_domain = profile(plain, {strategy_sum(strategy): halves}, pair_domains=True)
    for weights, best in ((None, (0, 1)), ({"code": 1}, (6, 7)), ({"code": 3, "prose": 1}, (6, 7))):
        plan = make_plan(*plain, strategy=strategy, experts=2, profile=by_domain, domain_weights=weights)
        assert kept(plan)[0] == best


def strategy_sum(strategy: str) -> str:
    return "coenergy" if strategy == "hope" else strategy


@pytest.mark.parametrize(
    ("strategy", "message", "hint"),
    [
        ("mone", "out_sum: it was made without --moments", "profile again with --moments"),
        ("easy-ep", "contribution_sum: it was made before .* not plainly added", "use another --strategy, such as"),
        ("unified:1,2", "gate_norm_sq_sum: it was made before", "profile again: expertcut profile MODEL -o PROFILE"),
    ],
)
def test_a_profile_that_lacks_what_the_strategy_needs(plain: Model, strategy: str, message: str, hint: str) -> None:
    with pytest.raises(ProfileError, match=rf"the profile has no model\.layers\.0\.mlp/{message}") as caught:
        make_plan(*plain, strategy=strategy, experts=4, profile=profile(plain, {"count": ASCENDING}))
    assert str(caught.value.hint).startswith(hint)


def test_random_differs_by_layer_and_seed(plain: Model) -> None:
    plans = [make_plan(*plain, strategy="random", experts=4, seed=seed) for seed in range(5)]
    assert len({ids for plan in plans for ids in kept(plan)}) > 5


def test_domain_weights_choose_the_domain(plain: Model) -> None:
    made = profile(plain, {"count": np.array([np.arange(8.0), 2 * np.arange(8.0)[::-1]])})
    low, high = (0, 1), (6, 7)

    def best(weights: dict[str, float] | None) -> tuple[int, ...]:
        return kept(make_plan(*plain, strategy="frequency", experts=2, profile=made, domain_weights=weights))[0]

    assert best(None) == low
    assert best({"code": 1}) == high
    assert best({"code": 3, "prose": 1}) == high
    assert best({"code": 1, "prose": 1}) == low
    with pytest.raises(UsageError, match="domain 'law' is not in the profile; it has code, prose"):
        best({"law": 1})


def test_protection_is_kept_and_recorded(plain: Model) -> None:
    made = profile(plain, {"count": ASCENDING}, act_max={0: [1.0] * 8, 1: [50.0, *[1.0] * 7]})
    plan = make_plan(*plain, strategy="frequency", experts=3, profile=made, protect=["1:2"], protect_super=True)
    assert kept(plan) == [(5, 6, 7), (0, 2, 7)]
    assert plan.provenance["protected"] == {"model.layers.1.mlp": [2]}
    assert plan.provenance["super_experts"] == {"model.layers.1.mlp": [0]}
    with pytest.raises(PlanError, match="layer 1: 2 experts are protected, but only 1 are kept"):
        make_plan(*plain, strategy="frequency", experts=1, top_k=1, profile=made, protect=["1:2"], protect_super=True)


def test_super_experts_are_those_of_all_domains(plain: Model) -> None:
    """A zero-weight domain does not count for the score, but what would wreck it stays."""
    made = profile(plain, {"count": ASCENDING}, act_max={0: [1.0] * 8, 1: [50.0, *[1.0] * 7]})
    plan = make_plan(
        *plain, strategy="frequency", experts=2, profile=made, domain_weights={"code": 1}, protect_super=True
    )
    assert kept(plan) == [(6, 7), (0, 7)]


def test_top_k_is_written_only_if_it_changes(plain: Model) -> None:
    assert make_plan(*plain, strategy="odd", experts=4, top_k=1).layers["model.layers.0.mlp"].top_k == 1
    assert make_plan(*plain, strategy="odd", experts=4, top_k=2).layers["model.layers.0.mlp"].top_k is None


def test_top_k_beyond_the_kept_experts(plain: Model) -> None:
    with pytest.raises(PlanError, match="top_k=2 exceeds the 1 experts kept in layer 0") as caught:
        make_plan(*plain, strategy="odd", experts=1)
    assert caught.value.hint == "keep at least 2 or pass --top-k 1"
    assert make_plan(*plain, strategy="odd", experts=1, top_k=1).experts == 1


def test_fit_chooses_among_the_candidates(plain: Model) -> None:
    nbytes = plain[0].nbytes
    plan = make_plan(*plain, strategy="odd", fit=nbytes - 1, fit_candidates=[2, 4, 6])
    assert plan.experts == 6
    assert plan.provenance["budget"] == {
        "option": f"--fit {nbytes - 1}B --tp 1",
        "experts": 6,
        "note": "keeping 6 of 8 experts: 2.69 KiB of weights in 1 x 3.50 KiB, by tensor sizes",
    }


def test_provenance_says_how_and_not_when(plain: Model) -> None:
    made = rising(plain)
    plan = make_plan(
        *plain, strategy="reap", keep=0.5, profile=made, domain_weights={"code": 2.0}, seed=3, command="a \udcff b"
    )
    assert plan.provenance == {
        "criterion": "reap",
        "paper": "arXiv:2510.13999",
        "seed": 3,
        "budget": {"option": "--keep 0.5", "experts": 4, "note": "keeping 4 of 8 experts (50.0%)"},
        "top_k": None,
        "protected": {},
        "super_experts": {},
        "domain_weights": {"code": 2.0},
        "profile": made.digest(),
        "calibration_text": None,
        "command": "a \\udcff b",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "reap"}, "strategy reap needs --profile; strategies that need none: random, odd, .*aimer$"),
        ({"strategy": "odd", "protect_super": True}, "protecting super experts needs --profile"),
        ({"strategy": "odd", "domain_weights": {"code": 1}}, "domain weights have no effect on strategy odd"),
        ({"strategy": "odd", "top_k": 0}, "--top-k 0: expected 1 or more"),
        ({"strategy": "best"}, "unknown strategy 'best'"),
    ],
)
def test_options_that_do_not_go_together(plain: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(*plain, experts=4, **options)


def test_a_profile_of_another_model_is_refused(plain: Model, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1)
    stranger = rising((other, read_geometry(other)))
    with pytest.raises(PlanError, match="the profile was made for another model"):
        make_plan(*plain, strategy="reap", experts=4, profile=stranger)


def test_domain_weights_parse() -> None:
    assert parse_domain_weights("code=2, math=0.5,a=b=1") == {"code": 2, "math": 0.5, "a=b": 1}


@pytest.mark.parametrize("text", ["", "code", "code=", "=1", "code=x", "code=-1", "code=nan", "code=inf", "code=1,"])
def test_domain_weights_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="expected NAME=WEIGHT, 0 or more"):
        parse_domain_weights(text)


def test_a_domain_has_one_weight() -> None:
    with pytest.raises(UsageError, match="domain 'code' has two weights, 1 and 2"):
        parse_domain_weights("code=1,code=2")
