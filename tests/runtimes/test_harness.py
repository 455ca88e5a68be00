"""The real lm-eval on local files, without the Hub: its own figures, the same ones from every engine, per document."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from local_tasks import CHOICE, GIVEN, GROUP, SUMS, TEXT, WRITTEN, completions_server, write_tasks
from tiny_models import silent
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertcut.calibrate.run import ProfileOptions
from expertcut.checkpoint import open_checkpoint
from expertcut.choose import Plan, make_plan
from expertcut.choose.topk import Schedule
from expertcut.errors import DataError, RuntimeLintError, UsageError
from expertcut.measure.arithmetic import arithmetic_accuracy, arithmetic_items
from expertcut.measure.continuations import predict
from expertcut.measure.quality import BASE
from expertcut.measure.scores import Metric, Run, compare
from expertcut.model import read_geometry
from expertcut.model.summary import max_positions
from expertcut.rewrite import prune
from expertcut.runtimes.engines import StreamedLM, in_transformers, served
from expertcut.runtimes.harness import load_suite, run_suite

NAMES = (CHOICE, GIVEN, TEXT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def streamed(path: Path, plans: dict[str, Plan] | None = None) -> StreamedLM:
    checkpoint = open_checkpoint(path)
    geometry = read_geometry(checkpoint)
    options = ProfileOptions(device="cpu")

    def ask(requests: Any) -> Any:
        return predict(checkpoint, geometry, plans or {}, requests, options, notify=silent, advance=silent)

    return StreamedLM(checkpoint, max_positions(checkpoint, geometry), ask)


def whole(path: Path) -> Any:
    checkpoint = open_checkpoint(path)
    return in_transformers(checkpoint, "cpu", "float32", max_positions(checkpoint, read_geometry(checkpoint)))


def figures(run: Run) -> dict[tuple[str, str], float | None]:
    return {(metric.task, metric.metric): metric.value for metric in run.metrics}


def values(run: Run, task: str, metric: str) -> tuple[float, ...]:
    (found,) = [m.values for m in run.metrics if (m.task, m.metric) == (task, metric)]
    assert found is not None
    return found


@pytest.fixture(scope="module")
def reference(demo_model: Path, folder: Path) -> dict[str, Any]:
    """What lm-eval itself finds, with its own way to load models and to run tasks."""
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype="float32")
    lm = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(demo_model), batch_size=4)
    manager = TaskManager(include_path=folder, include_defaults=False)
    loaded = manager.load([GROUP, TEXT, WRITTEN])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)
    found: dict[str, Any] = lm_eval.evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0)
    return found


def test_the_figures_are_lm_evals_own(demo_model: Path, folder: Path, reference: dict[str, Any]) -> None:
    suite = load_suite((GROUP, TEXT, WRITTEN), [folder])
    run = run_suite(whole(demo_model), suite, model="demo", engine="transformers")
    expected = {
        (task, name.removesuffix(",none")): value
        for task, metrics in reference["results"].items()
        for name, value in metrics.items()
        if "," in name and "_stderr" not in name
    }
    found = figures(run)
    assert found.keys() == expected.keys() and len(found) == 8
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < expected[CHOICE, "acc"] < 1 and 0 < expected[WRITTEN, "exact_match"] < 1
    assert run.engine == f"transformers, lm-eval {lm_eval.__version__}"


def test_streamed_figures_are_the_same(demo_model: Path, folder: Path, reference: dict[str, Any]) -> None:
    run = run_suite(streamed(demo_model), load_suite((GROUP, TEXT), [folder]), model="demo", engine="stream")
    for (task, metric), value in figures(run).items():
        assert value == pytest.approx(reference["results"][task][f"{metric},none"], rel=1e-5)


def test_documents_are_kept_one_by_one(demo_model: Path, folder: Path, reference: dict[str, Any]) -> None:
    """In order, with values whose mean is the figure; metrics that are no mean have none. Groups have all of theirs."""
    run = run_suite(streamed(demo_model), load_suite((GROUP, TEXT), [folder]), model="demo", engine="stream")
    by_name: dict[tuple[str, str], Metric] = {(m.task, m.metric): m for m in run.metrics}
    samples = reference["samples"][CHOICE]
    assert values(run, CHOICE, "acc") == tuple(sample["acc"] for sample in samples)
    assert len(set(run.documents[CHOICE])) == len(samples) == len(SUMS)
    assert run.documents[GROUP] == 2 * run.documents[CHOICE]
    assert values(run, GROUP, "acc") == values(run, CHOICE, "acc") + values(run, GIVEN, "acc")
    for key in ((GIVEN, "perplexity"), (TEXT, "word_perplexity"), (TEXT, "bits_per_byte")):
        assert by_name[key].values is None and by_name[key].higher_is_better is False
    assert by_name[CHOICE, "acc"].higher_is_better is True and by_name[CHOICE, "acc"].share


def test_plans_answer_as_the_written_checkpoints_do(demo_model: Path, folder: Path, tmp_path: Path) -> None:
    """From one pass; also layers that differ, which are read by the loader for them."""
    checkpoint = open_checkpoint(demo_model)
    geometry = read_geometry(checkpoint)
    plans = {
        "random": make_plan(checkpoint, geometry, strategy="random", experts=20),
        "uneven": make_plan(checkpoint, geometry, top_k=Schedule(1, 3, 2, 2), per_layer=True),
    }
    lm, suite = streamed(demo_model, plans), load_suite(NAMES, [folder])
    runs = {}
    for name in (BASE, *plans):
        lm.name = name
        runs[name] = run_suite(lm, suite, model=name, engine="stream")
    for name, plan in plans.items():
        prune(checkpoint, geometry, plan, tmp_path / name)
        written = run_suite(whole(tmp_path / name), suite, model=name, engine="transformers")
        assert figures(written) == pytest.approx(figures(runs[name]), rel=1e-5)
    assert len({figures(run)[TEXT, "bits_per_byte"] for run in runs.values()}) == 3


def test_our_arithmetic_is_the_same_by_lm_eval_by_generation_and_by_one_pass(demo_model: Path) -> None:
    limit, tasks = 40, ("expertcut_arithmetic", "expertcut_arithmetic_generate")
    run = run_suite(whole(demo_model), load_suite(tasks), model="demo", engine="transformers", limit=limit)
    checkpoint = open_checkpoint(demo_model)
    answers = arithmetic_accuracy(
        checkpoint, read_geometry(checkpoint), {}, arithmetic_items(limit), ProfileOptions(device="cpu"),
        notify=silent, advance=silent,
    )  # fmt: skip
    given, written = values(run, tasks[0], "acc"), values(run, tasks[1], "exact_match")
    assert list(given) == list(written) == answers.correct[0].tolist()
    assert 5 < sum(given) < 35
    streaming = run_suite(streamed(demo_model), load_suite(tasks[:1]), model="demo", engine="stream")
    assert len(streaming.documents[tasks[0]]) == 2000 and values(streaming, tasks[0], "acc")[:limit] == given


def test_a_server_answers_the_same(demo_model: Path, folder: Path) -> None:
    suite, checkpoint = load_suite((CHOICE, GIVEN, WRITTEN), [folder]), open_checkpoint(demo_model)
    here = run_suite(whole(demo_model), suite, model="demo", engine="transformers", limit=6)
    with completions_server(demo_model, "some/name") as url:
        run = run_suite(served(url, checkpoint, 1024), suite, model="demo", engine=url, limit=6)
    assert figures(run) == pytest.approx(figures(here), rel=1e-4)
    assert run.documents == here.documents and len(run.documents[WRITTEN]) == 6


def test_a_server_has_to_be_there_and_to_serve_the_model(demo_model: Path) -> None:
    checkpoint = open_checkpoint(demo_model)
    with completions_server(demo_model, "one", "two") as url, pytest.raises(UsageError, match="serves one, two, but"):
        served(url, checkpoint, 1024)
    with completions_server(demo_model, "one", str(demo_model)) as url:
        assert served(url, checkpoint, 1024).model == str(demo_model)
    with pytest.raises(RuntimeLintError, match="no list of models"):
        served(url, checkpoint, 1024)


def test_a_streamed_model_reads_its_weights_once_for_all(
    demo_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rolling windows and other requests are a pass each; further models and equal questions cost none."""
    lm, asked = streamed(demo_model), list[int]()
    predict_once = lm._predict

    def counted(requests: Any) -> Any:
        asked.append(len(requests))
        return predict_once(requests)

    monkeypatch.setattr(lm, "_predict", counted)
    suite = load_suite(NAMES, [folder])
    runs = [run_suite(lm, suite, model="demo", engine="stream") for _ in range(2)]
    assert len(asked) == 2 and runs[0] == runs[1]


