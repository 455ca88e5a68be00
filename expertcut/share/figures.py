"""A profile, a sweep or a benchmark in, the figures of a report out: each with title, caption, axes and its numbers.

Shapes: L layers with routed experts, E experts, K top-k, D domains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from expertcut.calibrate.summary import LayerSummary, summarise_layer
from expertcut.choose.criteria import Criterion
from expertcut.share.svg import Axis, Mark, Series, diagram, heatmap, table_of

if TYPE_CHECKING:
    from expertcut.calibrate.profile import Profile
    from expertcut.choose.plan import Plan
    from expertcut.measure.bench import Bench

Table = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]
"""Columns and rows."""
SPECIAL = 0.5
"""Share of an expert's use from which one domain counts as what it serves."""
BUSIEST = 0.1
"""The share of experts that is called the busiest."""
LOSS = Axis("change of the held-out loss, nats per token", "+.4f")
GAIN = Axis("gain in throughput", "+.1%")


@dataclass(frozen=True)
class Figure:
    """One figure of a report."""

    key: str
    """Its anchor, and the name of the file that it is exported to."""
    title: str
    caption: str
    svg: str
    table: Table
    cells: dict[str, Any] = field(default_factory=dict)
    """Of a heatmap: what its cells are, for the cursor."""

    @property
    def data(self) -> str:
        """`cells` as JSON, safe between HTML tags."""
        return json.dumps(self.cells, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def profile_figures(profile: Profile, plan: Plan | None, criterion: Criterion | None) -> list[Figure]:
    """Return what a profile shows: use, worth and kept experts, load, domains, and what a lower top-k loses.

    Raises:
        ProfileError: it lacks what the criterion reads.
    """
    stats = [profile.layer(prefix) for prefix in profile.prefixes]
    rows = _rows([(block.layer, block.prefix) for block in profile.meta.blocks])
    count = np.array([layer.count for layer in stats])
    figures = [_use(rows, count)]
    if criterion is not None:
        figures.append(_worth(rows, [criterion.score(layer) for layer in stats], criterion))
    if plan is not None:
        figures.append(kept_figure(plan, profile.meta.experts))
    figures.append(_load(rows, count))
    if len(profile.meta.domains) > 1:
        figures.append(_domains(rows, profile))
    if profile.meta.top_k > 1:
        figures.append(_top_k([summarise_layer(layer) for layer in stats], rows))
    return figures


def kept_figure(plan: Plan, experts: int) -> Figure:
    """Return which experts a plan keeps."""
    entries = list(plan.layers.items())
    kept = np.zeros((len(entries), experts))
    for at, (_, entry) in enumerate(entries):
        kept[at, list(entry.kept)] = 1
    rows = _rows([(entry.layer, prefix) for prefix, entry in entries])
    numbers = [(name, str(len(e.kept)), str(e.top_k or "unchanged"), "–" if e.gain is None else f"{e.gain:.4f}")
               for name, (_, e) in zip(rows, entries, strict=True)]  # fmt: skip
    return _heat(
        "kept", "Kept experts", "Which experts the plan keeps, by their numbers in the source.", kept, rows,
        "", (("layer", "experts kept", "top-k", "gain"), numbers), names=("dropped", "kept"), high=1.6,
    )  # fmt: skip


def sweep_figures(document: Mapping[str, Any]) -> list[Figure]:
    """Return the curve of a sweep, loss over size, and over speed where it has one."""
    points = document["points"]
    unit, name = (1e9, "GB") if max(p["nbytes"] for p in points) >= 1e9 else (1e6, "MB")
    size = Axis(f"weights, {name}", ".2f")
    lines: dict[str, list[Mark]] = {}
    for p in sorted(points, key=lambda p: p["nbytes"]):
        lines.setdefault(f"{p['strategy']}, top-{p['top_k']:g}{' on average' * p['per_layer']}", []).append(
            Mark(p["nbytes"] / unit, p["change"], p["change_low"], p["change_high"], f"{p['experts']} experts")
        )
    series = [Series(key, marks) for key, marks in lines.items()]
    text = f"{document['tokens']:,} tokens of held-out text; whiskers are 95 % intervals over sequences."
    what = f"Loss over the size of the weights, {text}"
    figures = [_diagram("trade-off", "What fewer experts cost", what, size, LOSS, series)]
    fast = [p for p in points if p.get("gain") is not None]
    if fast:
        clouds: dict[str, list[Mark]] = {}
        for p in fast:
            note = f"{p['experts']} experts, top-{p['top_k']:g}" + (", on the front" if p["front"] else "")
            clouds.setdefault(p["strategy"], []).append(
                Mark(p["gain"], p["change"], p["change_low"], p["change_high"], note)
            )
        best = sorted((p["gain"], p["change"]) for p in fast if p["front"])
        front = [Series("front", [Mark(*at) for at in best], steps=True)] if best else []
        service = document["service"]
        how = f"measured in {service['measured']}" if "measured" in service else (
            f"predicted for {service['hardware']['count']} {service['hardware']['name']}"
        )  # fmt: skip
        figures.append(_diagram(
            "pareto", "What speed costs",
            f"Loss over the gain in throughput at {service['concurrency']} requests at a time, {how}. Nothing beats "
            f"the points on the front. {text}",
            GAIN, LOSS, [*(Series(key, marks, line=False) for key, marks in clouds.items()), *front],
        ))  # fmt: skip
    return figures


def bench_figures(bench: Bench) -> list[Figure]:
    """Return throughput and time per token over the load; one pair of figures a length of prompts and answers."""
    figures = []
    lengths = list(dict.fromkeys((row.input_len, row.output_len) for row in bench.rows))
    machine = bench.machine
    where = f" on {', '.join((*machine.gpus, f'{machine.cores} cores of {machine.cpu}'))}" if machine else ""
    for number, (prompt, answer) in enumerate(lengths):
        rows = [row for row in bench.rows if (row.input_len, row.output_len) == (prompt, answer)]
        clients = Axis("requests at a time", "g", log=True)
        said = f"{bench.engine}{where}; {prompt} tokens in, {answer} out."
        key = f"-{number + 1}" * (len(lengths) > 1)
        by_variant: dict[str, list[Any]] = {}
        for row in sorted(rows, key=lambda row: row.concurrency):
            by_variant.setdefault(row.variant, []).append(row)
        speed = [
            Series(name, [
                Mark(r.concurrency, r.tokens_per_s, min(r.tokens_per_s_values), max(r.tokens_per_s_values),
                     "" if r.ratio is None else f"{r.ratio:.3f} of the first variant's")
                for r in some
            ]) for name, some in by_variant.items()
        ]  # fmt: skip
        figures.append(_diagram(
            f"throughput{key}", "Throughput under load", f"Median over rounds; whiskers span all rounds. {said}",
            clients, Axis("tokens written per second", ",.1f", zero=True), speed, interval="lowest to highest round",
        ))  # fmt: skip
        if all(row.tpot is not None for row in rows):
            slow = [
                Series(name, [Mark(r.concurrency, 1e3 * r.tpot) for r in some]) for name, some in by_variant.items()
            ]
            figures.append(_diagram(
                f"latency{key}", "Time per token under load", f"Median over all requests. {said}", clients,
                Axis("time per further token, ms", ",.1f", zero=True), slow,
            ))  # fmt: skip
    return figures


def _use(rows: list[str], count: NDArray[np.float64]) -> Figure:
    share = count / np.maximum(count.sum(axis=1, keepdims=True), 1) * count.shape[1]
    high = float(max(2.0, np.quantile(share, 0.99)))
    numbers = [
        (name, f"{int((layer == 0).sum())}", f"{layer.max():.2f}", str(int(layer.argmax())), f"{np.median(layer):.2f}")
        for name, layer in zip(rows, share, strict=True)
    ]  # fmt: skip
    return _heat(
        "usage", "Usage", "Tokens routed to each expert over the layer's mean: 1 is an even load, 0 an expert that no "
        "token chose. The brightest colour stands for that much or more.", share, rows, "times the mean",
        (("layer", "experts without a token", "the busiest, times the mean", "its number", "median"), numbers),
        high=high,
    )  # fmt: skip


def _worth(rows: list[str], found: Sequence[NDArray[np.float64]], criterion: Criterion) -> Figure:
    scores = [score if score.ndim == 1 else score.diagonal() for score in found]
    ranks = np.array([score.argsort().argsort() / max(len(score) - 1, 1) for score in scores])
    numbers = [
        (name, f"{score.min():.3g}", f"{np.median(score):.3g}", f"{score.max():.3g}", str(int(score.argmax())))
        for name, score in zip(rows, scores, strict=True)
    ]  # fmt: skip
    paper = f" ({criterion.paper})" if criterion.paper else ""
    what = "what dropping it alone costs" if found[0].ndim == 2 else "its score"
    return _heat(
        "saliency", f"Saliency by {criterion.name}", f"Experts of each layer in the order of {what} by {criterion.name}"
        f"{paper}: 0 is the first to go, 1 the last.", ranks, rows, "rank in the layer",
        (("layer", "lowest score", "median", "highest", "of expert"), numbers),
    )  # fmt: skip


def _load(rows: list[str], count: NDArray[np.float64]) -> Figure:
    share = count / np.maximum(count.sum(axis=1, keepdims=True), 1)
    experts = share.shape[1]
    logs = np.log(np.where(share > 0, share, 1))
    even = np.exp(-(share * logs).sum(axis=1)) / experts
    few = max(1, round(BUSIEST * experts))
    busiest = np.sort(share, axis=1)[:, -few:].sum(axis=1)
    series = [
        Series(name, [Mark(at, float(v), note=f"layer {rows[at]}") for at, v in enumerate(values)])
        for name, values in (
            ("experts that an even load of the same entropy would use, of all", even),
            (f"tokens that go to the busiest {few} of {experts}", busiest),
        )
    ]  # fmt: skip
    return _diagram(
        "load", "Load balance", "Of each layer: how many experts an even load of the same entropy would use, as a "
        "share of all; and the share of routed tokens that the busiest tenth of the experts takes.",
        Axis("MoE layer, counted from 0", whole=True), Axis("share", ".1%", zero=True), series,
    )  # fmt: skip


def _domains(rows: list[str], profile: Profile) -> Figure:
    meta = profile.meta
    use = np.array(
        [
            profile.arrays[f"{prefix}/count"] / np.maximum(profile.arrays[f"{prefix}/tokens"], 1)[:, None]
            for prefix in profile.prefixes
        ]
    )  # (L, D, E)
    total = use.sum(axis=1)
    top = np.where(total > 0, use.max(axis=1) / np.where(total > 0, total, 1), np.nan)
    first = use.argmax(axis=1)
    numbers = [
        (name, *(str(int(((first[at] == d) & (top[at] >= SPECIAL)).sum())) for d in range(len(meta.domains))),
         f"{np.nanmean(top[at]):.2f}" if (total[at] > 0).any() else "–")
        for at, name in enumerate(rows)
    ]  # fmt: skip
    figure = _heat(
        "domains", "Domain specialisation", "The largest share that one domain has of an expert's use, every domain "
        f"weighed alike: 1 is an expert of a single domain, 1/{len(meta.domains)} one that serves all alike. Experts "
        f"without a token are left empty. The table counts, for every domain, the experts that it has {SPECIAL:.0%} of "
        "or more.", top, rows, "largest share of a domain", (("layer", *meta.domains, "mean share"), numbers),
        low=1 / len(meta.domains),
    )  # fmt: skip
    figure.cells["kinds"] = {"names": meta.domains, "of": first.tolist()}
    return figure


def _top_k(layers: Sequence[LayerSummary], rows: list[str]) -> Figure:
    ks = range(1, len(layers[0].relative_error) + 1)
    faint = [
        Series(f"layer {name}", [Mark(k, layer.relative_error[k - 1]) for k in ks], faint=True)
        for name, layer in zip(rows, layers, strict=True)
    ]  # fmt: skip
    mean = [float(np.mean([layer.relative_error[k - 1] for layer in layers])) for k in ks]
    series = [*faint, Series("mean over layers", [Mark(k, value) for k, value in zip(ks, mean, strict=True)])]
    x, y = Axis("experts activated per token (top-k)", whole=True), Axis("output energy lost", ".1%", zero=True)
    table: Table = (
        ("layer", *(f"top-{k}" for k in ks)),
        [(name, *(f"{e:.1%}" for e in layer.relative_error)) for name, layer in zip(rows, layers, strict=True)],
    )
    title, caption = "What a lower top-k loses", (
        "Of each layer's routed output, the share of its energy that is lost with fewer experts: ‖y_k − y‖² over ‖y‖². "
        "Thin: one line a layer; bold: their mean."
    )  # fmt: skip
    return Figure("top-k", title, caption, diagram(title, x, y, series), table)


def _diagram(
    key: str, title: str, caption: str, x: Axis, y: Axis, series: Sequence[Series], interval: str = "95 % interval"
) -> Figure:
    columns, rows = table_of(series, x, y)
    columns = tuple(interval if column == "95 % interval" else column for column in columns)
    return Figure(key, title, caption, diagram(title, x, y, series), (columns, rows))


def _heat(
    key: str, title: str, caption: str, values: NDArray[np.float64], rows: list[str], scale: str, table: Table, *,
    low: float = 0.0, high: float = 1.0, form: str = ".2f", names: Sequence[str] = (),
) -> Figure:  # fmt: skip
    svg = heatmap(title, values, rows, "expert", "layer", scale, low=low, high=high, form=form, names=names)
    digits = [[None if np.isnan(v) else round(float(v), 3) for v in line] for line in values]
    cells = {"rows": rows, "values": digits, "scale": scale, "names": list(names)}
    return Figure(key, title, caption, svg, table, cells)


def _rows(blocks: Sequence[tuple[int, str]]) -> list[str]:
    """Names of layers: their numbers, and the last part of the block's name where two share one."""
    numbers = [layer for layer, _ in blocks]
    return [
        str(layer) if numbers.count(layer) == 1 else f"{layer} {prefix.rpartition('.')[2]}" for layer, prefix in blocks
    ]
