"""Checkpoints whose layers differ, in transformers: as any other there, never taken for one whose layers are alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from differing import differing
from reference import logits
from tiny_models import tokens
from transformers import AutoConfig

from expertcut.runtimes.transformers import from_pretrained

IDS = torch.stack([torch.from_numpy(sequence.ids) for sequence in tokens((30, 30), seed=11).sequences])


@pytest.fixture(scope="module")
def out(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model, cut."""
    return differing(demo_model, tmp_path_factory.mktemp("differing") / "out")


def read(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def test_loading_it_whole_says_so(out: Path) -> None:
    loaded: Any = from_pretrained(out, output_loading_info=True)
    assert not any(loaded[1].values()) and loaded[0].dtype == torch.bfloat16


def test_arguments_are_those_of_the_automatic_classes(out: Path) -> None:
    assert from_pretrained(out, dtype="auto").dtype == from_pretrained(out).dtype == torch.bfloat16
    found = from_pretrained(out, dtype="float32", attn_implementation="eager", use_cache=False)
    assert found.dtype == torch.float32
    assert (found.config._attn_implementation, found.config.use_cache) == ("eager", False)
    with pytest.raises(TypeError, match="tempo"):
        from_pretrained(out, tempo=3)


def test_a_repository_in_the_hubs_cache(out: Path, tmp_path: Path) -> None:
    here = tmp_path / "models--someone--uneven"
    (here / "refs").mkdir(parents=True)
    (here / "refs" / "main").write_text("0" * 40)
    (here / "snapshots").mkdir()
    (here / "snapshots" / ("0" * 40)).symlink_to(out)
    found = from_pretrained("someone/uneven", cache_dir=tmp_path, dtype=torch.float32)
    assert torch.equal(logits(found, IDS), logits(from_pretrained(out, dtype=torch.float32), IDS))


def test_what_it_saves_is_of_the_same_kind(out: Path, tmp_path: Path) -> None:
    model = from_pretrained(out, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    assert read(tmp_path / "saved")["expertcut"] == read(out)["expertcut"]
    assert torch.equal(logits(from_pretrained(tmp_path / "saved"), IDS), logits(model, IDS))
    with pytest.raises(ValueError, match="expertcut_qwen3_moe"):
        AutoConfig.from_pretrained(tmp_path / "saved")


def test_layers_that_are_alike_are_no_obstacle(demo_model: Path, tmp_path: Path) -> None:
    from_pretrained(demo_model).save_pretrained(tmp_path / "saved")
    assert read(tmp_path / "saved")["model_type"] == "qwen3_moe"
