"""One measured run of a benchmark, a process of its own: bench_child.py PART …; its figures go out as JSON."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_watch import resident

from expertcut.calibrate import run
from expertcut.calibrate.batches import make_batches
from expertcut.calibrate.data import CalibrationSet, Sequence
from expertcut.calibrate.executor import LayerStream
from expertcut.checkpoint import Checkpoint, open_checkpoint
from expertcut.choose import make_plan
from expertcut.measure.heal_fit import fit_deltas
from expertcut.measure.whatif import evaluate
from expertcut.model import Geometry, read_geometry
from expertcut.rewrite import prune, require, verify_bytes, verify_structure


def opened(model: str) -> tuple[Checkpoint, Geometry]:
    checkpoint = open_checkpoint(model)
    return checkpoint, read_geometry(checkpoint)


def calibration(tokens: str) -> CalibrationSet:
    rows = np.load(tokens)
    sequences = tuple(Sequence(row, "random") for row in rows)
    return CalibrationSet(sequences, ("random",), rows.shape[1], True, 0, Path(tokens).stem, [])


def compare(model: str, tokens: str, dtype: str, rounds: str) -> dict[str, Any]:
    """Seconds of the bare forward pass and of the profiling pass, in turn, both with all weights in memory."""
    options = run.ProfileOptions(device="cpu", dtype=dtype, resident=True)
    passes = {"bare": bare_pass(model, tokens, dtype, options), "profile": profile_pass(model, tokens, dtype, options)}
    found: dict[str, list[float]] = {f"{name}{kind}": [] for name in passes for kind in ("", "_cpu")}
    for number in range(-1, int(rounds)):  # the first round loads and warms up
        for name in sorted(passes, reverse=number % 2 > 0):
            wall, cpu = time.perf_counter(), time.process_time()
            passes[name]()
            if number >= 0:
                found[name].append(time.perf_counter() - wall)
                found[f"{name}_cpu"].append(time.process_time() - cpu)
    return found


def bare_pass(model: str, tokens: str, dtype: str, options: run.ProfileOptions) -> Callable[[], None]:
    """The decoder without its head over the micro-batches, transformers' grouped experts."""
    from transformers import AutoModelForCausalLM

    data = calibration(tokens)
    batches = make_batches([s.ids for s in data.sequences], [0] * len(data.sequences), options.micro_tokens)
    kinds = {"experts_implementation": "grouped_mm", "attn_implementation": "sdpa"}
    decoder = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **kinds).eval().model

    @torch.inference_mode()
    def forward() -> None:
        for batch in batches:
            decoder(input_ids=batch.ids, use_cache=False)

    return forward


def profile_pass(model: str, tokens: str, dtype: str, options: run.ProfileOptions) -> Callable[[], None]:
    """What `profile_model` does between opening the model and writing the profile."""
    (checkpoint, geometry), data = opened(model), calibration(tokens)
    device, out = torch.device("cpu"), Path()
    stream = LayerStream(checkpoint, geometry, device=device, dtype=getattr(torch, dtype), resident=True)
    meta = run.profile_meta(checkpoint, geometry, data, options, "", stream.dtype)

    def observed() -> None:
        state = run._State(out, meta, stream)
        run._pass(stream, geometry, data, options, state, print, lambda done, total: None)

    return observed


def base(model: str, tokens: str, dtype: str) -> dict[str, Any]:
    """Bytes: the process with meta model and embeddings, the largest layer in compute dtype, the hidden states."""
    (checkpoint, geometry), data = opened(model), calibration(tokens)
    stream = LayerStream(checkpoint, geometry, device=torch.device("cpu"), dtype=getattr(torch, dtype))
    stream.prepare(make_batches([data.sequences[0].ids[:2]], [0], 2)[0])
    gc.collect()
    anon, _ = resident()
    size = stream.dtype.itemsize
    layers = [sum(p.numel() for p in layer.parameters()) * size for layer in stream._layers]
    hidden = sum(len(s.ids) for s in data.sequences) * geometry.hidden * size
    return {"anon": anon, "layer": max(layers), "hidden": hidden}


def profile(model: str, tokens: str, dtype: str, kind: str, out: str) -> dict[str, Any]:
    """Seconds of `profile_model`, loading included."""
    (checkpoint, geometry), data = opened(model), calibration(tokens)
    options = run.ProfileOptions(device="cpu", dtype=dtype, resident=kind == "resident")
    started = time.perf_counter()
    run.profile_model(
        checkpoint, geometry, data, Path(out), options, tokenizer="", notify=print, advance=lambda done, total: None
    )
    return {"seconds": time.perf_counter() - started}


def heal(model: str, tokens: str, dtype: str, experts: str, out: str) -> dict[str, Any]:
    """Seconds of fitting new values for a plan, loading and writing included."""
    (checkpoint, geometry), data = opened(model), calibration(tokens)
    plan = make_plan(checkpoint, geometry, strategy="random", experts=int(experts))
    started = time.perf_counter()
    fit_deltas(
        checkpoint, geometry, plan, data, Path(out), run.ProfileOptions(device="cpu", dtype=dtype), notify=print,
        advance=lambda done, total: None,
    )  # fmt: skip
    return {"seconds": time.perf_counter() - started}


def whole(model: str, tokens: str, dtype: str, experts: str, out: str) -> dict[str, Any]:
    """Seconds of the steps from a checkpoint to a verified one with fewer experts, chosen by REAP."""
    (checkpoint, geometry), data = opened(model), calibration(tokens)
    started = time.perf_counter()
    made = run.profile_model(
        checkpoint, geometry, data, Path(f"{out}.profile"), run.ProfileOptions(device="cpu", dtype=dtype),
        tokenizer="", notify=print, advance=lambda done, total: None,
    )  # fmt: skip
    profiled = time.perf_counter()
    plan = make_plan(checkpoint, geometry, strategy="reap", experts=int(experts), profile=made)
    prune(checkpoint, geometry, plan, out)
    pruned = time.perf_counter()
    require(verify_structure(out, checkpoint) + verify_bytes(out, checkpoint))
    verified = time.perf_counter()
    return {"profile": profiled - started, "prune": pruned - profiled, "verify": verified - pruned}


def whatif(model: str, tokens: str, dtype: str, kind: str) -> dict[str, Any]:
    """Seconds of comparing eight plans with the base, in one pass or in one each, and their losses."""
    (checkpoint, geometry), data = opened(model), calibration(tokens)
    half, options = geometry.num_experts // 2, run.ProfileOptions(device="cpu", dtype=dtype)
    plans = {f"{i}": make_plan(checkpoint, geometry, strategy="random", experts=half, seed=i) for i in range(8)}
    passes = [plans] if kind == "together" else [{name: plan} for name, plan in plans.items()]
    wall, cpu, losses = time.perf_counter(), time.process_time(), []
    for some in passes:
        found = evaluate(
            checkpoint, geometry, data, some, options, notify=print, advance=lambda done, total: None
        )  # fmt: skip
        losses += [found.mean("nll", name) for name in some]
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "losses": losses}


if __name__ == "__main__":
    parts = {
        "compare": compare, "base": base, "profile": profile, "whole": whole, "whatif": whatif, "heal": heal,
    }  # fmt: skip
    print(json.dumps(parts[sys.argv[1]](*sys.argv[2:])))  # type: ignore[operator]
