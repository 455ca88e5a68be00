"""A layer's statistics in, the few numbers that people look at out. numpy only. Legend: E experts, K top-k."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from expertcut.calibrate.stats import LayerStats


@dataclass(frozen=True)
class LayerSummary:
    """One MoE block in numbers."""

    layer: int
    prefix: str
    tokens: int
    """Tokens through the router."""
    dead: int
    """Experts that no token was routed to."""
    busiest: float
    """Tokens of the busiest expert over the mean of all; 1 is an even load, E / K the most uneven."""
    entropy: float
    """Mean entropy of the router's distribution, nats per token; ln E is undecided."""
    relative_error: tuple[float, ...]
    """For every top-k = 1 … K-1: Σ‖y_k − y‖² / Σ‖y‖², fraction."""
    lost_mass: tuple[float, ...]
    """For every top-k = 1 … K-1: mean share of the gate weight that is lost, fraction."""
    gain: tuple[float, ...]
    """For every top-k = 1 … K-1: the factor that brings y_k nearest to y, Σ⟨y_k, y⟩ / Σ‖y_k‖²; 0 without tokens."""


def summarise_layer(stats: LayerStats) -> LayerSummary:
    """Reduce one layer's statistics; without tokens all numbers are 0."""
    mean = float(stats.count.mean())
    tokens = stats.tokens or 1.0
    return LayerSummary(
        layer=stats.layer,
        prefix=stats.prefix,
        tokens=round(stats.tokens),
        dead=int((stats.count == 0).sum()),
        busiest=float(stats.count.max()) / (mean or 1.0),
        entropy=stats.entropy / tokens,
        relative_error=tuple((stats.topk_error[:-1] / (stats.out_sq or 1.0)).tolist()),
        lost_mass=tuple((stats.lost_mass[:-1] / tokens).tolist()),
        gain=tuple((stats.topk_cross[:-1] / np.where(stats.topk_sq[:-1], stats.topk_sq[:-1], 1.0)).tolist()),
    )
