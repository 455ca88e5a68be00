"""Profiles, plans, checkpoints, sweeps and benchmarks of one model in, one HTML page out that needs nothing else.

Invariant: the same inputs give the same page, byte for byte; whatever comes from a file is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import expertcut
from expertcut.calibrate.profile import JSON, Profile
from expertcut.checkpoint import Checkpoint, load_json, open_checkpoint
from expertcut.choose import format_size
from expertcut.choose.criteria import Criterion, get_criterion
from expertcut.choose.plan import Plan
from expertcut.errors import CheckpointError, DataError, ProfileError, UsageError
from expertcut.measure.bench import Bench, load_bench
from expertcut.model import Geometry, read_geometry
from expertcut.model.summary import summarise
from expertcut.rewrite.layout import RECORD
from expertcut.rewrite.record import Record
from expertcut.runtimes.lint import LintFinding, lint, lint_subject
from expertcut.share.figures import Figure, bench_figures, kept_figure, profile_figures, sweep_figures

DEFAULT = "reap"
"""The criterion whose scores are shown where no plan names one."""
SWEEP, BENCH = "sweep.json", "bench.json"
TAKEN = "a profile, a checkpoint that expertcut wrote, a plan, the folder of a sweep or of a benchmark"
Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    key: str
    title: str
    facts: Facts = field(default_factory=list)
    figures: Sequence[Figure] = ()
    lint: Sequence[LintFinding] = ()
    commands: Sequence[str] = ()


@dataclass
class Inputs:
    """What was given, at most one of each kind."""

    profile: Profile | None = None
    plan: Plan | None = None
    record: Record | None = None
    checkpoint: Checkpoint | None = None
    sweep: dict[str, Any] | None = None
    bench: Bench | None = None
    names: dict[str, str] = field(default_factory=dict)
    """Kind → the model's name there."""
    geometries: dict[str, str] = field(default_factory=dict)
    """Kind → hash of the source's geometry, where it is known."""

    def put(self, kind: str, value: Any, path: Path) -> None:
        """Set one of the fields.

        Raises:
            UsageError: there is one already.
        """
        if getattr(self, kind) is not None:
            raise UsageError(f"{path}: a second {kind}", "one of each kind goes on a page")
        setattr(self, kind, value)


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Read what a report is made of, and check that it is all of one model.

    Raises:
        UsageError: a path is none of these, two of a kind, or of different models.
        ProfileError, PlanError, CheckpointError, DataError: one of them is damaged.
    """
    found = Inputs()
    for path in paths:
        _read(found, path)
    if len(set(found.geometries.values())) > 1:
        told = ", ".join(f"{kind}: {found.names.get(kind, '?')}" for kind in found.geometries)
        raise UsageError(f"these are of different models: {told}", "make a page for each")
    if found.sweep is not None:
        own = _last(str(found.sweep["model"]))
        others = {kind: name for kind, name in found.names.items() if kind != "sweep" and _last(name) != own}
        if others and len(others) == len(found.names) - 1:
            raise UsageError(
                f"the sweep is of {own}, the others of {', '.join(others.values())}", "make a page for each"
            )
    return found


def _read(found: Inputs, path: Path) -> None:
    if path.is_dir() and (path / JSON).exists():
        profile = Profile.load(path)
        found.put("profile", profile, path)
        found.names["profile"], found.geometries["profile"] = profile.meta.source, profile.meta.fingerprint.geometry
    elif path.is_dir() and (path / RECORD).exists():
        record = Record.load(path)
        found.put("record", record, path)
        found.put("checkpoint", open_checkpoint(path), path)
        _take_plan(found, record.plan, path)
    elif path.is_dir() and ((path / SWEEP).exists() or (path / BENCH).exists()):
        for name in (SWEEP, BENCH):
            if (path / name).exists():
                _read_document(found, path / name)
    elif path.is_file():
        _read_document(found, path)
    else:
        raise UsageError(f"{path}: expected {TAKEN}")


def _read_document(found: Inputs, path: Path) -> None:
    try:
        document = load_json(path)
    except CheckpointError as error:
        raise DataError(error.message, f"expected {TAKEN}") from None
    schema = str(document.get("schema", "")) if isinstance(document, dict) else ""
    if schema.startswith("expertcut.plan/"):
        _take_plan(found, Plan.load(path), path)
    elif schema.startswith("expertcut.bench/"):
        found.put("bench", load_bench(path), path)
    elif isinstance(document, dict) and isinstance(document.get("points"), list) and document["points"]:
        found.put("sweep", document, path)
        found.names["sweep"] = str(document.get("model"))
    else:
        raise UsageError(f"{path}: expected {TAKEN}")


def _take_plan(found: Inputs, plan: Plan, path: Path) -> None:
    if found.plan == plan:  # a checkpoint beside the plan that it was made by
        return
    found.put("plan", plan, path)
    found.names["plan"], found.geometries["plan"] = plan.source.name, plan.source.fingerprint.geometry


def build(inputs: Inputs, by: str | None) -> tuple[str, list[Section]]:
    """Return the page's title and what is on it; `by` is the criterion whose scores are shown.

    Raises:
        UsageError: an unknown criterion, or one that no profile can judge.
        ProfileError: the profile lacks what it reads.
    """
    sections = []
    if inputs.checkpoint is not None and inputs.record is not None:
        sections.append(_checkpoint(inputs.checkpoint, inputs.record))
    if inputs.plan is not None:
        sections.append(_plan(inputs.plan, inputs.profile))
    if inputs.profile is not None:
        sections.append(_profile(inputs.profile, inputs.plan, _criterion(by, inputs.plan, inputs.profile)))
    elif by is not None:
        raise UsageError("--by needs a profile among what is given")
    if inputs.sweep is not None:
        sections.append(_sweep(inputs.sweep))
    if inputs.bench is not None:
        sections.append(_bench(inputs.bench))
    name = next(iter(inputs.names.values()), None)
    return (_last(name) if name else "Benchmark"), sections


def render(title: str, sections: Sequence[Section]) -> str:
    """Return the page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("expertcut.share", "."), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, autoescape=True,
    )  # fmt: skip
    return environment.get_template("report.html.jinja").render(
        title=title, sections=sections, version=expertcut.__version__
    )


