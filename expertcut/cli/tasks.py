"""Tasks of lm-eval for `eval`: the options, and which models answer in which engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertcut.cli.common import Output
from expertcut.cli.options import AS_IT_COMES, Forward
from expertcut.errors import DataError, UsageError

if TYPE_CHECKING:
    from expertcut.checkpoint import Checkpoint
    from expertcut.choose.plan import Plan
    from expertcut.measure.scores import Run
    from expertcut.model import Geometry
    from expertcut.runtimes.harness import Suite

TASKS = "Tasks"
STREAM, TRANSFORMERS, VLLM = "stream", "transformers", "vllm"


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks are run, and how, as typed."""

    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAME,…",
            rich_help_panel=TASKS,
            show_default=False,
            help="Tasks or groups of lm-eval, such as arc_easy,mmlu; or expertcut_arithmetic, which needs no download.",
        ),
    ] = None
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="NAME|URL",
            rich_help_panel=TASKS,
            help="stream: layer by layer, plans too, tasks that write nothing. transformers or vllm: any task, the "
            "whole model loaded. A URL: any server of OpenAI's completions protocol.",
        ),
    ] = STREAM
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            metavar="MODEL|FILE",
            rich_help_panel=TASKS,
            show_default=False,
            help="Compare with another model, such as the one that MODEL was made from, or with what eval --json "
            "printed for it.",
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", min=1, rich_help_panel=TASKS, help="The first N documents of each task only."
        ),
    ] = None  # fmt: skip
    chat: Annotated[
        bool,
        typer.Option(
            "--chat-template", rich_help_panel=TASKS, help="Put prompts into the model's chat template, as chats need."
        ),
    ] = False  # fmt: skip
    include: Annotated[
        list[Path] | None,
        typer.Option(
            "--include-path",
            metavar="DIR",
            rich_help_panel=TASKS,
            show_default=False,
            help="A folder of your own task files. Repeatable.",
        ),
    ] = None


NO_TASKS = TaskOptions()


def prepare(tasks: TaskOptions, plans: Mapping[str, Plan], forward: Forward, *, with_text: bool) -> Suite | None:
    """Check the options and load the tasks; None if there are none.

    Raises:
        UsageError: options that do not go together, an unknown task, or one that the engine cannot run.
        RuntimeLintError: lm-eval is not installed.
        DataError: a task's data cannot be had.
    """
    if not tasks.tasks:
        if tasks != NO_TASKS:
            raise UsageError("found options of tasks, but no --tasks", "for example --tasks expertcut_arithmetic")
        return None
    if tasks.engine not in (STREAM, TRANSFORMERS, VLLM) and not _is_url(tasks.engine):
        raise UsageError(f"engine {tasks.engine!r} is unknown; known: {STREAM}, {TRANSFORMERS}, {VLLM}, http://…")
    if plans and tasks.source:
        raise UsageError("--plan compares with MODEL itself, --source with another model: give one of them")
    if plans and tasks.engine != STREAM:
        raise UsageError(f"--engine {tasks.engine} runs written checkpoints, no plans", f"--engine {STREAM} does")
    if tasks.source and _is_url(tasks.engine) and not Path(tasks.source).is_file():
        raise UsageError(
            f"{tasks.engine} serves MODEL, so that --source takes a file", "expertcut eval SOURCE … --json > FILE first"
        )
    if not with_text:
        _refuse_idle(tasks.engine, forward)
    from expertcut.runtimes.harness import load_suite

    suite = load_suite([name.strip() for name in tasks.tasks.split(",") if name.strip()], tasks.include or ())
    if tasks.engine == STREAM and suite.generating:
        raise UsageError(
            f"task {suite.generating[0]} wants text written, which --engine {STREAM} does not do",
            f"--engine {TRANSFORMERS}, --engine {VLLM} or a server's URL",
        )
    return suite


def solve(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, suite: Suite, tasks: TaskOptions,
    plans: Mapping[str, Plan], forward: Forward,
) -> list[Run]:  # fmt: skip
    """Let every model solve all tasks: the base first, then the one or the plans that are compared with it.

    Raises:
        DataError: `--source` names a file without results, or with results of other tasks.
    """
    runs = [] if tasks.source is None else [_source(out, tasks.source, suite, tasks, forward)]
    return runs + list(_runs(out, checkpoint, geometry, suite, tasks, plans, forward))


def _source(out: Output, source: str, suite: Suite, tasks: TaskOptions, forward: Forward) -> Run:
    from expertcut.checkpoint import open_checkpoint
    from expertcut.measure.scores import read_run
    from expertcut.model import read_geometry

    if not Path(source).is_file():
        checkpoint = open_checkpoint(source)
        (run,) = _runs(out, checkpoint, read_geometry(checkpoint), suite, tasks, {}, forward)
        return run
    run = read_run(Path(source))
    if run.asked != suite.asked:
        raise DataError(f"{source}: has {', '.join(run.asked)}, expected {', '.join(suite.asked)}")
    return run


def _runs(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, suite: Suite, tasks: TaskOptions,
    plans: Mapping[str, Plan], forward: Forward,
) -> Iterator[Run]:  # fmt: skip
    from expertcut.measure.quality import BASE
    from expertcut.runtimes.harness import run_suite

    with out.quiet():
        lm = _engine(out, checkpoint, geometry, tasks.engine, plans, forward)
    for name in (BASE, *plans) if plans else (checkpoint.name,):
        if plans:
            lm.name = name
        out.note(f"{name}: {', '.join(suite.asked)}")
        with out.quiet():
            run = run_suite(lm, suite, model=name, engine=tasks.engine, limit=tasks.limit, chat=tasks.chat)
        yield run
    del lm
    gc.collect()  # the next model needs the memory


def _engine(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, engine: str, plans: Mapping[str, Plan], forward: Forward
) -> Any:
    """The checkpoint, ready to answer lm-eval."""
    from expertcut.model.summary import max_positions
    from expertcut.runtimes import engines

    limit = max_positions(checkpoint, geometry)
    if engine == TRANSFORMERS:
        return engines.in_transformers(checkpoint, forward.device, forward.dtype, limit)
    if engine == VLLM:
        return engines.in_vllm(checkpoint, forward.dtype)
    if engine != STREAM:
        return engines.served(engine, checkpoint, limit)

    from expertcut.calibrate.run import ProfileOptions
    from expertcut.measure.continuations import Predicted, Request, predict

    def ask(requests: Sequence[Request]) -> Predicted:
        work = sum(len(context) + len(answer) for context, answer in requests) * (1 + len(plans))
        with out.progress("scoring", lambda speed: f"{speed:,.0f} tokens·layers/s", work) as advance:
            options = ProfileOptions(**vars(forward))
            return predict(checkpoint, geometry, plans, requests, options, notify=out.note, advance=advance)

    return engines.StreamedLM(checkpoint, limit, ask)


def _refuse_idle(engine: str, forward: Forward) -> None:
    """Refuse options of the forward pass that an engine does not look at."""
    looks_at = {STREAM: vars(forward).keys(), TRANSFORMERS: {"device", "dtype"}, VLLM: {"dtype"}}.get(engine, set())
    for name, value in vars(forward).items():
        if name not in looks_at and value != getattr(AS_IT_COMES, name):
            raise UsageError(f"--{name.replace('_', '-')} has no effect with --engine {engine}")


def _is_url(engine: str) -> bool:
    return engine.startswith(("http://", "https://"))