def test_a_chat_template_is_put_around_prompts(demo_model: Path, folder: Path, tmp_path: Path) -> None:
    """The same from both engines, other than without, and not to be compared with that; refused where there is none."""
    chat = Path(shutil.copytree(demo_model, tmp_path / "chat"))
    template = (
        "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    (chat / "chat_template.jinja").write_text(template)
    suite = load_suite((CHOICE,), [folder])
    runs = [run_suite(make(chat), suite, model="chat", engine="any", chat=True) for make in (streamed, whole)]
    assert figures(runs[0]) == pytest.approx(figures(runs[1])) and runs[0].documents == runs[1].documents
    plain = run_suite(streamed(chat), suite, model="plain", engine="stream")
    with pytest.raises(DataError, match="not given the same documents"):
        compare(plain, runs[0])
    with pytest.raises(UsageError, match="no chat template"):
        run_suite(streamed(demo_model), suite, model="demo", engine="stream", chat=True)


def test_without_lm_eval_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeLintError, match="not installed") as refused:
        load_suite(("expertcut_arithmetic",))
    assert refused.value.hint == "pip install 'expertcut[eval]'"


def test_what_cannot_be_loaded_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no task named 'arc_eazy'") as refused:
        load_suite(("expertcut_arithmetic", "arc_eazy"))
    assert "arc_easy" in str(refused.value.hint)
    with pytest.raises(UsageError, match="no such folder"):
        load_suite((CHOICE,), [tmp_path / "absent"])
    task = json.loads((folder / f"{CHOICE}.yaml").read_text())
    (tmp_path / "far.yaml").write_text(json.dumps(task | {"task": "far", "dataset_path": "nobody/nothing"}))
    (tmp_path / "code.yaml").write_text(json.dumps(task | {"task": "code", "unsafe_code": True}))
    with pytest.raises(DataError, match="the data cannot be had"):
        load_suite(("far",), [tmp_path])
    with pytest.raises(UsageError, match="runs code that the model writes"):
        load_suite(("code",), [tmp_path])


def test_own_tasks_come_before_lm_evals_and_theirs_are_found(folder: Path, tmp_path: Path) -> None:
    """A name that lm-eval has too is ours where a folder of ours is given."""
    task = json.loads((folder / f"{CHOICE}.yaml").read_text())
    (tmp_path / "own.yaml").write_text(json.dumps(task | {"task": "arc_easy"}))
    suite = load_suite(("arc_easy",), [tmp_path])
    assert len(suite.loaded["tasks"]["arc_easy"].eval_docs) == len(SUMS) and not suite.generating
    assert load_suite((WRITTEN,), [folder]).generating == [WRITTEN]
