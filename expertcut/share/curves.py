"""A sweep or a benchmark in, the figures of what fewer experts cost and gain out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from expertcut.share.figures import Figure, Table, line_figure
from expertcut.share.svg import Axis, Mark, Series

if TYPE_CHECKING:
    from expertcut.measure.bench import Bench, Row

LOSS = Axis("change of the held-out loss, nats per token", "+.4f")
GAIN = Axis("gain in throughput", "+.1%")
TOP_K = Axis("experts activated per token (top-k)")
APART = 7
"""Pixels between the whiskers of two variants at one place."""


def sweep_figures(document: Mapping[str, Any]) -> list[Figure]:
    """Return the curve of a sweep, loss over size, or over top-k where that is all that differs; and over speed.

    Raises:
        KeyError, TypeError, ValueError: it is no document of a sweep.
    """
    points, text = document["points"], f"{document['tokens']:,} tokens of held-out text"
    text += "; whiskers are 95 % intervals over sequences." if points[0]["change_low"] is not None else "."
    unit, prefix = (2**30, "GiB") if max(p["nbytes"] for p in points) >= 2**30 else (2**20, "MiB")
    size = Axis(f"weights, {prefix}", ".2f")
    table = _points_table(points, size, unit)
    sized = len({p["nbytes"] for p in points}) > 1 or len({p["top_k"] for p in points}) == 1
    lines: dict[str, list[Mark]] = {}
    for p in points:
        name = f"{p['strategy']}, top-{_top_k(p)}" if sized else p["strategy"]
        at, note = (p["nbytes"] / unit, f"{p['experts']} experts") if sized else (p["top_k"], f"top-{_top_k(p)}")
        lines.setdefault(name, []).append(Mark(at, p["change"], p["change_low"], p["change_high"], note))
    series = _series({name: sorted(marks, key=lambda mark: mark.x) for name, marks in lines.items()})
    title, over, x = ("What fewer experts cost", "the size of the weights", size) if sized else (
        "What a lower top-k costs", "the experts activated per token", TOP_K
    )  # fmt: skip
    caption = f"Change of the loss over {over}: lower is better, 0 is the unchanged model. {text}"
    figures = [line_figure("trade-off", title, caption, x, LOSS, series, table=table)]
    fast = [p for p in points if p.get("gain") is not None]
    return [*figures, _pareto(fast, document["service"], text, table)] if fast else figures


def bench_figures(bench: Bench) -> list[Figure]:
    """Return throughput and latency over the load; figures for each length of prompts and answers."""
    machine = bench.machine
    where = f" on {machine}" if machine else ""
    lengths = list(dict.fromkeys((row.input_len, row.output_len) for row in bench.rows))
    figures = []
    for number, (prompt, answer) in enumerate(lengths):
        rows = [row for row in bench.rows if (row.input_len, row.output_len) == (prompt, answer)]
        said = f"{bench.engine}{where}; {prompt} tokens in, {answer} out. Variants of one load stand side by side."
        figures += _load_figures(rows, f"-{number + 1}" * (len(lengths) > 1), said)
    return figures


def _pareto(fast: Sequence[Mapping[str, Any]], service: Mapping[str, Any], text: str, table: Table) -> Figure:
    clouds: dict[str, list[Mark]] = {}
    for p in fast:
        note = f"{p['experts']} experts, top-{_top_k(p)}" + (", on the front" if p["front"] else "")
        clouds.setdefault(p["strategy"], []).append(
            Mark(p["gain"], p["change"], p["change_low"], p["change_high"], note)
        )
    best = sorted((p["gain"], p["change"]) for p in fast if p["front"])
    front = [Series("front", [Mark(*at) for at in best], steps=True)] if best else []
    how = f"measured in {service['measured']}" if "measured" in service else (
        f"predicted for {service['hardware']['count']} × {service['hardware']['name']}"
    )  # fmt: skip
    caption = (
        f"Change of the loss over the gain in throughput at {service['concurrency']} requests at a time, {how}. Right "
        f"and low is better; nothing beats the points on the front. {text}"
    )
    return line_figure("pareto", "What speed costs", caption, GAIN, LOSS, [*_series(clouds, line=False), *front],
                       table=table)  # fmt: skip


def _points_table(points: Sequence[Mapping[str, Any]], size: Axis, unit: int) -> Table:
    columns = ("strategy", "experts", "top-k", size.label, LOSS.label, "95 % interval", "KL, nats per token",
               "top-1 agreement", "accepted")  # fmt: skip
    rated = any(p.get("gain") is not None for p in points)
    rows = []
    for p in points:
        between = "" if p["change_low"] is None else f"{p['change_low']:+.4f} to {p['change_high']:+.4f}"
        row = (p["strategy"], str(p["experts"]), _top_k(p), format(p["nbytes"] / unit, size.form),
               f"{p['change']:+.4f}", between, f"{p['kl']:.4f}", f"{p['agreement']:.1%}",
               f"{p['acceptance']:.1%}")  # fmt: skip
        speed = () if not rated else ("–", "–", "") if p["gain"] is None else (
            f"{p['tokens_per_second']:,.4g}", f"{p['gain']:+.1%}", "front" if p["front"] else ""
        )  # fmt: skip
        rows.append((*row, *speed))
    return (*columns, *(("tokens/s", "gain", "") if rated else ())), rows


def _top_k(point: Mapping[str, Any]) -> str:
    return f"{point['top_k']:g}{' on average' * point['per_layer']}"


def _load_figures(rows: Sequence[Row], key: str, said: str) -> list[Figure]:
    clients = Axis("requests at a time", "g", log=True)

    def drawn(name: str, title: str, caption: str, unit: str, interval: str, mark: Callable[[Row], Mark]) -> Figure:
        variants: dict[str, list[Mark]] = {}
        for row in sorted(rows, key=lambda row: row.concurrency):
            variants.setdefault(row.variant, []).append(mark(row))
        return line_figure(f"{name}{key}", title, f"{caption} {said}", clients, Axis(unit, ",.1f", zero=True),
                           _series(variants), interval=interval, apart=APART)  # fmt: skip

    def throughput(row: Row) -> Mark:
        least, most = min(row.tokens_per_s_values), max(row.tokens_per_s_values)
        return Mark(row.concurrency, row.tokens_per_s, least, most, _ratio(row))

    def time(median: str) -> Callable[[Row], Mark]:
        def mark(row: Row) -> Mark:
            middle, tail = 1e3 * getattr(row, median), 1e3 * getattr(row, f"{median}_p95")
            return Mark(row.concurrency, middle, middle, tail)

        return mark

    figures = [drawn("throughput", "Throughput under load", "Median over rounds; whiskers span all rounds.",
                     "tokens written per second", "lowest to highest round", throughput)]  # fmt: skip
    times = [("ttft", "first-token", "Time to the first token under load", "time to the first token, ms")]
    if all(row.tpot is not None for row in rows):
        times.append(("tpot", "latency", "Time per token under load", "time per further token, ms"))
    for median, name, title, unit in times:
        caption = "Median over all requests; whiskers reach to what 95 % of them stay below."
        figures.append(drawn(name, title, caption, unit, "median to 95th percentile", time(median)))
    return figures


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    between = "" if row.ratio_low is None else f" ({row.ratio_low:.3f} to {row.ratio_high:.3f})"
    return f"{row.ratio:.3f}{between} of the first variant's"


def _series(lines: Mapping[str, Sequence[Mark]], line: bool = True) -> list[Series]:
    return [Series(name, marks, line=line) for name, marks in lines.items()]
