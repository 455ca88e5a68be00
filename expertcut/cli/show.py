"""`expertcut show`: what a profile or a plan says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertcut.cli.common import Output, output
from expertcut.cli.options import Json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from expertcut.calibrate.summary import LayerSummary
    from expertcut.choose.plan import Plan

LEGEND = (
    "dead: experts without a token; busiest: its tokens over the mean expert's; "
    "entropy: of the router's distribution, nats per token"
)
LONG = 500
"""Characters of one entry of a plan's provenance that are shown."""


def show(
    ctx: typer.Context,
    path: Annotated[
        Path, typer.Argument(metavar="PROFILE|PLAN", help="A profile's directory or a plan file.", show_default=False)
    ],
    domains: Annotated[bool, typer.Option("--domains", help="A table for each of a profile's domains.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List a plan's kept experts.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a profile or a plan says.

    Of a profile, per layer: load, dead experts, the router's entropy, and what each smaller top-k would lose.

    Example:
      expertcut show model.profile --domains
    """
    out = output(ctx, as_json)
    if path.is_dir():
        _show_profile(out, path, domains)
    else:
        _show_plan(out, path, verbose)


def _show_profile(out: Output, path: Path, by_domain: bool) -> None:
    from expertcut.calibrate.profile import Profile
    from expertcut.calibrate.summary import summarise_layer
    from expertcut.cli.tables import facts, records

    profile = Profile.load(path)
    meta = profile.meta
    layers = [summarise_layer(profile.layer(prefix)) for prefix in profile.prefixes]
    domains = {
        name: [summarise_layer(profile.layer(prefix, {name: 1.0})) for prefix in profile.prefixes]
        for name in (meta.domains if by_domain else ())
    }
    document: dict[str, Any] = {
        "profile": str(path), "digest": profile.digest(), **meta.model_dump(mode="json", by_alias=True),
        "layers": records(layers),
    }  # fmt: skip
    if by_domain:
        document["layers_by_domain"] = {name: records(summaries) for name, summaries in domains.items()}
    counts = meta.tokens()
    rows = [
        ("profile", path), ("model", meta.source), ("experts", f"{meta.experts}, top-{meta.top_k}"),
        ("forward pass", meta.dtype), ("tokens", f"{sum(counts.values()):,}"),
        ("domains", ", ".join(f"{name} {count:,}" for name, count in counts.items())),
    ]  # fmt: skip
    parts = [part for name, summaries in domains.items() for part in _layers(name, summaries)]
    out.finish(document, facts(rows), *_layers("all domains", layers), *parts, "", LEGEND)


def _layers(domain: str, summaries: list[LayerSummary]) -> list[RenderableType]:
    from expertcut.cli.tables import heading, table

    smaller = range(len(summaries[0].lost_mass), 0, -1)
    load = [(s.layer, f"{s.tokens:,}", s.dead, f"{s.busiest:.1f}x", f"{s.entropy:.2f}") for s in summaries]
    columns = (">layer", *(f">k={k}" for k in smaller))

    def each(what: str, form: str = ".1%") -> list[list[object]]:
        return [[s.layer, *(format(getattr(s, what)[k - 1], form) for k in smaller)] for s in summaries]

    return [
        "", heading(f"{domain}: load"), table((">layer", ">tokens", ">dead", ">busiest", ">entropy"), load),
        "", heading(f"{domain}: output energy lost by a top-k of k"), table(columns, each("relative_error")),
        "", heading(f"{domain}: gate weight lost by a top-k of k"), table(columns, each("lost_mass")),
        "", heading(f"{domain}: gain that a top-k of k wants, layer by layer"), table(columns, each("gain", ".3f")),
    ]  # fmt: skip


def _show_plan(out: Output, path: Path, verbose: bool) -> None:
    from expertcut.choose.plan import Plan
    from expertcut.cli.tables import facts, ranges, table

    plan = Plan.load(path)
    document = {"plan": str(path), **plan.model_dump(mode="json", by_alias=True, exclude_none=True)}
    parts: list[Any] = [facts(_plan_rows(path, plan))]
    if verbose:
        layers = [entry.layer for entry in plan.layers.values()]
        rows = [
            (entry.layer if layers.count(entry.layer) == 1 else f"{entry.layer} {prefix.rpartition('.')[2]}",
             len(entry.kept), entry.top_k or "unchanged", ranges(entry.kept))
            for prefix, entry in plan.layers.items()
        ]  # fmt: skip
        parts += ["", table((">layer", ">kept", ">top-k", "experts"), rows)]
    out.finish(document, *parts)


def _plan_rows(path: Path, plan: Plan) -> list[tuple[str, object]]:
    from expertcut.cli.tables import ranges
    from expertcut.measure.heal_record import KEY, HealRecord

    counts = sorted({len(entry.kept) for entry in plan.layers.values()})
    top_k = sorted({entry.top_k for entry in plan.layers.values() if entry.top_k})
    unchanged = ["unchanged"] * any(entry.top_k is None for entry in plan.layers.values())
    rows: list[tuple[str, object]] = [
        ("plan", path),
        ("model", plan.source.name),
        ("layers", ranges(sorted({entry.layer for entry in plan.layers.values()}))),
        ("experts kept per layer", " to ".join(map(str, counts[:1] + counts[1:][-1:]))),
        ("top-k", " to ".join(map(str, [*top_k[:1], *(unchanged or top_k[1:][-1:])]))),
    ]
    if plan.deltas:
        rows.append(("new values", f"{plan.deltas.file}, {len(plan.deltas.tensors):,} tensors"))
    healing, facts = HealRecord.of_plan(plan), dict(plan.provenance)
    if healing is not None:
        facts |= {KEY: healing.told, "healed_by": healing.command}
    return rows + [
        (name, _plain(value)) for name, value in facts.items()
        if value not in (None, {}, "") and not name.endswith("_text")  # sketches, for measurements to compare with
    ]  # fmt: skip


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(member)}" for name, member in value.items() if member is not None)
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONG else f"{text[:LONG]}… ({len(text):,} characters)"
