"""Fitting the cost model: the bounds it must keep on published measurements, and what a fit must find again."""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from golden_names import golden

from expertcut.errors import DataError, UsageError
from expertcut.measure.cost import predict
from expertcut.measure.cost_fit import NAMES, Experiment, boundaries, fit, judge, nelder_mead, read_measured, read_rows
from expertcut.measure.cost_hardware import PRESETS, Constants, Machine, read_machine
from expertcut.measure.cost_model import ModelCost, model_cost
from expertcut.measure.cost_traffic import Load
from expertcut.model import read_geometry

SWITCHED = 192
"""Where the measured engine is suspected to change its strategy."""
PAPER = ("estimate_v2_lite", "estimate_v3")


@cache
def paper(repo: Path, name: str) -> tuple[Experiment, ModelCost, Machine]:
    """The published rows but those of the switch, their model, and its machine."""
    path = repo / "scripts" / f"{name}.json"
    facts = json.loads(path.read_text())
    checkpoint = golden(facts["model"]).checkpoint()
    work = model_cost(checkpoint, read_geometry(checkpoint))
    experiment = Experiment(work, read_measured(path)).only(lambda row: row.concurrency != SWITCHED)
    return experiment, work, read_machine(facts["hardware"])


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_what_the_published_rows_give(repo: Path, name: str) -> None:
    experiment, _, machine = paper(repo, name)
    found = fit(experiment, machine).constants
    assert len(NAMES) == len(Constants.model_fields) == 5
    for constant in NAMES:
        assert getattr(found, constant) == pytest.approx(getattr(machine.constants, constant), rel=0.01)
    assert machine.fitted == experiment.measured.source
    assert 0.5 < found.bandwidth < 0.95 and 0.2 < found.compute < 0.7, "plausible shares of the data sheet"
    assert found.layer_us < 300 and found.moe_us < 300 and found.sequence_us < 300


def test_published_gains_are_met_within_the_bounds(repo: Path) -> None:
    """Mean absolute error 4 points over all rows, 6 of loads left out of the fit, 95 % of pairs in order."""
    seen, unseen, pairs = [], [], np.zeros(2, int)
    for name in PAPER:
        experiment, _, machine = paper(repo, name)
        found = judge(experiment, machine)
        rows = int(experiment.changed.sum())
        seen += [found.error] * rows
        unseen += [found.left_out] * rows
        pairs += experiment.ordered(found.machine)
        assert found.error <= 4 and found.left_out <= 6 and found.drift < 0.05
    assert len(seen) == 52 and pairs[1] == 104
    assert np.mean(seen) <= 4 and np.mean(unseen) <= 6
    assert pairs[0] / pairs[1] >= 0.95


def test_regimes_meet_where_they_were_measured_to(repo: Path) -> None:
    """Half the top-k and half the experts gain alike twice; a factor of two in concurrency."""
    experiment, work, machine = paper(repo, "estimate_v2_lite")
    measured = boundaries(experiment.levers(3, 32))
    points = [
        predict(work, machine, Load(c)) for c in np.unique(np.geomspace(1, 1024, 80).round()).astype(int).tolist()
    ]
    predicted = boundaries([(p.concurrency, p.half_top_k, p.half_experts) for p in points])
    assert measured == pytest.approx([8, 435], rel=0.05)
    assert len(predicted) == 2
    assert all(1 / 2 <= told / was <= 2 for told, was in zip(predicted, measured, strict=True))
    assert list(dict.fromkeys(p.regime for p in points)) == ["memory-bound", "union-saturated", "compute-bound"]


def test_a_fit_finds_the_constants_that_made_the_rows(repo: Path) -> None:
    experiment, work, machine = paper(repo, "estimate_v2_lite")
    made = machine.model_copy(
        update={"constants": Constants(bandwidth=0.6, compute=0.5, layer_us=40, moe_us=50, sequence_us=15)}
    )
    rates = experiment.predicted(made)
    rows = tuple(
        row.model_copy(update={"tokens_per_s": float(rate)})
        for row, rate in zip(experiment.measured.rows, rates, strict=True)
    )
    found = judge(Experiment(work, experiment.measured.model_copy(update={"rows": rows})), PRESETS["a800"])
    assert found.error > 0.1, "one device where there were two"
    exact = judge(Experiment(work, experiment.measured.model_copy(update={"rows": rows})), machine)
    assert exact.error < 0.01 and exact.left_out < 0.1 and exact.drift < 1e-3
    for constant in NAMES:
        assert getattr(exact.machine.constants, constant) == pytest.approx(getattr(made.constants, constant), rel=0.01)


def test_predicted_rows_are_those_of_predict(repo: Path) -> None:
    experiment, work, machine = paper(repo, "estimate_v3")
    for row, rate in zip(experiment.measured.rows, experiment.predicted(machine), strict=True):
        load = Load(row.concurrency, row.input_len, row.output_len)
        assert predict(
            work.with_counts(round(row.experts), row.top_k), machine, load
        ).tokens_per_second == pytest.approx(rate)


