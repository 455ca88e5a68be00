"""The cost model: what a model asks, a machine and a load in; tokens per second, latencies, memory and a regime out.

A step's time adds up: routed experts, layer by layer; what is dense; attention; communication; overhead. The first
three are smooth rooflines, √(memory² + compute²), and routed experts have a least time under the root. docs/estimate.md
has the formulas with their sources.

Invariant: what depends on the model and the load alone is tallied once (`cost_traffic`), so that fitting constants or
trying machines costs a few array operations.

Shapes: R loads, S steps, three a load, L layers with routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

from expertcut.choose.plan import Plan
from expertcut.measure.cost_hardware import Machine
from expertcut.measure.cost_model import ModelCost, planned
from expertcut.measure.cost_traffic import Load, Traffic, distinct, tally
from expertcut.model import Geometry

BASE = "base"
"""The unchanged model."""
USABLE = 0.9
"""Share of a device's memory that engines fill with weights and cache."""
SLIGHT = 0.01
"""Gains of half the experts or half the top-k below which routed experts do not decide the speed."""
Regime = Literal["memory-bound", "union-saturated", "compute-bound", "overhead-bound"]


@dataclass(frozen=True)
class Seconds:
    """Where the time of steps goes: (S,) each; the step takes their sum."""

    experts: np.ndarray
    dense: np.ndarray
    attention: np.ndarray
    communication: np.ndarray
    overhead: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """(S,) time of each step."""
        total: np.ndarray = self.experts + self.dense + self.attention + self.communication + self.overhead
        return total


@dataclass(frozen=True)
class Prediction:
    """What a model does on a machine under a load."""

    concurrency: int
    tokens_per_second: float
    """Output tokens of all requests, over the time from the first prompt to the last token."""
    ttft: float
    """Seconds to a request's first token, on average over the burst."""
    tpot: float
    """Seconds per further token of a request."""
    gain: float
    """Of throughput over the unchanged model, 0.1: a tenth more."""
    experts: float
    """Routed experts of a layer, on average over the layers; `top_k` and `touched` likewise."""
    top_k: float
    touched: float
    """Distinct experts that a decode step reads."""
    step: Mapping[str, float]
    """Seconds of a decode step by where they go."""
    weights_nbytes: float
    """Of all devices together, copies counted once; `cache_nbytes` likewise, for sequences of full length."""
    cache_nbytes: float
    device_nbytes: float
    """Weights and cache on one device."""
    usable_nbytes: float
    """What a device has for them."""
    fits: bool
    regime: Regime
    half_top_k: float
    """Gain that half the top-k would bring from here; `half_experts` likewise."""
    half_experts: float

    @property
    def why(self) -> str:
        """What the regime follows from, in words."""
        levers = f"half the top-k would gain {self.half_top_k:.1%}, half the experts {self.half_experts:.1%}"
        share = self.step["experts"] / sum(self.step.values())
        return f"a step reads {self.touched:.1f} of {self.experts:g} experts a layer, {share:.0%} of its time; {levers}"


def step_seconds(traffic: Traffic, work: ModelCost, machine: Machine) -> Seconds:
    """Return how long steps take on a machine. Of `work` only what no plan changes is read."""
    c, n, tp = machine.constants, machine.count, machine.shards
    memory, flops = machine.bandwidth, machine.flops(work.fp8)
    experts = np.sqrt((traffic.expert_nbytes / (n * memory)) ** 2 + (traffic.expert_flops / (n * flops)) ** 2
                      + (c.moe_us * 1e-6) ** 2)  # fmt: skip
    caches = machine.copies * min(tp, work.attention.kv_heads)
    return Seconds(
        experts.sum(axis=1),
        np.hypot(traffic.dense_nbytes / (tp * memory), traffic.dense_flops / (n * flops)),
        np.hypot(traffic.cache_nbytes / (caches * memory), traffic.attention_flops / (n * flops)),
        _exchange(traffic, work, machine),
        work.layers * c.layer_us * 1e-6 + traffic.sequences / machine.copies * c.sequence_us * 1e-6,
    )


def _exchange(traffic: Traffic, work: ModelCost, machine: Machine) -> np.ndarray:
    """Seconds on the links: attention is all-reduced among `tp`, experts among the devices that slice them, or sent."""
    n, tp, ep = machine.count, machine.shards, machine.ep
    link, moe = machine.link_gb_s * 1e9, len(work.moe) / work.layers
    attention = 2 * (tp - 1) / tp * traffic.exchanged / machine.copies
    slices = n // ep
    experts = 2 * (slices - 1) / slices * traffic.exchanged * moe / ep
    dense = 2 * (tp - 1) / tp * traffic.exchanged * (1 - moe) / machine.copies
    sent = 2 * (ep - 1) / ep * traffic.dispatched / n
    result: np.ndarray = (attention + experts + dense + sent) / link
    return result


