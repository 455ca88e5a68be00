"""What weights say of experts, in every layout: against transformers' modules and the plain twins of quantised ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantised_models import FORMATS, every_format, quantised_pair
from tiny_models import read_tensors, tiny_model
from tiny_types import EXPERTS, SUPPORTED, model_class, tiny_type

import expertcut.choose.weights as module
from expertcut.checkpoint import open_checkpoint, read_elements
from expertcut.choose import make_plan
from expertcut.choose.weights import WeightStats
from expertcut.errors import CheckpointError
from expertcut.model import read_geometry

Array = np.ndarray[Any, np.dtype[np.float64]]
READABLE = {name for name in FORMATS if name.startswith("FP8")}


def means(folder: Path, tell: Any = lambda nbytes: None) -> dict[str, tuple[Array, Array]]:
    """Mean magnitudes and root mean squares of every set of experts of the trunk, by key."""
    checkpoint = open_checkpoint(folder)
    geometry = read_geometry(checkpoint)
    stats = {key: WeightStats(checkpoint, geometry, key, tell) for block in geometry.trunk for key in block.keys}
    return {key: (found.weight_mean, found.weight_rms) for key, found in stats.items()}


def whole(weights: torch.Tensor, experts: int = EXPERTS) -> tuple[Array, Array]:
    """The same of a tensor whose first axis goes through the experts."""
    flat = weights.double().reshape(experts, -1)
    return flat.abs().mean(1).numpy(), flat.square().mean(1).sqrt().numpy()


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_type_as_transformers_holds_it(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_type(name, tmp_path_factory)
    model = model_class(name).from_pretrained(folder, dtype=torch.float32)
    expected = []
    for path, part in model.named_modules():
        if not path.endswith(".experts") or re.search(r"talker|tower|encoder\.", path):
            continue
        matrices = [p for p in part.parameters() if p.dim() == 3 or (name == "dbrx" and p.dim() == 2)]
        together = torch.cat([p.detach()[: len(p) // EXPERTS * EXPERTS].reshape(EXPERTS, -1) for p in matrices], dim=1)
        expected.append(whole(together))
    found = means(folder)
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_vl_moe"])
@pytest.mark.parametrize("piece", [1, 100])
def test_few_weights_at_a_time(
    name: str, piece: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BF16; the same from small pieces, of which no one is larger than asked for, or than a row."""
    folder = tiny_model(name, tmp_path_factory)
    at_once = means(folder)
    sizes: list[int] = []

    def noted(checkpoint: Any, name: str, start: int, stop: int) -> Any:
        sizes.append(stop - start)
        return read_elements(checkpoint, name, start, stop)

    monkeypatch.setattr(module, "read_elements", noted)
    monkeypatch.setattr(module, "PIECE", piece)
    told: list[int] = []
    for key, values in means(folder, told.append).items():
        np.testing.assert_allclose(values, at_once[key], rtol=1e-6)
    assert max(sizes) <= max(piece, 64)
    tensors = read_tensors(folder)
    weights = [n for n, t in tensors.items() if ".experts." in n and t.dim() > 1 and not n.endswith("bias")]
    trunk = [n for n in weights if not n.startswith(("mtp.", "model.layers.3."))]
    assert sum(told) == 2 * sum(sizes) == sum(tensors[n].nbytes for n in trunk)


@every_format
def test_quantised_weights_are_the_twin_s_or_refused(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, twin = quantised_pair(name, tmp_path_factory)
    if name not in READABLE:
        with pytest.raises(CheckpointError, match=r"quantised by [\w-]+ to \w+; of quantised weights, only") as caught:
            means(folder)
        assert "its plan applies to this checkpoint too" in str(caught.value.hint)
        return
    for (key, mine), theirs in zip(means(folder).items(), means(twin).values(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, err_msg=key)
    plans = []
    for path in (folder, twin):
        checkpoint = open_checkpoint(path)
        plans.append(make_plan(checkpoint, read_geometry(checkpoint), strategy="aimer", keep=0.5))
    assert plans[0].layers == plans[1].layers


def test_the_router_s_norms(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of both sets where there are two, from routers that are stored transposed."""
    folder = tiny_type("ernie4_5_vl_moe", tmp_path_factory)
    checkpoint = open_checkpoint(folder)
    geometry = read_geometry(checkpoint)
    tensors = read_tensors(folder)
    for block in geometry.trunk:
        for key, router in zip(block.keys, ("gate.weight", "gate.weight_1"), strict=True):
            found = WeightStats(checkpoint, geometry, key, lambda nbytes: None).router_norm
            np.testing.assert_allclose(found, tensors[f"{block.prefix}.{router}"].double().norm(dim=0), rtol=1e-9)
