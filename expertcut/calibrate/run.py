"""The calibration pass: a checkpoint and calibration data in, a profile out, one decoder layer at a time.

A streamed pass leaves its state beside the profile after every layer, so that the same command resumes an interrupted
one at the last finished layer; the state is removed when the profile is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import expertcut
from expertcut.calibrate import hf
from expertcut.calibrate.batches import batch_of, make_batches
from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.executor import LayerStream, find_bias, find_experts, find_router
from expertcut.calibrate.observer import Observer
from expertcut.calibrate.overlap import sequence_hashes
from expertcut.calibrate.passage import Advance, Notify, Passage
from expertcut.calibrate.profile import TEXT, BlockRecord, DataRecord, Profile, ProfileMeta
from expertcut.calibrate.residual import open_residual
from expertcut.calibrate.sums import BlockSums
from expertcut.calibrate.transfer import bound_kernel_caches, resolve_device, settle
from expertcut.checkpoint.types import Checkpoint
from expertcut.errors import ProfileError, UsageError
from expertcut.model import Geometry, fingerprint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ProfileOptions:
    """How to run the calibration pass."""

    device: str = "auto"
    dtype: str = "auto"
    """auto: float32 on a CPU, the checkpoint's dtype elsewhere."""
    resident: bool = False
    """Keep every layer loaded; no resuming."""
    micro_tokens: int = 2048
    """Tokens of a micro-batch."""
    pair_domains: bool = False
    """Store the E×E matrices per domain."""
    moments: bool = False
    """Store Σf and Σf² of every expert's output."""


