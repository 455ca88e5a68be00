"""The statistics of one MoE block with its domains pooled: what criteria are computed from. numpy only.

Shapes: E experts, K top-k, H hidden. Over the tokens that were routed to expert e, g is the gate weight that the model
multiplies with and f the expert's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one MoE block, domains pooled; float64."""

    prefix: str
    layer: int
    tokens: float
    """Tokens that went through the router."""
    count: np.ndarray
    """(E,) N_e: tokens routed to expert e."""
    gate_sum: np.ndarray
    """(E,) Σ g."""
    gate_sq_sum: np.ndarray
    """(E,) Σ g²."""
    norm_sum: np.ndarray
    """(E,) Σ ‖f‖."""
    norm_sq_sum: np.ndarray
    """(E,) Σ ‖f‖²."""
    gated_norm_sum: np.ndarray
    """(E,) Σ g‖f‖."""
    gated_norm_sq_sum: np.ndarray
    """(E,) Σ (g‖f‖)²."""
    gated_norm_max: np.ndarray
    """(E,) max g‖f‖."""
    act_max: np.ndarray
    """(E,) largest |activation| entering the down projection."""
    rank_count: np.ndarray
    """(E, K) how often e was the r-th choice."""
    rank_mass: np.ndarray
    """(E, K) Σ g as the r-th choice."""
    topk_error: np.ndarray
    """(K,) Σ ‖y_k − y‖² for k = 1..K."""
    topk_cross: np.ndarray
    """(K,) Σ ⟨y_k, y⟩."""
    topk_sq: np.ndarray
    """(K,) Σ ‖y_k‖²."""
    lost_mass: np.ndarray
    """(K,) Σ over tokens of the share of gate weight beyond the first k."""
    out_sq: float
    """Σ ‖y‖²."""
    entropy: float
    """Σ of the router distribution's entropy, nats."""
    lazy: Mapping[str, np.ndarray]
    """The statistics below by name, read on access."""

    @property
    def gate_norm_sq_sum(self) -> np.ndarray:
        """(E,) Σ g‖f‖²."""
        return self.lazy["gate_norm_sq_sum"]

    @property
    def gate_sq_norm_sum(self) -> np.ndarray:
        """(E,) Σ g²‖f‖."""
        return self.lazy["gate_sq_norm_sum"]

    @property
    def contribution_sum(self) -> np.ndarray:
        """(E,) Σ max(1 − cos(h, h̃), 0) g‖f‖, h the residual stream before the routed experts add to it, h̃ after."""
        return self.lazy["contribution_sum"]

    @property
    def out_sum(self) -> np.ndarray:
        """(E, H) Σ f."""
        return self.lazy["out_sum"]

    @property
    def out_sq_sum_h(self) -> np.ndarray:
        """(E, H) Σ f², elementwise."""
        return self.lazy["out_sq_sum_h"]

    @property
    def coact(self) -> np.ndarray:
        """(E, E) tokens routed to both; the diagonal is `count`."""
        return self.lazy["coact"]

    @property
    def coenergy(self) -> np.ndarray:
        """(E, E) Σ a_i a_j, a = g‖f‖."""
        return self.lazy["coenergy"]

    @property
    def gram(self) -> np.ndarray:
        """(E, E) Σ g_i g_j ⟨f_i, f_j⟩."""
        return self.lazy["gram"]
