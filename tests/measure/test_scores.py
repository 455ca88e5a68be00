"""Runs side by side: paired differences by document, and refusals of what is not alike."""

import json
from pathlib import Path

import numpy as np
import pytest

from expertcut.errors import DataError
from expertcut.measure.intervals import LEAST
from expertcut.measure.scores import Metric, Run, compare, difference, mean, read_run


def run(model: str, *values: float, task: str = "sums", documents: int | None = None) -> Run:
    """A run of one task with these values, one a document, and a metric that is no mean."""
    count = len(values) if documents is None else documents
    metrics = (
        Metric(task=task, metric="acc", higher_is_better=True, value=float(np.mean(values)), values=values),
        Metric(task=task, metric="perplexity", higher_is_better=False, value=3.0, values=None),
    )
    return Run(
        model=model, engine="none", asked=(task,), documents={task: tuple(map(str, range(count)))}, metrics=metrics
    )  # fmt: skip


def test_a_difference_is_paired() -> None:
    """Documents that are hard for both widen the interval of each model, not that of their difference."""
    hard = np.random.default_rng(0).random(200) < 0.5
    base, other = hard.astype(float), hard.astype(float)
    other[:20] = 0
    gap, _ = compare(run("base", *base), run("other", *other))
    assert gap.change == difference(other, base) and gap.change is not None
    assert gap.change.value == pytest.approx(mean(other).value - mean(base).value)
    assert gap.change.sign == -1
    own, shared = mean(base), gap.change
    assert own.high is not None and own.low is not None and shared.high is not None and shared.low is not None
    assert own.high - own.low > 2 * (shared.high - shared.low)


def test_what_is_no_mean_has_no_interval() -> None:
    _, gap = compare(run("base", 1, 0), run("other", 1, 1))
    assert gap.base.metric == "perplexity" and gap.change is None


def test_few_documents_have_no_interval() -> None:
    few = [1.0] * (LEAST - 1)
    gap, _ = compare(run("base", *few), run("other", *few))
    assert gap.change is not None and gap.change.low is None


def test_only_values_between_0_and_1_are_shares() -> None:
    assert run("a", 0, 1, 0.5).metrics[0].share
    assert not run("a", 0, 1.5).metrics[0].share and not run("a", 1).metrics[1].share


def test_other_documents_are_refused() -> None:
    base = run("base", 1, 0, 1)
    with pytest.raises(DataError, match="found 2, expected 3$"):
        compare(base, run("other", 1, 0))
    moved = base.model_copy(update={"model": "other", "documents": {"sums": ("0", "2", "1")}})
    with pytest.raises(DataError, match="found 3, expected 3 others"):
        compare(base, moved)
    with pytest.raises(DataError, match="task sums: other and base .* found 0, expected 3"):
        compare(base, run("other", 1, 0, 1, task="products"))


def test_a_run_is_read_back_from_the_document(tmp_path: Path) -> None:
    base, file = run("base", 1, 0.25), tmp_path / "base.json"
    document = {"tasks": {"runs": [base.model_dump(), run("plan", 0, 0).model_dump()]}}
    file.write_text(json.dumps(document, indent=2))
    assert read_run(file) == base


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tasks": {"runs": []}}', '{"tasks": {"runs": [{"model": 1}]}}'])
def test_a_file_without_a_run_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(text)
    with pytest.raises(DataError, match=r"base\.json: found no results of tasks"):
        read_run(tmp_path / "base.json")
