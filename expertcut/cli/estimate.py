"""`expertcut estimate`: throughput, latency and memory on hardware that is not at hand, from headers."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertcut.cli.common import Output, numbers, output
from expertcut.cli.options import LOADS, Json, Model, Revision, Services, Shards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from expertcut.calibrate.profile import Profile
    from expertcut.checkpoint import Checkpoint
    from expertcut.measure.cost import Prediction
    from expertcut.measure.cost_fit import Fit
    from expertcut.measure.cost_hardware import Machine
    from expertcut.measure.cost_model import ModelCost
    from expertcut.model import Geometry

VARIANTS, FITTING = "Variants of the model", "Fitting"


def estimate(
    ctx: typer.Context,
    model: Model,
    service: Services = LOADS,
    tp: Shards = None,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="DIR", show_default=False,
                     help="Profile of the model: which experts its routers choose. Default: all alike."),
    ] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option("--plan", metavar="FILE", rich_help_panel=VARIANTS, show_default=False,
                     help="A plan; layers may differ. Repeatable."),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option("--experts", metavar="N,…", rich_help_panel=VARIANTS, show_default=False,
                     help="Experts to keep, the most popular ones."),
    ] = None,
    top_k: Annotated[
        str | None, typer.Option("--top-k", metavar="K,…", rich_help_panel=VARIANTS, show_default=False, help="Top-k.")
    ] = None,
    fit: Annotated[
        Path | None,
        typer.Option("--fit", metavar="FILE", rich_help_panel=FITTING, show_default=False,
                     help="Fit the hardware's constants to measured rows of this model, such as bench.json."),
    ] = None,
    save_hardware: Annotated[
        Path | None,
        typer.Option("--save-hardware", metavar="FILE", rich_help_panel=FITTING, show_default=False,
                     help="Write the hardware with its constants, for --hardware."),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Predict what a model and variants of it do on some hardware under load. Reads headers only.

    See docs/estimate.md for the formulas, and for how far to trust them.

    Example:
      expertcut estimate MODEL --hardware h200x8 --concurrency 8,32 --experts 128 --top-k 8,6
    """
    from expertcut.calibrate.profile import Profile
    from expertcut.checkpoint import open_checkpoint
    from expertcut.cli.service import loads_of, machine_of
    from expertcut.measure.cost import predict_all
    from expertcut.model import read_geometry

    out = output(ctx, as_json)
    machine, loads = machine_of(service, tp), loads_of(service)
    counts, tops = numbers("--experts", experts), numbers("--top-k", top_k)
    checkpoint = open_checkpoint(model, revision, download=False)
    geometry = read_geometry(checkpoint)
    known = Profile.load(profile) if profile is not None else None
    works = _works(checkpoint, geometry, plan or [], counts, tops, known)
    fitted = _fitted(works["base"], fit, machine) if fit is not None else None
    machine = fitted.machine if fitted else machine
    if save_hardware is not None:
        machine.save(save_hardware)
    found = {load.concurrency: predict_all(works, machine, load) for load in loads}
    _finish(out, checkpoint, works["base"], machine, fitted, found)


def _works(
    checkpoint: Checkpoint, geometry: Geometry, plans: Sequence[Path], counts: Sequence[int], tops: Sequence[int],
    profile: Profile | None,
) -> dict[str, ModelCost]:  # fmt: skip
    """The unchanged model, the plans by their files' names, and a grid of counts."""
    from expertcut.choose.plan import Plan, validate
    from expertcut.errors import PlanError, ProfileError, UsageError
    from expertcut.measure.cost_model import model_cost, planned
    from expertcut.model import geometry_hash

    own = geometry_hash(geometry)
    if profile is not None and profile.meta.fingerprint.geometry != own:
        raise ProfileError(f"the profile is of {profile.meta.source}, of another geometry than {checkpoint.name}")
    works = {"base": model_cost(checkpoint, geometry, profile)}
    for path in plans:
        plan = Plan.load(path)
        if plan.source.fingerprint.geometry != own:
            raise PlanError(f"{path}: made for {plan.source.name}, of another geometry than {checkpoint.name}")
        validate(plan, geometry)
        works[str(path)] = planned(works["base"], geometry, plan)
    for experts, k in product(counts or [geometry.num_experts], tops or [geometry.top_k]):
        if experts > geometry.num_experts or k > experts:
            raise UsageError(f"{experts} of {geometry.num_experts} experts with top-{k}: that many there are not",
                             "a higher --experts or a lower --top-k")  # fmt: skip
        if (experts, k) != (geometry.num_experts, geometry.top_k):
            works[f"{experts} experts, top-{k}"] = works["base"].with_counts(experts, k)
    return works


