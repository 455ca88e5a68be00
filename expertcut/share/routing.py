"""A profile in, the figures of what its text does to a model's experts out; a plan, and what it does to them.

Shapes: L layers with routed experts, E experts, K top-k, D domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from expertcut.calibrate.stats import LayerStats
from expertcut.calibrate.summary import LayerSummary, summarise_layer
from expertcut.choose.criteria import Criterion
from expertcut.share.figures import Figure, Table, heat_figure, layer_names, line_figure, rounded
from expertcut.share.svg import Axis, Mark, Series

if TYPE_CHECKING:
    from expertcut.calibrate.profile import Profile
    from expertcut.choose.plan import Plan

SPECIAL = 0.5
"""Share of an expert's use from which one domain counts as what it serves."""
BUSIEST = 0.1
"""The share of experts that is called the busiest."""
KEPT, DROPPED, MIXED = "3b73a8", "f2a93b", "8a8f98"
TINTS = ("e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7")
"""Of domains: Okabe and Ito's colours, which colour-blind readers tell apart."""
Values = NDArray[np.float64]


def profile_figures(
    profile: Profile, plan: Plan | None, criterion: Criterion | None, weights: Mapping[str, float] | None
) -> list[Figure]:
    """Return what a profile shows: use, worth and kept experts, load, domains, and what a lower top-k loses.

    `weights` are those of domains that the criterion weighs by.

    Raises:
        ProfileError: it lacks what the criterion reads.
    """
    stats = [profile.layer(prefix) for prefix in profile.prefixes]
    names = layer_names([(block.layer, block.prefix) for block in profile.meta.blocks])
    count_LE = np.array([layer.count for layer in stats])
    figures = [_use(names, count_LE)]
    if criterion is not None:
        scores = [criterion.score(profile.layer(prefix, weights)) for prefix in profile.prefixes]
        figures.append(_worth(names, scores, criterion, weights))
    if plan is not None:
        figures.append(kept_figure(plan, profile.meta.experts, dict(zip(profile.prefixes, stats, strict=True))))
    figures.append(_load(names, [block.layer for block in profile.meta.blocks], count_LE))
    if len(profile.meta.domains) > 1:
        figures += _domains(names, profile)
    if profile.meta.top_k > 1:
        figures += _lower_top_k(names, [summarise_layer(layer) for layer in stats])
    return figures


def kept_figure(plan: Plan, experts: int, stats: Mapping[str, LayerStats]) -> Figure:
    """Return which experts a plan keeps; of blocks with statistics also what share of the choices it takes away."""
    entries = list(plan.layers.items())
    names = layer_names([(entry.layer, prefix) for prefix, entry in entries])
    gone_LE = np.ones((len(entries), experts))
    lost: list[float | None] = []
    for at, (prefix, entry) in enumerate(entries):
        gone_LE[at, list(entry.kept)] = 0
        count_E = stats[prefix].count if prefix in stats else None
        lost.append(None if count_E is None or not count_E.any() else float(count_E @ gone_LE[at] / count_E.sum()))
    rows = [(name, str(len(e.kept)), str(e.top_k or "unchanged"), "–" if e.gain is None else f"{e.gain:.4f}",
             *(["–" if share is None else f"{share:.1%}"] * bool(stats)))
            for name, (_, e), share in zip(names, entries, lost, strict=True)]  # fmt: skip
    columns = ("layer", "experts kept", "top-k", "gain", *(["choices of dropped experts"] * bool(stats)))
    caption = "Which experts the plan keeps, by their numbers in the source."
    if known := [share for share in lost if share is not None]:
        caption += f" Of what the profile's tokens chose, {_span(known)} by layer is dropped and goes to other experts."
    return heat_figure("kept", "Kept experts", caption, gone_LE, names, "", (columns, rows),
                       kinds={"kept": KEPT, "dropped": DROPPED})  # fmt: skip


def _use(names: list[str], count_LE: Values) -> Figure:
    share_LE = count_LE / np.maximum(count_LE.sum(axis=1, keepdims=True), 1) * count_LE.shape[1]
    rows = [
        (name, f"{int((layer == 0).sum())}", f"{layer.max():.2f}", str(int(layer.argmax())), f"{np.median(layer):.2f}")
        for name, layer in zip(names, share_LE, strict=True)
    ]
    layer, expert = np.unravel_index(int(share_LE.argmax()), share_LE.shape)
    caption = (
        "Tokens routed to each expert over the layer's mean: 1 is an even load, 0 an expert that no token chose; the "
        f"brightest colour stands for that much or more. {int((count_LE == 0).sum()):,} of {count_LE.size:,} experts "
        f"are without a token; the busiest is expert {expert} of layer {names[layer]}, with "
        f"{share_LE[layer, expert]:.1f} times the mean."
    )
    columns = ("layer", "experts without a token", "the busiest, times the mean", "its number", "median")
    return heat_figure("usage", "Usage", caption, share_LE, names, "times the mean", (columns, rows),
                       high=float(max(2.0, np.quantile(share_LE, 0.99))))  # fmt: skip