def _criterion(by: str | None, plan: Plan | None, profile: Profile) -> Criterion | None:
    """The criterion that was asked for, else the plan's, else the default, as far as the profile can judge by it."""
    if by is not None:
        asked = get_criterion(by)
        if not (asked.needs and asked.needs_profile):
            raise UsageError(f"--by {by}: reads no profile", f"for example --by {DEFAULT}")
        return asked
    named = plan.provenance.get("criterion") if plan else None
    for name in (named, DEFAULT):
        try:
            found = get_criterion(name) if isinstance(name, str) else None
            if found and found.needs and found.needs_profile:
                found.score(profile.layer(profile.prefixes[0]))
                return found
        except (UsageError, ProfileError):
            continue
    return None


def _checkpoint(checkpoint: Checkpoint, record: Record) -> Section:
    geometry: Geometry = read_geometry(checkpoint)
    summary, before = summarise(checkpoint, geometry), record.before
    share = f" ({summary.nbytes / before.nbytes:.1%})" if before.nbytes else ""
    facts = [
        ("made from", record.source),
        ("weights", f"{format_size(before.nbytes)} → {format_size(summary.nbytes)}{share}"),
        ("experts per MoE layer", f"{before.experts} → {_span(summary.layer_experts)}"),
        ("of these, per token (top-k)", f"{before.top_k} → {_span(summary.layer_top_k)}"),
        ("parameters", "not told by quantised weights" if summary.parameters is None else f"{summary.parameters:,}"),
        ("activated per token", "–" if summary.activated is None else f"{summary.activated:,}"),
        ("family", summary.family), ("written by", record.tool),
    ]  # fmt: skip
    return Section("checkpoint", "Checkpoint", facts, lint=lint(lint_subject(geometry, checkpoint.config)))


def _plan(plan: Plan, profile: Profile | None) -> Section:
    kept = [len(entry.kept) for entry in plan.layers.values()]
    top_k = [entry.top_k for entry in plan.layers.values() if entry.top_k is not None]
    facts = [("model", plan.source.name), ("MoE layers", str(len(kept))), ("experts kept per layer", _span(kept)),
             ("top-k", _span(top_k) if top_k else "unchanged")]  # fmt: skip
    command = plan.provenance.get("command")
    facts += [(name.replace("_", " "), _plain(value)) for name, value in plan.provenance.items()
              if value not in (None, {}, "", []) and name != "command" and not name.endswith("_text")]  # fmt: skip
    most = max(max(entry.kept) for entry in plan.layers.values()) + 1
    figures = [] if profile else [kept_figure(plan, most)]
    return Section("plan", "Plan", facts, figures, commands=[command] if isinstance(command, str) else [])


def _profile(profile: Profile, plan: Plan | None, criterion: Criterion | None) -> Section:
    meta, tokens = profile.meta, profile.meta.tokens()
    facts = [
        ("model", meta.source), ("experts", f"{meta.experts} per MoE layer, top-{meta.top_k}"),
        ("MoE layers", str(len(meta.blocks))),
        ("tokens", f"{sum(tokens.values()):,}"),
        ("domains", ", ".join(f"{name} {count:,}" for name, count in tokens.items())),
        ("forward pass", meta.dtype), ("digest", profile.digest()),
    ]  # fmt: skip
    return Section("profile", "Routing", facts, profile_figures(profile, plan, criterion))


def _sweep(document: dict[str, Any]) -> Section:
    try:
        figures = sweep_figures(document)
        facts = [("model", str(document["model"])), ("weights", format_size(document["nbytes"])),
                 ("held-out text", f"{document['tokens']:,} tokens"),
                 ("loss of the unchanged model", f"{document['base']:.4f} nats per token")]  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{SWEEP}: {type(error).__name__}: {error}", "make it again: expertcut sweep") from None
    return Section("sweep", "Trade-off", facts, figures)


def _bench(bench: Bench) -> Section:
    machine = bench.machine
    facts = [("engine", bench.engine), ("prompts", bench.prompts)]
    if machine:
        facts.append(("machine", ", ".join((*machine.gpus, f"{machine.cores} cores of {machine.cpu}"))))
    if not bench.complete:
        facts.append(("complete", "no: the run was cut short"))
    return Section("bench", "Under load", facts, bench_figures(bench), commands=[bench.command])


def _span(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(most) if least == most else f"{least} to {most} by layer, {sum(numbers) / len(numbers):.2f} on average"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(member)}" for name, member in value.items() if member not in (None, [], {}))
    text = (
        ", ".join(map(_plain, value))
        if isinstance(value, list)
        else value
        if isinstance(value, str)
        else json.dumps(value)
    )
    return text if len(text) <= 300 else f"{text[:300]}… ({len(text):,} characters)"


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]
