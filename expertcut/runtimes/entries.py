"""Checkpoints and top-k in; the variants of a benchmark, and how each is started in an engine, out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from expertcut.checkpoint import Checkpoint, open_checkpoint
from expertcut.errors import UsageError
from expertcut.measure.bench import Cell, Variant
from expertcut.measure.load import Target, api_key, served_name
from expertcut.measure.rounds import Engine, Start
from expertcut.model import Edit, Geometry, read_geometry
from expertcut.model.families import dig
from expertcut.model.summary import max_positions
from expertcut.runtimes.overrides import top_k_overrides
from expertcut.runtimes.serving import Served, vllm_server


@dataclass(frozen=True)
class Entry:
    """One variant, and what makes it of its checkpoint."""

    variant: Variant
    checkpoint: Checkpoint
    geometry: Geometry
    edits: tuple[Edit, ...]
    """Values of the config by which it gets its top-k; none if that is the checkpoint's own."""
    arguments: tuple[str, ...]
    """The same for vLLM's command."""

    @property
    def vocabulary(self) -> int:
        """Token ids that the model knows, as its config says."""
        scope = dig(self.checkpoint.config, self.geometry.family.root) or {}
        return int(scope.get("vocab_size") or self.checkpoint.config["vocab_size"])


def open_entries(models: Sequence[Path], top_k: Sequence[int]) -> list[Entry]:
    """Open checkpoints and give each these top-k, or its own alone if there are none.

    Raises:
        UsageError: a top-k that no engine can put on that checkpoint, or that its experts do not suffice for.
        CheckpointError: one that is none.
    """
    entries: list[Entry] = []
    for path in models:
        checkpoint = open_checkpoint(str(path))
        geometry = read_geometry(checkpoint)
        for wanted in top_k or (None,):
            taken = [entry.variant.variant for entry in entries]
            entries.append(_entry(checkpoint, geometry, wanted, taken))
    return entries


def check_lengths(entries: Sequence[Entry], loads: Sequence[Cell], longest: int) -> None:
    """Refuse loads that a model has no positions for; `longest` is the longest of given prompts.

    Raises:
        UsageError: there is one.
    """
    wanted = room(loads, longest)
    for entry in entries:
        limit = max_positions(entry.checkpoint, entry.geometry)
        if limit is not None and wanted > limit:
            raise UsageError(
                f"{entry.checkpoint.name}: prompt and answer take {wanted} tokens, but the model has {limit} positions",
                "lower --input-len or --output-len",
            )


def room(loads: Sequence[Cell], longest: int) -> int:
    """Return how many tokens the longest prompt and answer take."""
    return max(max(cell.input_len, longest) + cell.output_len for cell in loads)


def in_vllm(
    entries: Sequence[Entry], python: Path, arguments: Sequence[str], positions: int, log: Path, start_timeout: float,
    timeout: float,
) -> Start:  # fmt: skip
    """Return how to start the variants in vLLM's server, with positions for so many tokens."""

    def start(variant: Variant) -> AbstractContextManager[Engine]:
        entry = _of(entries)[variant]
        own = ["--max-model-len", str(positions), *entry.arguments]
        if not any(name.startswith("tokenizer") for name in entry.checkpoint.companions):
            own.append("--skip-tokenizer-init")
        return vllm_server(
            python, entry.checkpoint.path, entry.checkpoint.public_name, [*own, *arguments], log=log,
            start_timeout=start_timeout, timeout=timeout,
        )  # fmt: skip

    return start


def in_transformers(entries: Sequence[Entry]) -> Start:
    """Return how to load the variants in transformers."""

    def start(variant: Variant) -> AbstractContextManager[Engine]:
        from expertcut.runtimes.batched import batched

        entry = _of(entries)[variant]
        return batched(entry.checkpoint, entry.edits)

    return start


def behind(entries: Sequence[Entry], urls: Sequence[str], timeout: float) -> Start:
    """Return how to find the variants on servers: one URL for each of them, or one for all.

    Raises:
        RuntimeLintError: a server does not answer.
        UsageError: it does not serve the checkpoint.
    """
    found = {}
    for entry, url in zip(entries, [*urls] * len(entries) if len(urls) == 1 else urls, strict=True):
        target = Target(url.rstrip("/"), entry.checkpoint.public_name, timeout, api_key())
        found[entry.variant] = Served(Target(target.url, served_name(target), timeout, target.key))
    return lambda variant: nullcontext(found[variant])


def _of(entries: Sequence[Entry]) -> Mapping[Variant, Entry]:
    return {entry.variant: entry for entry in entries}


def _entry(checkpoint: Checkpoint, geometry: Geometry, wanted: int | None, taken: Sequence[str]) -> Entry:
    blocks = geometry.trunk
    experts = _mean([block.experts for block in blocks])
    top_k = _mean([block.top_k for block in blocks]) if wanted is None else wanted
    name = checkpoint.public_name + (f", top-{wanted}" if wanted is not None else "")
    name = next(n for n in (name, *(f"{name} ({i})" for i in range(2, len(taken) + 3))) if n not in taken)
    variant = Variant(variant=name, model=checkpoint.public_name, experts=experts, top_k=top_k)
    if wanted is None or (wanted == geometry.top_k and not geometry.uneven):
        return Entry(variant, checkpoint, geometry, (), ())
    fewest = min(block.experts for block in blocks)
    if wanted > fewest:
        raise UsageError(f"{checkpoint.name}: --top-k {wanted} exceeds the {fewest} experts of a layer")
    found = [o.arguments for o in top_k_overrides(geometry, checkpoint.config, wanted) if o.runtime == "vLLM"]
    if not found or geometry.uneven:
        raise UsageError(
            f"{checkpoint.name}: no engine takes another top-k for it", f"expertcut prune MODEL OUT --top-k {wanted}"
        )
    edits = tuple(geometry.config_edits(checkpoint.config, geometry.num_experts, wanted))
    return Entry(variant, checkpoint, geometry, edits, tuple(shlex.split(found[0])))


def _mean(numbers: Sequence[int]) -> int | float:
    return numbers[0] if len(set(numbers)) == 1 else fmean(numbers)