def _worth(
    names: list[str], found: Sequence[Values], criterion: Criterion, weights: Mapping[str, float] | None
) -> Figure:
    scores_LE = np.array([score if score.ndim == 1 else score.diagonal() for score in found])
    ranks_LE = scores_LE.argsort(axis=1, kind="stable").argsort(axis=1) / max(scores_LE.shape[1] - 1, 1)
    rows = [
        (name, f"{score.min():.3g}", f"{np.median(score):.3g}", f"{score.max():.3g}", str(int(score.argmax())))
        for name, score in zip(names, scores_LE, strict=True)
    ]
    paper = f" ({criterion.paper})" if criterion.paper else ""
    what = "what dropping one alone costs" if found[0].ndim == 2 else "their scores"
    weighed = f", domains weighed {', '.join(f'{n} {w:g}' for n, w in weights.items())}" if weights else ""
    caption = (
        f"Experts of each layer in the order of {what} by {criterion.name}{paper}{weighed}: 0 is the first to go, 1 "
        "the last. Scores of two layers are no measure of each other, so ranks are shown; the cursor tells the score."
    )
    columns = ("layer", "lowest score", "median", "highest", "of expert")
    also = {"name": "score", "of": rounded(scores_LE, ".4g")}
    title = f"Saliency by {criterion.name}"
    return heat_figure("saliency", title, caption, ranks_LE, names, "rank in the layer", (columns, rows), also=also)


def _load(names: list[str], layers: list[int], count_LE: Values) -> Figure:
    share_LE = count_LE / np.maximum(count_LE.sum(axis=1, keepdims=True), 1)
    experts = share_LE.shape[1]
    even_L = np.exp(-(share_LE * np.log(np.where(share_LE > 0, share_LE, 1))).sum(axis=1)) / experts
    few = max(1, round(BUSIEST * experts))
    ordered_LE = np.sort(share_LE, axis=1)
    busiest_L = ordered_LE[:, -few:].sum(axis=1)
    gini_L = 2 * (ordered_LE @ np.arange(1, experts + 1)) / experts - (experts + 1) / experts
    single = len({*layers}) == len(layers)
    series = [
        Series(name, [
            Mark(layers[at] if single else at, float(value), note="" if single else f"layer {names[at]}")
            for at, value in enumerate(values)
        ])
        for name, values in (("effective experts, of all", even_L),
                             (f"choices of the busiest {few} of {experts}", busiest_L))
    ]  # fmt: skip
    table: Table = (
        ("layer", "effective experts, of all", f"choices of the busiest {few}", "the busiest, times the mean", "Gini"),
        [
            (name, f"{even:.1%}", f"{some:.1%}", f"{most * experts:.2f}", f"{gini:.3f}")
            for name, even, some, most, gini in zip(names, even_L, busiest_L, ordered_LE[:, -1], gini_L, strict=True)
        ],
    )
    caption = (
        "Effective experts: how many would carry the load evenly with the same entropy, as a share of all; 100 % is "
        f"even. Dashed: the share of the tokens' choices that the busiest tenth takes. The least even is layer "
        f"{names[int(even_L.argmin())]} ({even_L.min():.0%}), the most layer {names[int(even_L.argmax())]} "
        f"({even_L.max():.0%})."
    )
    across = "layer" if single else "set of experts, counted from 0"
    return line_figure("load", "Load balance", caption, Axis(across, whole=True), Axis("share", ".1%", zero=True),
                       series, table=table)  # fmt: skip