def test_the_simplex_finds_a_curved_valley() -> None:
    found = np.array([-1.2, 1.0])
    for _ in range(3):
        found = nelder_mead(lambda x: float(100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2), found)
    assert found == pytest.approx([1, 1], abs=0.01)


def test_boundaries_lie_where_gains_are_equal() -> None:
    assert boundaries([(1, 3, 0), (4, 0, 3), (16, 0, 1)]) == pytest.approx([2])
    assert boundaries([(1, 3, 0), (2, 2, 1)]) == []


ROW = {"experts": 8, "top_k": 2, "concurrency": 1, "input_len": 4, "output_len": 4, "tokens_per_s": 5.0}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "Invalid JSON"),
        ("{}", "rows: Field required"),
        (json.dumps({"rows": []}), "rows: Tuple should have at least 1 item"),
        (json.dumps({"rows": [ROW] * 5}), "found 5 rows, expected 6 or more"),
        (json.dumps({"rows": [ROW] * 6}), "all rows have concurrency 1, expected two or more loads"),
        (json.dumps({"rows": [ROW] * 6 + [ROW | {"tokens_per_s": -1}]}), "rows.6.tokens_per_s: .*than 0, found -1"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_fitted_are_refused_by_field(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(DataError, match=rf"{tmp_path.name}(/bench\.json)?: {told}"):
        read_measured(tmp_path)
    with pytest.raises(DataError, match="No such file"):
        read_measured(tmp_path / "none.json")


def test_a_ratio_of_turns_counts_in_the_place_of_throughputs(tmp_path: Path) -> None:
    load = {"concurrency": 8, "input_len": 32, "output_len": 32}
    rows = [
        load | {"experts": 64, "top_k": 8, "tokens_per_s": 100, "ratio": None},
        load | {"experts": 64, "top_k": 4, "tokens_per_s": 90, "ratio": 1.25},
        load | {"experts": 32, "top_k": 8, "tokens_per_s": 90},
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"rows": rows}))
    assert [row.tokens_per_s for row in read_rows(tmp_path).rows] == [100, 125, 90]


def test_rows_of_another_model_are_refused(repo: Path) -> None:
    rows = read_measured(repo / "scripts/estimate_v3.json")
    with pytest.raises(DataError, match=r"rows\.0: 256 experts with top-8, the model has 64"):
        Experiment(paper(repo, "estimate_v2_lite")[1], rows)


def test_hardware_by_name_and_by_file(tmp_path: Path) -> None:
    assert [read_machine(text).count for text in ("H200x8", "mi300x", "mi300xx4", "rtx4090")] == [8, 1, 4, 1]
    written = tmp_path / "own.json"
    read_machine("h100x4", tp=2).save(written)
    assert read_machine(str(written)) == read_machine("h100x4", tp=2)
    assert read_machine(str(written), ep=4).ep == 4
    yaml = tmp_path / "own.yaml"
    yaml.write_text(
        "memory_gb: 96\nbandwidth_gb_s: 800\nbf16_tflops: 120\nlink_gb_s: 30\n"
        "constants: {bandwidth: 0.8, compute: 0.5, layer_us: 20, moe_us: 5, sequence_us: 9}\n"
    )
    assert (read_machine(str(yaml)).name, read_machine(str(yaml)).count) == ("own", 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("bandwidth_gb_s: -1", "bandwidth_gb_s: .*greater than 0, found -1"),
        ("bandwith: 3", "bandwith: Extra inputs are not permitted, found 3"),
        ("constants: {bandwidth: 2}", "constants.bandwidth: .*less than or equal to 1, found 2"),
        ("count: 6\ntp: 4", "tp 4 does not divide the 6 devices"),
        ("a: [", "neither YAML nor JSON"),
    ],
)
def test_a_file_with_a_wrong_field_names_it(change: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    fields = dict.fromkeys(("memory_gb", "bandwidth_gb_s", "bf16_tflops", "link_gb_s"), 9) | {
        "constants": dict.fromkeys(NAMES, 0.5)
    }
    named = re.findall(r"^\w+", change, re.MULTILINE)
    path.write_text("\n".join([*(f"{k}: {json.dumps(v)}" for k, v in fields.items() if k not in named), change]))
    with pytest.raises(UsageError, match=told):
        read_machine(str(path))


def test_unknown_hardware_lists_what_there_is() -> None:
    with pytest.raises(UsageError, match="h300x8: no such hardware and no such file; there are a100, a800, h100"):
        read_machine("h300x8")
    with pytest.raises(UsageError, match="count: .*greater than or equal to 1"):
        read_machine("h100x0")
