"""Continuations: transformers' own log-probabilities and greedy choices, however requests share texts and passes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import load, logits
from tiny_models import VOCAB, counted_reads, silent, tiny_model
from tiny_types import tiny_type

from expertcut.calibrate.passage import Passage
from expertcut.calibrate.run import ProfileOptions
from expertcut.checkpoint import open_checkpoint
from expertcut.choose import Plan, make_plan
from expertcut.errors import DataError, PlanError, UsageError
from expertcut.measure import continuations
from expertcut.measure.continuations import Predicted, Request, predict
from expertcut.measure.quality import BASE
from expertcut.model import read_geometry
from expertcut.rewrite import prune

FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_vl_moe", "qwen3_5_moe", "jamba", "gemma4"]


def requests(
    seed: int = 3, lengths: Sequence[tuple[int, int]] = ((9, 1), (4, 3), (15, 6), (1, 2), (7, 7))
) -> list[Request]:
    """Random ids, some contexts twice, with other continuations."""
    random = np.random.default_rng(seed)
    made = [tuple(random.integers(1, 88, size).tolist() for size in pair) for pair in lengths]
    contexts = [context for context, _ in made]
    return [*made, (contexts[0], [5]), (contexts[2], [7, 8]), (contexts[2][:6], contexts[2][6:8])]


def run(
    folder: Path, asked: Sequence[Request], plans: Mapping[str, Plan] | None = None, micro_tokens: int = 40
) -> Predicted:
    checkpoint = open_checkpoint(folder)
    options = ProfileOptions(device="cpu", micro_tokens=micro_tokens)
    return predict(checkpoint, read_geometry(checkpoint), plans or {}, asked, options, notify=silent, advance=silent)


def random_plan(folder: Path, experts: int = 6, seed: int = 0) -> Plan:
    checkpoint = open_checkpoint(folder)
    return make_plan(checkpoint, read_geometry(checkpoint), strategy="random", experts=experts, seed=seed)


@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_those_of_transformers(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each by itself through transformers' model. The greedy choice is asked for too, so that some are greedy."""
    folder = (tiny_type if name in ("jamba", "gemma4") else tiny_model)(name, tmp_path_factory)
    model, asked = load(folder), requests()
    best = int(logits(model, torch.tensor([asked[0][0]]))[0, -1].argmax())
    asked.append((asked[0][0], [best]))
    found = run(folder, asked)
    assert found.names == (BASE,)
    for i, (context, continuation) in enumerate(asked):
        scores = logits(model, torch.tensor([[*context, *continuation[:-1]]]))[0, len(context) - 1 :].double()
        picked = scores.log_softmax(-1)[torch.arange(len(continuation)), torch.tensor(continuation)]
        assert found.logprob[0, i] == pytest.approx(float(picked.sum()), rel=2e-5, abs=2e-5)
        assert found.greedy[0, i] == (scores.argmax(-1) == torch.tensor(continuation)).all()
    assert found.greedy[0, -1] and not found.greedy.all()


def test_plans_are_what_they_would_be_once_written(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    folder, asked = tiny_model("deepseek_v3", tmp_path_factory), requests()
    plans = {"nine": random_plan(folder, 9), "six": random_plan(folder, 6, seed=1)}
    found = run(folder, asked, plans)
    assert found.names == (BASE, "nine", "six")
    checkpoint = open_checkpoint(folder)
    for i, (name, plan) in enumerate(plans.items(), 1):
        prune(checkpoint, read_geometry(checkpoint), plan, tmp_path / name)
        assert np.array_equal(run(tmp_path / name, asked).logprob[0], found.logprob[i])
        assert not np.array_equal(found.logprob[i], found.logprob[0])


ids = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)


@given(st.lists(ids, min_size=1, max_size=20))
def test_what_begins_another_rides_along(texts: list[tuple[int, ...]]) -> None:
    """Every text is found again as a beginning, and no kept one is the beginning of another."""
    kept, at = continuations._texts(texts)
    assert [kept[text][:length] for text, length in at] == texts
    assert not any(a == b[: len(a)] for a in kept for b in kept if a is not b)