def _domains(names: list[str], profile: Profile) -> list[Figure]:
    domains = profile.meta.domains
    use_LDE = np.array([
        profile.arrays[f"{prefix}/count"] / np.maximum(profile.arrays[f"{prefix}/tokens"], 1)[:, None]
        for prefix in profile.prefixes
    ])  # fmt: skip
    total_LE = use_LDE.sum(axis=1)
    top_LE = np.where(total_LE > 0, use_LDE.max(axis=1) / np.where(total_LE > 0, total_LE, 1), np.nan)
    first_LE = use_LDE.argmax(axis=1)
    special_LE = np.nan_to_num(top_LE) >= SPECIAL
    served = [int((special_LE & (first_LE == d)).sum()) for d in range(len(domains))]
    coloured = sorted(range(len(domains)), key=lambda d: (-served[d], d))[: len(TINTS)]
    kinds = {domains[d]: TINTS[at] for at, d in enumerate(coloured)} | {"no domain has half": MIXED}
    kind_LE = np.where(np.isnan(top_LE), np.nan, len(coloured))
    for at, d in enumerate(coloured):
        kind_LE[special_LE & (first_LE == d)] = at
    told_L = _information(use_LDE)
    table: Table = (
        ("layer", *domains, "mean largest share", "told by one choice, bits"),
        [
            (name, *(str(int((special & (first == d)).sum())) for d in range(len(domains))),
             f"{np.nanmean(top):.2f}" if not np.isnan(top).all() else "–", f"{told:.3f}")
            for name, special, first, top, told in zip(names, special_LE, first_LE, top_LE, told_L, strict=True)
        ],
    )  # fmt: skip
    told = (
        f"Every domain weighs alike; experts without a token are left empty. The table counts the experts that a "
        f"domain has {SPECIAL:.0%} of or more, and says how much one choice of an expert tells of the domain: at most "
        f"{np.log2(len(domains)):.2f} bits."
    )
    few = f" The {len(TINTS)} domains with most experts are shown." if len(domains) > len(TINTS) else ""
    whose = heat_figure(
        "domains", "Experts of one domain", f"Experts with {SPECIAL:.0%} or more of their use from one domain: "
        f"{', '.join(f'{name} {served[d]:,}' for d, name in enumerate(domains))}, of {top_LE.size:,}.{few} What is "
        "pruned by text without a domain loses its experts first.", kind_LE, names, "", table, kinds=kinds,
        also={"name": "largest share of a domain", "of": rounded(top_LE)},
    )  # fmt: skip
    share = heat_figure(
        "specialisation", "Domain specialisation", "The largest share that one domain has of an expert's use: 1 is an "
        f"expert of a single domain, 1/{len(domains)} one that serves all alike. {told}", top_LE, names,
        "largest share of a domain", table, low=1 / len(domains),
        also={"name": "most of it", "of": first_LE.tolist(), "names": domains},
    )  # fmt: skip
    return [whose, share]


def _information(use_LDE: Values) -> Values:
    """Mutual information of domain and chosen expert, (L,) bits; domains are as likely."""
    given_LDE = use_LDE / np.maximum(use_LDE.sum(axis=2, keepdims=True), np.finfo(float).tiny)
    mean_LDE = np.broadcast_to(given_LDE.mean(axis=1, keepdims=True), given_LDE.shape)
    ratio_LDE = np.divide(given_LDE, mean_LDE, out=np.ones_like(given_LDE), where=given_LDE > 0)
    found: Values = np.maximum((given_LDE * np.log2(ratio_LDE)).sum(axis=2).mean(axis=1), 0)
    return found


def _lower_top_k(names: list[str], layers: Sequence[LayerSummary]) -> list[Figure]:
    lost, wanted = (np.array([getattr(layer, what) for layer in layers]) for what in ("relative_error", "gain"))
    first = lost[:, -1]
    least, most = int(first.argmin()), int(first.argmax())
    k = lost.shape[1]
    lines = "Thin: a line a layer, which tells its number when pointed at; bold: their mean."
    return [
        _per_k("top-k", "What a lower top-k loses", "The share of the energy of a layer's routed output that is lost "
               f"with fewer experts: ‖y_k\u00a0−\u00a0y‖² over ‖y‖². At top-{k}, layer {names[least]} loses least "
               f"({first[least]:.1%}) and layer {names[most]} most ({first[most]:.1%}). {lines}",
               Axis("output energy lost", ".1%", zero=True), names, lost),
        _per_k("gain", "Gain that a lower top-k wants", "The factor on what the remaining experts add up to that "
               f"brings it nearest to the whole output: ⟨y_k,\u00a0y⟩ over ‖y_k‖². {lines}",
               Axis("gain", ".3f"), names, wanted),
    ]  # fmt: skip


def _per_k(key: str, title: str, caption: str, y: Axis, names: list[str], values: Values) -> Figure:
    ks = range(1, values.shape[1] + 1)
    lines = [*zip([f"layer {name}" for name in names], values, strict=True), ("mean over layers", values.mean(axis=0))]
    series = [
        Series(name, [Mark(k, float(line[k - 1])) for k in ks], faint=at < len(names))
        for at, (name, line) in enumerate(lines)
    ]
    table: Table = (
        ("layer", *(f"top-{k}" for k in ks)),
        [(name, *(format(value, y.form) for value in line)) for name, line in zip(names, values, strict=True)],
    )
    return line_figure(key, title, caption, Axis("experts activated per token (top-k)", whole=True), y, series,
                       table=table)  # fmt: skip


def _span(shares: Sequence[float]) -> str:
    low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
    return low if low == high else f"{low} to {high}"
