"""What was found about a model in, one HTML page out that needs nothing else.

Invariant: the same inputs give the same page, byte for byte; whatever comes from a file is escaped.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import expertcut
from expertcut.calibrate.profile import Profile
from expertcut.checkpoint import Checkpoint
from expertcut.choose import format_size
from expertcut.choose.criteria import Criterion, get_criterion
from expertcut.choose.plan import Plan
from expertcut.errors import DataError, ProfileError, UsageError
from expertcut.measure.bench import Bench
from expertcut.measure.heal_record import KEY as HEALING
from expertcut.measure.heal_record import HealRecord
from expertcut.model import Geometry, read_geometry
from expertcut.model.summary import by_layer, summarise
from expertcut.rewrite.record import Record
from expertcut.runtimes.lint import LintFinding, lint, lint_subject
from expertcut.share.curves import bench_figures, sweep_figures
from expertcut.share.figures import Figure
from expertcut.share.healing import healing_facts, healing_figures
from expertcut.share.inputs import SWEEP, Inputs, last_part
from expertcut.share.routing import kept_figure, profile_figures

DEFAULT = "reap"
"""The criterion whose scores are shown where no plan names one."""
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


@dataclass(frozen=True)
class Page:
    """What a report shows."""

    title: str
    glance: Sequence[tuple[str, str, str]]
    """The numbers to see first: what, how much, and beside what."""
    sections: Sequence[Section]


def build(inputs: Inputs, by: str | None) -> Page:
    """Return what is on the page; `by` is the criterion whose scores are shown.

    Raises:
        UsageError: an unknown criterion, or one that no profile can judge.
        ProfileError: the profile lacks what it reads.
    """
    sections = []
    if inputs.checkpoint is not None and inputs.record is not None:
        sections.append(_checkpoint(inputs.checkpoint, inputs.record))
    if inputs.plan is not None:
        healing = HealRecord.of_plan(inputs.plan)
        sections.append(_plan(inputs.plan, inputs.profile, healing))
        if healing is not None:
            sections.append(Section("healing", "Healing", healing_facts(healing), healing_figures(healing),
                                    commands=[healing.command]))  # fmt: skip
    if inputs.profile is not None:
        sections.append(_profile(inputs.profile, inputs.plan, by))
    elif by is not None:
        raise UsageError("--by needs a profile among what is given")
    if inputs.sweep is not None:
        sections.append(_sweep(inputs.sweep))
    if inputs.bench is not None:
        sections.append(_bench(inputs.bench))
    name = next(iter(inputs.names.values()), None)
    return Page(last_part(name) if name else "Benchmark", _glance(inputs), sections)


def render(page: Page) -> str:
    """Return the page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("expertcut.share", "."), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, autoescape=True,
    )  # fmt: skip
    return environment.get_template("report.html.jinja").render(page=page, version=expertcut.__version__)


def _glance(inputs: Inputs) -> list[tuple[str, str, str]]:
    found = []
    record, plan, profile, sweep, bench = inputs.record, inputs.plan, inputs.profile, inputs.sweep, inputs.bench
    experts, top_k = (record.before.experts, record.before.top_k) if record else (
        (profile.meta.experts, profile.meta.top_k) if profile else (None, None)
    )  # fmt: skip
    if record is not None:
        before, after = record.before.nbytes, record.after.nbytes
        change = f", {after / before - 1:+.1%}".replace("-", "−") if before else ""
        found.append(("weights", format_size(after), f"of {format_size(before)}{change}"))
    if plan is not None:
        kept = [len(entry.kept) for entry in plan.layers.values()]
        found.append(("experts kept per layer", _mean(kept), f"of {experts}" if experts else ""))
        if top_k:
            tops = [entry.top_k or top_k for entry in plan.layers.values()]
            found.append(("of these, per token", _mean(tops), f"of {top_k}"))
    if profile is not None:
        tokens = profile.meta.tokens()
        found.append(("MoE layers", str(len(profile.meta.blocks)), f"of {profile.meta.experts} experts"))
        domains = "1 domain" if len(tokens) == 1 else f"{len(tokens)} domains"
        found.append(("tokens profiled", f"{sum(tokens.values()):,}", f"of {domains}"))
    if sweep is not None:
        found.append(("plans compared", str(len(sweep["points"])), f"on {sweep['tokens']:,} tokens of held-out text"))
    if bench is not None:
        found.append(("variants under load", str(len({row.variant for row in bench.rows})), bench.engine))
    return found


def _weights(plan: Plan | None, profile: Profile) -> dict[str, float] | None:
    """The weights of domains that the plan was made with, where the profile has those domains."""
    named = plan.provenance.get("domain_weights") if plan else None
    if not isinstance(named, dict) or not {*named} <= {*profile.meta.domains}:
        return None
    return {name: float(weight) for name, weight in named.items() if isinstance(weight, int | float)}