def resolve_dtype(name: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype of the forward pass.

    Raises:
        UsageError: an unknown name.
    """
    if name == "auto":
        stored = checkpoint.config.get("torch_dtype") or checkpoint.config.get("dtype") or "bfloat16"
        name = "float32" if device.type == "cpu" else str(stored)
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is unknown; known: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def profile_model(
    checkpoint: Checkpoint, geometry: Geometry, data: CalibrationSet, out: Path, options: ProfileOptions,
    *, tokenizer: str, notify: Notify, advance: Advance,
) -> Profile:  # fmt: skip
    """Run the calibration pass and save the profile in `out`.

    `tokenizer` is the tokenizer's fingerprint; `notify` receives warnings, `advance` the progress.

    Raises:
        ProfileError: sequences longer than the model's positions, or an unusable partial profile.
        CheckpointError: the model cannot be run.
    """
    with open_stream(checkpoint, geometry, data, options, notify) as stream:
        meta = profile_meta(checkpoint, geometry, data, options, tokenizer, stream.dtype)
        state = _State(out, meta, stream)
        _pass(stream, geometry, data, options, state, notify, advance)
    hashes = sequence_hashes(s.ids for s in data.sequences)
    profile = Profile(meta, state.arrays | {TEXT: hashes})
    profile.save(out)
    state.remove()
    return profile


@contextmanager
def open_stream(
    checkpoint: Checkpoint, geometry: Geometry, data: CalibrationSet | None, options: ProfileOptions, notify: Notify
) -> Iterator[LayerStream]:
    """Open a model for running `data` through it (None: sequences known to be short enough); close it in the end.

    Raises:
        ProfileError: sequences longer than the model's positions.
        CheckpointError: the model cannot be run.
        UsageError: an unknown device or dtype.
    """
    if warning := hf.check_version():
        notify(warning)
    bound_kernel_caches()
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device, checkpoint)
    with closing(LayerStream(checkpoint, geometry, device=device, dtype=dtype, resident=options.resident)) as stream:
        if data is not None:
            _check_length(stream, data)
        yield stream


def _pass(
    stream: LayerStream, geometry: Geometry, data: CalibrationSet, options: ProfileOptions, state: _State,
    notify: Notify, advance: Advance,
) -> None:  # fmt: skip
    sequences = [s.ids for s in data.sequences]
    domains = [data.domains.index(s.domain) for s in data.sequences]
    if state.rows is None:
        batches = make_batches(sequences, domains, options.micro_tokens)
    else:
        batches = [batch_of(rows, sequences, domains) for rows in state.rows]
        notify(f"resuming at layer {state.done} of {len(stream)}")
    passage = Passage(stream, batches, 1, notify)
    state.restore(passage)
    last = max(block.layer for block in geometry.trunk)
    for index in range(state.done, last + 1):
        layer = stream.load(index)
        stream.read_ahead(index + 1)
        block = stream.block(index)
        observer = None if block is None else open_observer(stream, layer, len(data.domains), options)
        passage.step(index, layer, observer=observer)
        if observer is not None and block is not None:
            observer.close()
            state.arrays |= observer.sums.arrays(block.prefix)
        stream.release(index)
        state.save(index + 1, passage)
        advance(index + 1, last + 1)


def open_observer(stream: LayerStream, layer: nn.Module, domains: int, options: ProfileOptions) -> Observer:
    """Watch the MoE block of a loaded decoder layer; the caller closes the observer."""
    name, geometry = find_experts(layer) or "", stream.geometry
    experts: Any = layer.get_submodule(name)
    sums = BlockSums(
        domains=domains, experts=geometry.num_experts, top_k=geometry.top_k,
        hidden=experts.down_proj.shape[2 if experts.is_transposed else 1],
        renormalise=geometry.renormalise, pair_domains=options.pair_domains, moments=options.moments,
        device=stream.device, tail=geometry.tail, skips=geometry.family.skips,
    )  # fmt: skip
    router, bias = find_router(layer, geometry.family), find_bias(layer, geometry.family)
    residual = open_residual(layer, name, stream.config)
    return Observer(geometry.family.scoring, sums, router, bias and getattr(*bias), experts, residual)


def profile_meta(
    checkpoint: Checkpoint, geometry: Geometry, data: CalibrationSet, options: ProfileOptions, tokenizer: str,
    dtype: torch.dtype,
) -> ProfileMeta:  # fmt: skip
    """Return what a profile says of itself; `tokenizer` is the tokenizer's fingerprint."""
    record = DataRecord(
        fingerprint=data.fingerprint, tokens=data.tokens_by_domain, seq_len=data.seq_len, packed=data.packed,
        seed=data.seed, sources=data.sources,
    )  # fmt: skip
    return ProfileMeta(
        source=checkpoint.public_name, fingerprint=fingerprint(checkpoint, geometry), tokenizer=tokenizer,
        data=[record], domains=list(data.domains), experts=geometry.num_experts, top_k=geometry.top_k,
        blocks=[BlockRecord(prefix=b.prefix, layer=b.layer) for b in geometry.trunk],
        pair_domains=options.pair_domains, moments=options.moments, dtype=str(dtype).removeprefix("torch."),
        versions={"expertcut": expertcut.__version__, "torch": torch.__version__.partition("+")[0],
                  "transformers": transformers.__version__},
    )  # fmt: skip


def _check_length(stream: LayerStream, data: CalibrationSet) -> None:
    limit = getattr(stream.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(s.ids) for s in data.sequences)
    if limit and longest > limit:
        raise ProfileError(
            f"sequences of {longest} tokens, but the model has {limit} positions", f"pass --seq-len {limit}"
        )


class _State:
    """Progress on disk: `.partial/` inside the profile's directory, bound to model, data and options."""

    def __init__(self, out: Path, meta: ProfileMeta, stream: LayerStream) -> None:
        self.directory = out / ".partial"
        self.enabled = not stream.resident
        self.key = hashlib.sha256(meta.model_dump_json(by_alias=True).encode()).hexdigest()
        self.device = stream.device
        self.arrays: dict[str, np.ndarray] = {}
        self.done = 0
        self.rows: list[list[int]] | None = None
        self._saved: set[str] = set()
        journal = self.directory / "state.json"
        if self.enabled and journal.exists():
            try:
                found = json.loads(journal.read_text(encoding="utf-8"))
                key, self.done, self.rows = found["key"], found["done"], found["rows"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise self._damaged(error) from error
            if key != self.key:
                raise ProfileError(
                    f"{self.directory}: an unfinished profile of another model, data or options",
                    f"run the command that it belongs to, or remove it: rm -r {self.directory}",
                )

    def restore(self, passage: Passage) -> None:
        """Put hidden states and finished arrays back."""
        if self.rows is None:
            return
        try:
            hidden = load_file(self.directory / f"hidden-{self.done}.safetensors")
            passage.hidden[0] = [hidden[str(i)] for i in range(len(self.rows))]
            passage.carried[0] = [hidden.get(f"carried-{i}") for i in range(len(self.rows))]
            for done in range(1, self.done + 1):
                sums = load_file(self.directory / f"sums-{done}.safetensors")
                self.arrays |= {name: value.numpy() for name, value in sums.items()}
        except (OSError, SafetensorError, KeyError) as error:
            raise self._damaged(error) from error
        self._saved = set(self.arrays)

    def _damaged(self, error: Exception) -> ProfileError:
        return ProfileError(
            f"{self.directory}: the unfinished profile is damaged ({type(error).__name__})",
            f"remove it and start again: rm -r {self.directory}",
        )

    def save(self, done: int, passage: Passage) -> None:
        """Note that `done` layers are finished."""
        if not self.enabled:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        settle(self.device)
        hidden = {str(i): h.contiguous() for i, h in enumerate(passage.hidden[0])}
        hidden |= {f"carried-{i}": c.contiguous() for i, c in enumerate(passage.carried[0]) if c is not None}
        save_file(hidden, self.directory / f"hidden-{done}.safetensors")
        new = {name: torch.from_numpy(value) for name, value in self.arrays.items() if name not in self._saved}
        self._saved |= new.keys()
        save_file(new, self.directory / f"sums-{done}.safetensors")
        rows = [list(p.batch.rows) for p in passage.prepared]
        part = self.directory / "state.json.part"
        part.write_text(json.dumps({"key": self.key, "done": done, "rows": rows}), encoding="utf-8")
        os.replace(part, self.directory / "state.json")
        (self.directory / f"hidden-{done - 1}.safetensors").unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the progress; the profile is complete."""
        if self.directory.exists():
            shutil.rmtree(self.directory)