def test_shared_beginnings_are_run_once(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four answers of one token behind a question, and problems in one list, are one sequence; the figures stay."""
    folder = tiny_model("qwen3_moe", tmp_path_factory)
    context = np.random.default_rng(1).integers(1, 88, 30).tolist()
    choices: list[Request] = [(context, [answer]) for answer in (11, 12, 13, 14)]
    listed: list[Request] = [(context[:n], context[n : n + 3]) for n in range(4, 27, 3)]
    alone = [run(folder, [request]).logprob[0, 0] for request in choices + listed]
    shapes: list[torch.Size] = []
    step = Passage.step

    def noted(self: Passage, *args: object) -> None:
        shapes.extend(prepared.batch.ids.shape for prepared in self.prepared)
        step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Passage, "step", noted)
    together = run(folder, choices + listed)
    assert set(shapes) == {torch.Size((1, 30))}
    np.testing.assert_allclose(together.logprob[0], alone, rtol=1e-5, atol=1e-5)


def test_portions_that_fit_are_run_one_after_the_other(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked, progress = tiny_model("qwen3_moe", tmp_path_factory), requests(), list[tuple[int, int]]()
    plans = {"six": random_plan(folder)}
    whole = run(folder, asked, plans)
    monkeypatch.setattr(continuations, "HIDDEN_BYTES", 24 * 2 * 32 * 4)  # 24 tokens of hidden 32 for two models
    reads = counted_reads(monkeypatch)
    checkpoint = open_checkpoint(folder)
    parts = predict(
        checkpoint, read_geometry(checkpoint), plans, asked, ProfileOptions(device="cpu", micro_tokens=40),
        notify=silent, advance=lambda done, total: progress.append((done, total)),
    )  # fmt: skip
    texts, _ = continuations._texts([(*context, *answer[:-1]) for context, answer in asked])
    held = [sum(len(texts[i]) for i in portion) for portion in continuations._portions(texts, 24)]
    assert max(held) <= 24 and sum(held) == sum(map(len, texts))
    portions = reads["model.layers.0.mlp.gate.weight"]
    assert portions == len(held) > 2 and set(reads.values()) == {1, portions}  # 1: embeddings, norm and head
    assert progress == [(done, 3 * portions) for done in range(1, 3 * portions + 1)]
    assert np.array_equal(parts.greedy, whole.greedy)
    np.testing.assert_allclose(parts.logprob, whole.logprob, rtol=1e-5, atol=1e-5)


def test_a_context_that_is_too_long_loses_its_beginning(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_model("qwen3_moe", tmp_path_factory)  # 512 positions
    random = np.random.default_rng(0)
    context, continuation = random.integers(1, 88, 600).tolist(), random.integers(1, 88, 4).tolist()
    found = run(folder, [(context, continuation), (context[600 - 509 :], continuation)])
    assert found.logprob[0, 0] == found.logprob[0, 1]
    with pytest.raises(DataError, match="continuation of 513 tokens, but the model has 512"):
        run(folder, [(context, context[:513])])


def test_what_does_not_fit_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_model("qwen3_moe", tmp_path_factory)
    with pytest.raises(PlanError, match="another geometry"):
        run(folder, requests(), {"foreign": random_plan(tiny_model("olmoe", tmp_path_factory))})
    with pytest.raises(UsageError, match="named 'base'"):
        run(folder, requests(), {BASE: random_plan(folder)})


def test_some_continuations_are_certain(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Over all tokens that may follow, probabilities come to one, and just one of them is greedy."""
    folder = tiny_model("qwen3_moe", tmp_path_factory)
    found = run(folder, [([3, 1, 4], [token]) for token in range(VOCAB)])
    assert np.exp(found.logprob[0]).sum() == pytest.approx(1, abs=1e-5)
    assert found.greedy.sum() == 1 and found.greedy[0].argmax() == found.logprob[0].argmax()
