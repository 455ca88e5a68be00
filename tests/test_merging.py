"""scripts/merging.py: who is merged with whom, and which neuron with which."""

from __future__ import annotations

import importlib
from functools import partial
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from expertcut.calibrate.reader import TensorReader
from expertcut.checkpoint import open_checkpoint
from expertcut.model import ExpertTensor, read_geometry


@pytest.fixture
def merging(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repo / "scripts"))
    return importlib.import_module("merging")


@pytest.mark.parametrize("seed", range(20))
def test_an_assignment_costs_no_more_than_any_other(merging: Any, seed: int) -> None:
    cost = np.random.default_rng(seed).random((6, 6))
    rows, found = np.arange(6), merging.assign(cost)
    least = min(cost[rows, list(order)].sum() for order in permutations(range(6)))
    assert sorted(found) == list(range(6))
    assert cost[rows, found].sum() == pytest.approx(least)


def test_a_shuffle_of_many_neurons_is_undone(merging: Any) -> None:
    random = np.random.default_rng(0)
    points, order = random.standard_normal((96, 12)), random.permutation(96)
    cost = np.linalg.norm(points[:, None] - points[order][None], axis=-1)
    assert (order[merging.assign(cost)] == np.arange(96)).all()


def turned(reader: TensorReader, name: str, order: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Another expert's matrix, its neurons in another order."""
    return reader.view(name).index_select(int("down_proj" in name), order)


def test_a_shuffled_twin_merges_into_the_same_expert(merging: Any, demo_model: Path) -> None:
    """Neurons in another order make no other expert: aligned with the first's, their mean is the first."""
    checkpoint = open_checkpoint(demo_model)
    geometry = read_geometry(checkpoint)
    block, order = geometry.trunk[1], torch.from_numpy(np.random.default_rng(0).permutation(geometry.expert_width))
    names = {(role.expert, role.part): name for name in block.tensors
             if isinstance(role := geometry.roles[name], ExpertTensor)}  # fmt: skip
    reader = TensorReader(checkpoint)
    reader.changes = {names[1, part]: partial(turned, reader, names[0, part], order) for part in merging.PARTS}
    first = torch.randn(geometry.expert_width, 50)
    neurons = torch.stack((first, first[order]))
    stream = SimpleNamespace(reader=reader, geometry=geometry)
    merged = merging._average(stream, block, [0, 1], np.array([3.0, 1.0]), neurons)
    for part, value in merged.items():
        torch.testing.assert_close(value, reader.view(names[0, part]))


def test_the_most_salient_takes_the_nearest_first(merging: Any) -> None:
    """16 experts, groups of at most two: each centre takes one, in the order of salience."""
    distance = np.abs(np.arange(16)[:, None] - np.arange(16)[None]).astype(float)
    saliency = np.arange(16, dtype=float)
    groups = merging.gather(distance, saliency, tuple(range(8, 16)))
    assert groups == {15 - i: [7 - i] for i in range(8)}


def test_clusters_stay_within_the_routers_groups(merging: Any) -> None:
    points = np.array([[0.0], [10], [0.1], [10.1], [0], [10], [20], [20.1]])
    assert sorted(map(sorted, merging.cluster(points, 4, 2))) == [[0, 2], [1, 3], [4, 5], [6, 7]]
    assert sorted(map(sorted, merging.cluster(points, 3, 1))) == [[0, 2, 4], [1, 3, 5], [6, 7]]