def throughput(traffic: Traffic, seconds: Seconds, loads: Sequence[Load]) -> np.ndarray:
    """Return output tokens per second of each load: (R,)."""
    whole = (traffic.times * seconds.total).reshape(-1, 3).sum(axis=1)
    answers: np.ndarray = np.array([load.concurrency * load.output_len for load in loads]) / whole
    return answers


def predict(work: ModelCost, machine: Machine, load: Load, base: float | None = None) -> Prediction:
    """Predict what a model does on a machine under a load; `base` is the unchanged model's tokens per second."""
    traffic = tally(work, load)
    seconds = step_seconds(traffic, work, machine)
    rate = float(throughput(traffic, seconds, [load])[0])
    prefill, first = _prefill(traffic, seconds, load)
    cache = load.concurrency * work.attention.kv_nbytes * work.attention.cached(load.input_len + load.output_len)
    device = (work.expert_nbytes / machine.count + work.fixed_nbytes / machine.shards
              + cache / machine.copies / min(machine.shards, work.attention.kv_heads))  # fmt: skip
    usable = USABLE * machine.memory_gb * 1e9
    regime, half_top_k, half_experts = _regime(work, machine, load, traffic, rate)
    step = {f.name: float(getattr(seconds, f.name)[0]) for f in fields(Seconds)}
    further = (prefill - first) / max(load.output_len - 1, 1)
    layers = len(work.moe)
    return Prediction(
        load.concurrency, rate, first, further + sum(step.values()), rate / base - 1 if base else 0.0,
        sum(len(moe.chosen) for moe in work.moe) / layers, sum(float(moe.chosen.sum()) for moe in work.moe) / layers,
        sum(float(distinct(moe.chosen, traffic.tokens[:1])[0]) for moe in work.moe) / layers, step, work.nbytes, cache,
        device, usable, device <= usable, regime, half_top_k, half_experts,
    )  # fmt: skip


def _prefill(traffic: Traffic, seconds: Seconds, load: Load) -> tuple[float, float]:
    """Seconds in which all prompts are read, and until a request's first token, on average."""
    _, full, last = seconds.total * (traffic.times > 0)
    whole = traffic.times[1] * full + last
    prompts = load.concurrency * load.input_len
    # a prompt is done with the chunk that holds its last token: each chunk ends so many of them
    ends = [min((i + 1) * load.chunk, prompts) // load.input_len for i in range(int(traffic.times[1:].sum()))]
    done = np.diff([0, *ends])
    at = np.minimum(np.arange(1, len(ends) + 1) * full, whole) if full else np.array([whole])
    return whole, float((done * at).sum() / load.concurrency)


def _regime(
    work: ModelCost, machine: Machine, load: Load, traffic: Traffic, rate: float
) -> tuple[Regime, float, float]:
    """Which lever moves more: fewer experts a token, by their bytes or their FLOPs, or fewer experts in all.

    Those are the regimes of arXiv 2505.03531; a fourth is that neither moves anything.
    """
    fewer = work.routed(lambda moe: replace(moe, chosen=moe.chosen / 2))
    left = work.routed(lambda moe: moe.narrowed(-(-len(moe.chosen) // 2)))
    own, other = tally(fewer, load), tally(left, load)
    half_top_k, half_experts = (
        float(throughput(changed, step_seconds(changed, work, machine), [load])[0]) / rate - 1
        for changed in (own, other)
    )
    if max(half_top_k, half_experts) < SLIGHT:
        return "overhead-bound", half_top_k, half_experts
    if half_experts > half_top_k:
        return "union-saturated", half_top_k, half_experts
    nbytes = (traffic.times[:, None] * (traffic.expert_nbytes - own.expert_nbytes)).sum() / machine.bandwidth
    flops = (traffic.times[:, None] * (traffic.expert_flops - own.expert_flops)).sum() / machine.flops(work.fp8)
    return "memory-bound" if nbytes > flops else "compute-bound", half_top_k, half_experts


def predict_plans(
    work: ModelCost, geometry: Geometry, plans: Mapping[str, Plan], machine: Machine, load: Load
) -> dict[str, Prediction]:
    """Predict the unchanged model, under the name `base`, and what each plan makes of it; layers may differ.

    Raises:
        PlanError: a plan is of another model.
    """
    works = {BASE: work} | {name: planned(work, geometry, plan) for name, plan in plans.items()}
    return predict_all(works, machine, load)


def predict_all(works: Mapping[str, ModelCost], machine: Machine, load: Load) -> dict[str, Prediction]:
    """Predict several variants of a model; gains are over the first."""
    found: dict[str, Prediction] = {}
    for name, work in works.items():
        base = next(iter(found.values())).tokens_per_second if found else None
        found[name] = predict(work, machine, load, base)
    return found
