"""The numbers of `expertcut show`, against a layer of which everything is known."""

import math

import numpy as np
import pytest

from expertcut.calibrate.stats import LayerStats
from expertcut.calibrate.summary import summarise_layer


def stats(tokens: float, count: list[float], topk_error: list[float], out_sq: float) -> LayerStats:
    E, K = len(count), len(topk_error)
    zero, ranks = np.zeros(E), np.zeros((E, K))
    return LayerStats(
        prefix="model.layers.5.mlp", layer=5, tokens=tokens, count=np.array(count), gate_sum=zero, gate_sq_sum=zero,
        norm_sum=zero, norm_sq_sum=zero, gated_norm_sum=zero, gated_norm_sq_sum=zero, gated_norm_max=zero, act_max=zero,
        rank_count=ranks, rank_mass=ranks, topk_error=np.array(topk_error), topk_cross=np.array([6.0, 20.0]),
        topk_sq=np.array([8.0, 20.0]) * (tokens > 0),
        lost_mass=np.array([6.0, 0.0]), out_sq=out_sq, entropy=tokens * math.log(4), lazy={},
    )  # fmt: skip


def test_a_layer_in_numbers() -> None:
    found = summarise_layer(stats(10, [12, 8, 0, 0], [5.0, 0.0], 20.0))
    assert (found.layer, found.prefix, found.tokens, found.dead) == (5, "model.layers.5.mlp", 10, 2)
    assert found.busiest == pytest.approx(12 / 5)
    assert found.entropy == pytest.approx(math.log(4))
    assert found.relative_error == (0.25,)
    assert found.lost_mass == (0.6,)
    assert found.gain == (0.75,)


def test_a_domain_without_tokens_is_all_zeros() -> None:
    found = summarise_layer(stats(0, [0, 0, 0, 0], [0.0, 0.0], 0.0))
    assert (found.tokens, found.dead, found.busiest, found.entropy, found.relative_error) == (0, 4, 0.0, 0.0, (0.0,))