def _fitted(work: ModelCost, path: Path, machine: Machine) -> Fit:
    from expertcut.measure.cost_fit import Experiment, judge, read_measured

    return judge(Experiment(work, read_measured(path)), machine)


def _finish(
    out: Output, checkpoint: Checkpoint, work: ModelCost, machine: Machine, fitted: Fit | None,
    found: dict[int, dict[str, Prediction]],
) -> None:  # fmt: skip
    from dataclasses import asdict

    from expertcut.cli.service import say_assumptions
    from expertcut.cli.tables import facts, heading

    say_assumptions(out, work, machine)
    rows = [{"variant": name, **asdict(one), "why": one.why} for every in found.values() for name, one in every.items()]
    document: dict[str, Any] = {
        "model": checkpoint.public_name, "hardware": machine.model_dump(),
        "routing": "profile" if work.profiled else "uniform", "notes": list(work.notes), "rows": rows,
    }  # fmt: skip
    if fitted:
        document["fit"] = {"error": fitted.error, "left_out": fitted.left_out, "drift": fitted.drift}
    shown: list[RenderableType] = [heading(checkpoint.name), facts(_facts(work, machine, fitted))]
    for clients, every in found.items():
        first = next(iter(every.values()))
        shown += ["", f"concurrency {clients}, {first.regime}: {first.why}", _table(every)]
    out.finish(document, *shown)


def _facts(work: ModelCost, machine: Machine, fitted: Fit | None) -> list[tuple[str, object]]:
    routing = "as the profile saw it" if work.profiled else "uniform, as there is no --profile"
    c = machine.constants
    layout = f"attention over {machine.shards}, experts " + (f"over {machine.ep}" if machine.ep > 1 else "sliced")
    rows: list[tuple[str, object]] = [
        ("hardware", f"{machine.count} {machine.name}; {layout}"),
        ("constants", f"{c.bandwidth:.0%} of the bandwidth, {c.compute:.0%} of the FLOP/s, {c.layer_us:.3g} µs a "
                      f"layer, {c.moe_us:.3g} µs a MoE layer at least, {c.sequence_us:.3g} µs a sequence"),
        ("fitted to", machine.fitted or "nothing"),
        ("routing", routing),
    ]  # fmt: skip
    if fitted:
        gains = f"gains {fitted.error:.1f} points on average, {fitted.left_out:.1f} for loads left out of it"
        rows.append(("errors of the fit", f"{gains}; throughput {fitted.drift:.1%}"))
    return rows


def _table(every: dict[str, Prediction]) -> RenderableType:
    from expertcut.choose import format_size
    from expertcut.cli.tables import table

    rows = [
        (name, f"{p.tokens_per_second:,.4g}", f"{p.gain:+.1%}", f"{1e3 * p.ttft:,.4g}", f"{1e3 * p.tpot:,.4g}",
         f"{p.touched:.1f} of {p.experts:g}", p.regime, format_size(round(p.weights_nbytes)),
         format_size(round(p.cache_nbytes)), f"{p.device_nbytes / p.usable_nbytes:.0%}{'' if p.fits else ', too much'}")
        for name, p in every.items()
    ]  # fmt: skip
    return table(("variant", ">tokens/s", ">gain", ">first token, ms", ">per token, ms", ">experts read", "regime",
                  ">weights", ">KV cache", ">of a device's memory"), rows)  # fmt: skip
