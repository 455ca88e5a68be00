"""Half the experts of every published checkpoint, from sparse files to the layout of what would be written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sparse
from golden_names import NAMES, as_checkpoint, golden

from expertcut.checkpoint import DTYPE_BITS, Checkpoint, open_checkpoint, read_array
from expertcut.choose import make_plan
from expertcut.choose.plan import kept_by_block, validate
from expertcut.model import ExpertTensor, Geometry, Whole, read_geometry
from expertcut.rewrite import plan_layout, prune, require, verify_bytes, verify_structure
from expertcut.rewrite.layout import Layout, Move

COUNTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
"""Every config key, of any family, that counts routed experts."""


@dataclass(frozen=True)
class Job:
    """A checkpoint, and every other expert of it."""

    ckpt: Checkpoint
    geometry: Geometry
    layout: Layout


def halved(folder: Path) -> Job:
    """Open a checkpoint, keep every other expert, and lay the result out."""
    ckpt = open_checkpoint(str(folder))
    geometry = read_geometry(ckpt)
    plan = make_plan(ckpt, geometry, strategy="odd", keep=0.5)
    validate(plan, geometry)
    assert {len(kept) for kept in kept_by_block(plan, geometry).values()} == {geometry.num_experts // 2}
    return Job(ckpt, geometry, plan_layout(ckpt, geometry, plan))


def written(layout: Layout) -> Checkpoint:
    """Headers of what would be written."""
    return as_checkpoint([(t.name, t.source.dtype, t.shape) for s in layout.shards for t in s.tensors], layout.config)


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield path and value of everything in a config that is neither object nor list."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if members is None:
        yield path, value
    else:
        for key, member in members:
            yield from leaves(member, (*path, key))


@pytest.fixture(scope="module", params=NAMES)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Each published checkpoint, opened, planned and laid out."""
    return halved(sparse.write(golden(request.param), tmp_path_factory.mktemp("sparse") / "in", thin=True))


def test_half_the_experts_of_a_published_checkpoint(job: Job) -> None:
    whole, half = job.geometry, read_geometry(written(job.layout))
    assert (half.num_experts, half.top_k) == (whole.num_experts // 2, whole.top_k)
    assert list(half.blocks) == list(whole.blocks)
    assert (half.n_group, half.topk_group, half.tail) == (whole.n_group, whole.topk_group, whole.tail)
    for prefix, block in whole.blocks.items():
        expected = Counter(type(whole.roles[tensor]) for tensor in block.tensors)
        expected[ExpertTensor] //= 2
        assert Counter(type(half.roles[tensor]) for tensor in half.blocks[prefix].tensors) == expected
    saved = sum(half.num_experts * whole.expert_nbytes(job.ckpt, prefix) for prefix in whole.blocks)
    assert job.layout.nbytes == job.ckpt.nbytes - saved


def test_every_byte_of_the_layout_has_a_place_in_the_source(job: Job) -> None:
    for tensor in (tensor for shard in job.layout.shards for tensor in shard.tensors):
        role, ranges = job.geometry.roles[tensor.source.name], list(tensor.ranges())
        assert tensor.nbytes == prod(tensor.shape) * DTYPE_BITS[tensor.source.dtype] // 8
        assert all(tensor.source.start <= at and at + size <= tensor.source.end for at, size in ranges)
        assert sum(size for _, size in ranges) == tensor.nbytes
        assert (tensor.name, tensor.shape) == (tensor.source.name, tensor.source.shape) or not isinstance(role, Whole)
    for shard in job.layout.shards:
        moved = sum(step.nbytes for step in shard.steps() if isinstance(step, Move))
        assert moved + sum(t.nbytes for t in shard.tensors if t.in_memory) + len(shard.header) == shard.nbytes


def test_counts_of_experts_are_all_that_changes_in_the_config(job: Job) -> None:
    old, new = dict(leaves(job.ckpt.config)), dict(leaves(job.layout.config))
    counts = {path for path in old if any(step in COUNTS for step in path)}
    assert list(old) == list(new) and counts
    assert {path for path in old if old[path] != new[path]} == counts
    assert {new[path] for path in counts} == {job.geometry.num_experts // 2}


SCALE = {"201088": "96", "5760x90": "192x3", "5760": "192", "2880x90": "96x3", "2880": "96", "{0-23}": "{0-2}"}
"""gpt-oss-20b with three layers, thirty times narrower; blocks stay 16 bytes for 32 numbers."""


def test_mxfp4_of_gpt_oss_is_pruned_and_verified(tmp_path: Path) -> None:
    """The real thing at full size: scripts/bench_headers."""
    published = golden("gpt-oss-20b")
    rows = reduce(lambda text, item: text.replace(*item), SCALE.items(), published.rows)
    sizes = {"num_hidden_layers": 3, "hidden_size": 96, "intermediate_size": 96, "vocab_size": 96}
    small = replace(
        published, rows=rows, config=published.config | sizes, shards="model-{00000-00002}-of-00002.safetensors"
    )
    folder = sparse.write(small, tmp_path / "in")
    random = np.random.default_rng(0)
    for tensor in open_checkpoint(str(folder)).tensors.values():
        with (folder / tensor.shard).open("r+b") as file:
            file.seek(tensor.start)
            file.write(random.integers(64, size=tensor.nbytes, dtype=np.uint8).tobytes())  # finite in any dtype
    ckpt = open_checkpoint(str(folder))
    geometry = read_geometry(ckpt)
    plan = make_plan(ckpt, geometry, strategy="odd", keep=0.5)
    prune(ckpt, geometry, plan, tmp_path / "out")
    require(verify_structure(tmp_path / "out", ckpt) + verify_bytes(tmp_path / "out", ckpt))
    pruned = open_checkpoint(str(tmp_path / "out"))
    blocks = "model.layers.1.mlp.experts.gate_up_proj_blocks"
    assert pruned.tensors[blocks].shape == (16, 192, 3, 16)
    assert (read_array(pruned, blocks) == read_array(ckpt, blocks)[1::2]).all()
    assert pruned.config["num_local_experts"] == 16
    assert pruned.config["quantization_config"] == published.config["quantization_config"]
