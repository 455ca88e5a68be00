"""Tasks of lm-eval for `eval`: the options, which models answer in which engine, and what is said of the results."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertcut.cli.common import Output
from expertcut.cli.options import Forward
from expertcut.errors import DataError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from expertcut.checkpoint import Checkpoint
    from expertcut.choose.plan import Plan
    from expertcut.measure.scores import Gap, Metric, Run
    from expertcut.model import Geometry
    from expertcut.runtimes.harness import Suite

TASKS = "Tasks"
STREAM, TRANSFORMERS, VLLM = "stream", "transformers", "vllm"
LEGEND = (
    "value: lm-eval's; change: with its 95 % interval over documents, in points of a hundred; see docs/evaluation.md"
)


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


def prepare(tasks: TaskOptions, plans: Mapping[str, Plan]) -> Suite | None:
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
            run = run_suite(lm, suite, model=name, engine=tasks.engine, limit=tasks.limit)
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


def record(runs: Sequence[Run], limit: int | None) -> dict[str, Any]:
    """Everything, as members of a JSON document."""
    from expertcut.measure.intervals import LEVEL
    from expertcut.measure.scores import compare

    comparisons = [
        {"name": run.model, "base": runs[0].model, "task": gap.base.task, "metric": gap.base.metric,
         "change": gap.change and asdict(gap.change), "verdict": _said(gap)}
        for run in runs[1:] for gap in compare(runs[0], run)
    ]  # fmt: skip
    return {"limit": limit, "level": LEVEL, "runs": [run.model_dump() for run in runs], "comparisons": comparisons}


def shown(runs: Sequence[Run]) -> list[RenderableType]:
    """What is printed: the table, what it means, and one line for each comparison."""
    lines = verdicts(runs)
    return [table(runs), "", LEGEND, *(["", *lines] if lines else [])]


def table(runs: Sequence[Run]) -> Table:
    """One line per task, metric and model."""
    from expertcut.cli import tables
    from expertcut.measure.scores import compare

    made = tables.table(("task", "metric", "model", ">documents", ">value", ">change"), ())
    gaps = [compare(runs[0], run) for run in runs[1:]]
    for i, metric in enumerate(runs[0].metrics):
        lines = [(metric, ""), *((found[i].other, _change(found[i])) for found in gaps)]
        for run, (own, change) in zip(runs, lines, strict=True):
            count = len(run.documents[metric.task])
            made.add_row(metric.task, metric.metric, run.model, f"{count:,}", _value(own), change,
                         end_section=run is runs[-1])  # fmt: skip
    return made


def verdicts(runs: Sequence[Run]) -> list[str]:
    """One line per model that is compared, and task or group that was asked for, and metric of it."""
    from expertcut.measure.scores import compare

    return [
        f"{run.model}: {gap.base.task}, {gap.base.metric}: {_said(gap)}"
        for run in runs[1:]
        for gap in compare(runs[0], run)
        if gap.base.task in run.asked
    ]


def _value(metric: Metric) -> str:
    from expertcut.measure.scores import mean

    if metric.value is None:
        return "not finite"
    if not metric.share:
        return f"{metric.value:.4f}"
    found = mean(metric.values or ())
    between = "" if found.low is None else f" ({found.low:.1%} to {found.high:.1%})"
    return f"{found.value:.1%}{between}"


def _change(gap: Gap) -> str:
    if gap.change is None:
        return f"{_plain(gap):+.4f}"
    scale, digits, _ = _unit(gap)
    value, low, high = (
        "" if end is None else f"{scale * end:+.{digits}f}"
        for end in (gap.change.value, gap.change.low, gap.change.high)
    )
    return f"{value} ({low} to {high})" if low else value


def _said(gap: Gap) -> str:
    """Whether a model is worse than the base in a metric, and by how much."""
    from expertcut.measure.intervals import LEAST, LEVEL

    scale, digits, unit = _unit(gap)
    value = _plain(gap) if gap.change is None else gap.change.value
    words = {True: ("better", "worse"), False: ("worse", "better"), None: ("higher", "lower")}
    if isnan(value):
        return "not finite: try --dtype float32"
    above, below = words[gap.base.higher_is_better]
    amount = f"{above if value > 0 else below} by {abs(scale * value):.{digits}f}{unit}"
    if gap.change is None:
        return f"{amount}; no interval: the metric is no mean over documents"
    low, high = gap.change.low, gap.change.high
    if low is None or high is None:
        return f"{amount}; no interval: {len(gap.base.values or ())} documents, {LEAST} or more are needed"
    if low == high == 0:
        return "no difference in any document"
    if not gap.change.sign:
        return f"no significant difference ({scale * low:+.{digits}f} to {scale * high:+.{digits}f}{unit}, {LEVEL:.0%})"
    low, high = sorted((abs(low), abs(high)))
    return f"{amount} ({scale * low:.{digits}f} to {scale * high:.{digits}f}, {LEVEL:.0%})"


def _unit(gap: Gap) -> tuple[float, int, str]:
    """Factor, decimals and name of the unit in which a difference is told."""
    return (100, 1, " points") if gap.base.share and gap.other.share else (1, 4, "")


def _plain(gap: Gap) -> float:
    """The difference of the two figures; not a number if one is not finite."""
    base, other = (nan if metric.value is None else metric.value for metric in (gap.base, gap.other))
    return other - base


def _is_url(engine: str) -> bool:
    return engine.startswith(("http://", "https://"))
