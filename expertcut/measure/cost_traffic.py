"""What the steps of a load make a model ask of a machine: bytes, FLOPs and what travels, the machine itself apart.

The load is a burst of requests, all of one length: their prompts are read in chunks, then all sequences decode in step,
as in benchmarks with fixed lengths. So a load has three kinds of steps: decode, full chunks, the last chunk.

Shapes: S steps, three a load, L layers with routed experts, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from expertcut.measure.cost_attention import VALUE
from expertcut.measure.cost_model import ModelCost


@dataclass(frozen=True)
class Load:
    """So many requests at a time, each of so many tokens."""

    concurrency: int
    input_len: int = 1024
    output_len: int = 1024
    chunk: int = 8192
    """Prompt tokens that a step takes at most."""


@dataclass(frozen=True)
class Traffic:
    """What the steps of R loads ask of a machine, the constants apart; three steps a load: (S,) or (S, L)."""

    times: np.ndarray
    """(S,) how often a load runs this step."""
    tokens: np.ndarray
    """(S,) tokens that pass through the layers."""
    sequences: np.ndarray
    """(S,) sequences that get a token."""
    expert_nbytes: np.ndarray
    """(S, L) of the distinct experts that a step touches."""
    expert_flops: np.ndarray
    """(S, L)"""
    dense_nbytes: np.ndarray
    dense_flops: np.ndarray
    cache_nbytes: np.ndarray
    attention_flops: np.ndarray
    exchanged: np.ndarray
    """(S,) bytes of the hidden states of all tokens, times layers."""
    dispatched: np.ndarray
    """(S,) bytes of the hidden states on their way to the experts that they chose, over all layers."""


def distinct(chosen: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return how many experts so many independent tokens touch: Σ_e 1 − (1 − p_e)^B; (E,), (S,) → (S,).

    Of equally popular ones E(1 − (1 − k/E)^B), arXiv 2505.03531.
    """
    touched: np.ndarray = (1 - (1 - chosen) ** tokens[:, None]).sum(axis=1)
    return touched


def tally(work: ModelCost, load: Load) -> Traffic:
    """Count what a load makes a model ask of a machine; (3,) and (3, L)."""
    chunks, rest = divmod(load.concurrency * load.input_len, load.chunk)
    tokens = np.array([load.concurrency, load.chunk, rest], float)
    sequences = np.array([load.concurrency, load.chunk / load.input_len, rest / load.input_len])
    times = np.array([load.output_len - 1, chunks, bool(rest)], float)
    seen: dict[int, np.ndarray] = {}
    for moe in work.moe:
        if id(moe.chosen) not in seen:
            seen[id(moe.chosen)] = distinct(moe.chosen, tokens)
    pairs = tokens * [work.attention.cached(at) for at in _contexts(load)]
    dense = work.dense
    for moe in work.moe:
        dense = dense.plus(moe.row, len(moe.chosen))
    flops = work.attention.decode_flops, *[work.attention.prefill_flops] * 2
    state = VALUE * work.hidden * tokens
    return Traffic(
        times, tokens, sequences,
        expert_nbytes=np.stack([seen[id(m.chosen)] * m.expert.nbytes for m in work.moe], axis=1),
        expert_flops=np.stack([2 * tokens * m.chosen.sum() * m.expert.parameters for m in work.moe], axis=1),
        dense_nbytes=np.full(3, dense.nbytes + work.head.nbytes),
        dense_flops=2 * (tokens * dense.parameters + sequences * work.head.parameters),
        cache_nbytes=work.attention.kv_nbytes * np.array([pairs[0], *tokens[1:] * work.attention.cached(1)]),
        attention_flops=pairs * flops,
        exchanged=state * work.layers, dispatched=state * sum(float(moe.chosen.sum()) for moe in work.moe),
    )  # fmt: skip


def _contexts(load: Load) -> tuple[float, float, float]:
    """Cached tokens that a token attends to, on average: half of the answer is there; prompts are causal."""
    return load.input_len + load.output_len / 2, load.input_len / 2, load.input_len / 2


def stacked(parts: Sequence[Traffic]) -> Traffic:
    """Return the traffic of several loads as one, three steps each."""
    return Traffic(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Traffic)))