def _criterion(
    by: str | None, plan: Plan | None, profile: Profile, weights: dict[str, float] | None
) -> Criterion | None:
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
                found.score(profile.layer(profile.prefixes[0], weights))
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
        ("experts per MoE layer", f"{before.experts} → {by_layer(summary.layer_experts)}"),
        ("of these, per token (top-k)", f"{before.top_k} → {by_layer(summary.layer_top_k)}"),
        ("parameters", "not told by quantised weights" if summary.parameters is None else f"{summary.parameters:,}"),
        ("activated per token", "–" if summary.activated is None else f"{summary.activated:,}"),
        ("family", summary.family), ("written by", record.tool),
    ]  # fmt: skip
    findings = lint(lint_subject(geometry, checkpoint.config))
    return Section("checkpoint", "Checkpoint", facts, lint=findings, commands=_again(record, checkpoint.path.name))


def _again(record: Record, name: str) -> list[str]:
    """The commands that make and check a checkpoint again, where its plan was a file."""
    healing = HealRecord.of_healed(record.plan)
    command = healing.command if healing else record.plan.provenance.get("command")
    words = shlex.split(command) if isinstance(command, str) else []
    if words[:2] not in (["expertcut", "plan"], ["expertcut", "heal"]):
        return []
    file = next((after for word, after in pairwise(words) if word in ("-o", "--out")), "plan.json")
    return [shlex.join(("expertcut", "prune", record.source, name, "--plan", file)),
            shlex.join(("expertcut", "verify", name, "--source", record.source))]  # fmt: skip


def _plan(plan: Plan, profile: Profile | None, healing: HealRecord | None) -> Section:
    """How a plan was made; its `healing` has a section of its own."""
    kept = [len(entry.kept) for entry in plan.layers.values()]
    top_k = [entry.top_k for entry in plan.layers.values() if entry.top_k is not None]
    facts = [("model", plan.source.name), ("MoE layers", str(len(kept))), ("experts kept per layer", by_layer(kept)),
             ("top-k", by_layer(top_k) if top_k else "unchanged")]  # fmt: skip
    command = plan.provenance.get("command")
    elsewhere = {"command", *([HEALING] if healing else [])}
    facts += [(name.replace("_", " "), _plain(value)) for name, value in plan.provenance.items()
              if value not in (None, {}, "", []) and name not in elsewhere and not name.endswith("_text")]  # fmt: skip
    most = max(max(entry.kept) for entry in plan.layers.values()) + 1
    figures = [] if profile else [kept_figure(plan, most, {})]
    return Section("plan", "Plan", facts, figures, commands=[command] if isinstance(command, str) else [])


def _profile(profile: Profile, plan: Plan | None, by: str | None) -> Section:
    meta, tokens = profile.meta, profile.meta.tokens()
    weights = None if by else _weights(plan, profile)
    criterion = _criterion(by, plan, profile, weights)
    sources = {_source(source) for data in meta.data for source in data.sources}
    made = plan.provenance.get("profile") if plan else None
    facts = [
        ("model", meta.source), ("experts", f"{meta.experts} per MoE layer, top-{meta.top_k}"),
        ("MoE layers", str(len(meta.blocks))),
        ("tokens", f"{sum(tokens.values()):,}"),
        ("domains", ", ".join(f"{name} {count:,}" for name, count in tokens.items())),
        ("calibration text", ", ".join(sorted(sources))),
        ("sequences of", ", ".join(sorted({f"{data.seq_len:,} tokens, seed {data.seed}" for data in meta.data}))),
        ("forward pass", ", ".join((meta.dtype, *map(" ".join, sorted(meta.versions.items()))))),
        ("digest", profile.digest()),
    ]  # fmt: skip
    if made is not None and made != profile.digest():
        facts.append(("the plan was made from", f"another profile: {made}"))
    facts = [(name, value) for name, value in facts if value]
    return Section("profile", "Routing", facts, profile_figures(profile, plan, criterion, weights))


def _source(source: dict[str, Any]) -> str:
    """Of a file its name alone: a page tells nothing of the machine that it was made on."""
    name = str(source.get("name"))
    return name if source.get("kind") == "hub" else last_part(name)


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
        facts.append(("machine", str(machine)))
    if not bench.complete:
        facts.append(("complete", "no: the run was cut short"))
    return Section("bench", "Under load", facts, bench_figures(bench), commands=[bench.command])


def _mean(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(most) if least == most else f"{sum(numbers) / len(numbers):.1f} on average"


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
