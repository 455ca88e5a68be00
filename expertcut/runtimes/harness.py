"""Tasks of lm-eval (the LM Evaluation Harness) and a model in; results down to the single document out.

lm-eval is imported when tasks are loaded, not before. Tasks come from expertcut's own folder, the folders given, and
lm-eval itself; nothing is fetched for a task whose data lie on disk. Figures are lm-eval's own, to the last digit.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

import expertcut.measure
from expertcut.errors import DataError, RuntimeLintError, UsageError
from expertcut.measure.scores import Metric, Run

OWN = Path(expertcut.measure.__file__).parent / "tasks"
"""Task files that come with expertcut."""
INSTALL = "pip install 'expertcut[eval]'"
GENERATES = "generate_until"
_SEED = 1234
"""lm-eval's own, so that examples in prompts are the same."""
_HASH = 16


@dataclass(frozen=True)
class Suite:
    """Tasks with their data, ready for any model."""

    asked: tuple[str, ...]
    loaded: Any
    """lm-eval's dict of tasks and groups."""

    @property
    def generating(self) -> list[str]:
        """Names of the tasks for which the model has to write text."""
        return [name for name, task in self.loaded["tasks"].items() if task.OUTPUT_TYPE == GENERATES]


def load_suite(names: Sequence[str], include: Sequence[Path] = ()) -> Suite:
    """Load tasks and groups by name; files in the folders `include` come before lm-eval's own of the same name.

    Raises:
        RuntimeLintError: lm-eval is not installed.
        UsageError: an unknown name, or a task that runs code which the model writes.
        DataError: a task's data cannot be had.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RuntimeLintError("--tasks needs lm-eval, which is not installed", INSTALL)
    for folder in include:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder", "--include-path takes a folder of task files")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    _seed()
    try:
        loaded = _manager(names, include).load(list(names))
    except OSError as error:
        raise DataError(
            f"tasks {', '.join(names)}: the data cannot be had: {str(error).splitlines()[0]}",
            "needs the Hub, unless the data are in its cache; or --include-path DIR with a task file for data on disk",
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(f"task {name} runs code that the model writes", "run it with lm-eval itself, in a sandbox")
    return Suite(tuple(names), loaded)


def run_suite(
    lm: Any, suite: Suite, *, model: str, engine: str, limit: int | None = None, chat: bool = False
) -> Run:  # fmt: skip
    """Let a model (an `LM` of lm-eval) solve tasks, the first `limit` documents of each.

    model, engine: what the run calls them. chat: put prompts into the model's chat template, examples as turns.

    Raises:
        UsageError: the model has no chat template.
    """
    import lm_eval

    if chat and not getattr(lm.tokenizer, "chat_template", None):
        raise UsageError(f"{model}: the tokenizer has no chat template", "leave out --chat-template")
    _seed()
    for task in suite.loaded["tasks"].values():
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(seed=_SEED)
    results = lm_eval.evaluate(
        lm=lm,
        task_dict=suite.loaded,
        limit=limit,
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    samples = {name: _Samples(results, name) for name in results["results"]}
    metrics = [metric for found in samples.values() for metric in found.metrics()]
    documents = {name: found.documents for name, found in samples.items()}
    version = f"{engine}, lm-eval {lm_eval.__version__}"
    return Run(model=model, engine=version, asked=suite.asked, documents=documents, metrics=tuple(metrics))


class _Samples:
    """What lm-eval logged of the documents of a task, or of all tasks of a group."""

    def __init__(self, results: Mapping[str, Any], name: str) -> None:
        self.name, self.results = name, results["results"][name]
        leaves = list(_leaves(results.get("group_subtasks", {}), name))
        self.better: Mapping[str, bool | None] = results["higher_is_better"].get(name, {})
        self.samples = [sample for leaf in leaves for sample in results["samples"][leaf]]

    @property
    def documents(self) -> tuple[str, ...]:
        """What tells every document from others, prompt included; one that several filters look at counts once."""
        first = self.samples[0]["filter"]
        return tuple(_told_apart(sample) for sample in self.samples if sample["filter"] == first)

    def metrics(self) -> Iterator[Metric]:
        for key, value in self.results.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                yield self._metric(metric, kind, float(value))

    def _metric(self, metric: str, kind: str, value: float) -> Metric:
        found = [sample.get(metric) for sample in self.samples if sample["filter"] == kind]
        plain = found and all(isinstance(v, bool | int | float | np.number) for v in found)
        values = tuple(map(float, found)) if plain else None
        if values is not None and not np.isclose(np.mean(values), value, rtol=1e-9, atol=1e-12):
            values = None  # perplexities, weighted means
        return Metric(
            task=self.name, metric=metric if kind == "none" else f"{metric}, {kind}", values=values,
            higher_is_better=self.better.get(metric), value=value if np.isfinite(value) else None,
        )  # fmt: skip


def _told_apart(sample: Mapping[str, Any]) -> str:
    return sha256((sample["doc_hash"] + sample["prompt_hash"]).encode()).hexdigest()[:_HASH]


def _leaves(children: Mapping[str, Sequence[str]], name: str) -> Iterator[str]:
    if name not in children:
        yield name
    for child in children.get(name, ()):
        yield from _leaves(children, child)


def _manager(names: Sequence[str], include: Sequence[Path]) -> Any:
    """lm-eval's task manager; its own thousands of task files are read only if a name is in none of the folders."""
    from lm_eval.tasks import TaskManager

    for defaults in (False, True):
        manager = TaskManager(include_path=[OWN, *include], include_defaults=defaults)
        unknown = [name for name in names if name not in manager.all_tasks]
        if not unknown:
            return manager
    close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
    hint = f"like it: {', '.join(close)}" if close else "lm-eval ls tasks lists all; --include-path adds your own"
    raise UsageError(f"no task named {unknown[0]!r}", hint)


def _seed() -> None:
    """Seed all that tasks may draw from, as lm-eval does."""
    random.seed(0)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
