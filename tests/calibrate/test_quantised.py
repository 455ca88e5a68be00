"""Quantised checkpoints run as their plain twins: the same values, bit for bit, and so the same sums."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from quantised_models import EIGHT_BITS, FORMATS, every_format, quantised_pair
from reference import load, logits, profile
from tiny_models import counted_reads, read_tensors, tokens, write_shards, write_tiny

from expertcut.calibrate import quantised
from expertcut.calibrate.executor import LayerStream
from expertcut.calibrate.quantised import DequantisingReader, open_reader, recodable
from expertcut.calibrate.reader import TensorReader
from expertcut.checkpoint import open_checkpoint
from expertcut.errors import CheckpointError
from expertcut.model import read_geometry

CPU = torch.device("cpu")


def reader(folder: Path, dtype: torch.dtype = torch.float32) -> TensorReader:
    return open_reader(open_checkpoint(folder), dtype, CPU)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_the_twin_s(name: str, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, twin = quantised_pair(name, tmp_path_factory)
    expected = read_tensors(twin)
    found = reader(folder, dtype)
    assert isinstance(found, DequantisingReader)
    assert expected.keys() <= set(found.names)
    extra = set(found.names) - expected.keys()
    assert all(n.endswith(("input_scale", "input_global_scale")) for n in extra)
    for tensor, values in expected.items():
        assert found.shape(tensor) == tuple(values.shape)
        out = torch.empty(values.shape, dtype=dtype)
        found.copy(tensor, out)
        assert torch.equal(out, values.to(dtype)), tensor
        assert torch.equal(found.view(tensor).to(dtype), values.to(dtype)), tensor
    found.close()


@every_format
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_are_the_twin_s(name: str, dtype: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, twin = quantised_pair(name, tmp_path_factory)
    data = tokens((20, 20, 13))
    found = profile(folder, data, tmp_path / "found", dtype=dtype)
    expected = profile(twin, data, tmp_path / "expected", dtype=dtype)
    assert found.prefixes == expected.prefixes
    for prefix in expected.prefixes:
        for key, value in dataclasses.asdict(expected.layer(prefix)).items():
            np.testing.assert_array_equal(getattr(found.layer(prefix), key), value, err_msg=f"{prefix} {key}")
        assert expected.layer(prefix).norm_sum.sum() > 0
    assert found.meta.fingerprint == expected.meta.fingerprint


def test_transformers_dequantises_to_the_same_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The format whose dequantiser needs no further package: what transformers itself makes of the checkpoint."""
    folder, twin = quantised_pair("MXFP4, stacked", tmp_path_factory)
    ids = torch.from_numpy(tokens((20,)).sequences[0].ids)[None]
    found = load(folder, torch.bfloat16, quantization_config={"quant_method": "mxfp4", "dequantize": True})
    assert torch.equal(logits(found, ids), logits(load(twin, torch.bfloat16), ids))


@pytest.mark.parametrize("name", ["MXFP4, stacked", "FP8 blocks, stacked"])
def test_stacked_experts_come_a_few_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, twin = quantised_pair(name, tmp_path_factory)
    tensor, expected = next((n, t) for n, t in read_tensors(twin).items() if n.endswith("experts.down_proj"))
    found, sizes = reader(folder), list[int]()
    assert isinstance(found, DequantisingReader)
    values = DequantisingReader._values

    def noted(self: DequantisingReader, name: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        sizes.append(len(parts["weight"]))
        return values(self, name, parts)

    monkeypatch.setattr(DequantisingReader, "_values", noted)
    for chunk, expected_sizes in ((1, [1] * 8), (3 * 4 * expected[0].numel(), [3, 3, 2])):
        monkeypatch.setattr(quantised, "CHUNK", chunk)
        sizes.clear()
        out = torch.empty_like(expected)
        found.copy(tensor, out)
        assert sizes == expected_sizes
        assert torch.equal(out, expected)
    found.close()


def test_every_stored_tensor_is_read_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """All parts of all tensors of the language model, and no part twice."""
    folder, _ = quantised_pair("INT4 asymmetric", tmp_path_factory)
    reads = counted_reads(monkeypatch)
    profile(folder, tokens((10, 10)), tmp_path / "profile")
    stored = set(open_checkpoint(folder).tensors)
    assert {n for n in stored if n.startswith("model.layers.")} <= set(reads)
    assert {n for n, count in reads.items() if count > 1} <= {n for n in stored if n.endswith("weight_shape")}


def test_the_model_is_a_plain_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    """transformers puts no modules of its own quantisers in, which would want kernels and a GPU."""
    folder, _ = quantised_pair("FP8 blocks", tmp_path_factory)
    checkpoint = open_checkpoint(folder)
    layers = LayerStream(checkpoint, read_geometry(checkpoint), device=CPU, dtype=torch.bfloat16)
    layer = layers.load(0)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert type(layer.get_submodule("self_attn.q_proj")) is torch.nn.Linear
    assert "quantization_config" in checkpoint.config
    layers.close()


@pytest.mark.parametrize(
    "config, words",
    [
        ({"quant_method": "bitsandbytes"}, ["'bitsandbytes', such as lm_head.codes, ", "known: fp8"]),
        ({"quant_method": "hqq"}, ["'hqq', such as lm_head.codes, "]),
        ({"quant_method": "awq", "version": "gemv"}, ["awq (gemv)"]),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, ["gptq (marlin)"]),
    ],
)
def test_other_quantisers_are_refused_with_a_way_out(config: dict[str, str], words: list[str], tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "qwen3_moe", quantization_config=config)
    write_shards(folder, read_tensors(folder) | {"lm_head.codes": torch.zeros(4, dtype=torch.uint8)})
    with pytest.raises(CheckpointError) as caught:
        reader(folder)
    assert all(word in caught.value.message for word in words)
    assert "sibling" in str(caught.value.hint)


def test_what_does_not_fit_is_named(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, _ = quantised_pair("FP8 blocks", tmp_path_factory)
    tensors = read_tensors(folder)
    weight = "model.layers.1.mlp.experts.3.up_proj.weight"
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    write_shards(tmp_path, {n: t for n, t in tensors.items() if n != f"{weight}_scale_inv"})
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight: found F8_E4M3 values, but no scales"):
        reader(tmp_path).view(weight)
    write_shards(tmp_path, tensors | {f"{weight}_scale_inv": torch.ones(5, 2)})
    with pytest.raises(
        CheckpointError, match=r"experts\.3\.up_proj\.weight, .* fp8: scales \[5, 2\] do not fit .*\[24, 32\]"
    ):
        reader(tmp_path).view(weight)


def test_packed_words_of_another_width_are_named(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, _ = quantised_pair("AWQ", tmp_path_factory)
    tensors = read_tensors(folder)
    weight = "model.layers.1.mlp.experts.3.up_proj.qweight"
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    write_shards(tmp_path, tensors | {weight: tensors[weight].repeat(1, 2)})  # as 8 bits would be
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.qweight: shape \[32, 16\] with .*neither GPTQ"):
        reader(tmp_path)


@pytest.mark.parametrize("name, method", [("GPTQ", "gptq"), ("INT4", "compressed-tensors")])
def test_odd_numbers_of_bits_are_named(
    name: str, method: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Three bits, which may straddle words."""
    folder, _ = quantised_pair(name, tmp_path_factory)
    tensors = read_tensors(folder)
    module = "model.layers.1.mlp.experts.3.up_proj"
    words = {f"{module}.qweight": (3, 64), f"{module}.qzeros": (2, 6), f"{module}.weight_packed": (64, 3)}
    three = {n: torch.zeros(shape, dtype=torch.int32) for n, shape in words.items() if n in tensors}
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    write_shards(tmp_path, tensors | three)
    with pytest.raises(CheckpointError, match=rf"up_proj\.weight, quantised by {method}: .* 2, 4 or 8 bits") as caught:
        reader(tmp_path).view(f"{module}.weight")
    assert "sibling" in str(caught.value.hint)


@every_format
def test_everything_happens_on_the_device(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No formula mixes devices or looks at a value; torch's device without values would not bear it."""
    folder, twin = quantised_pair(name, tmp_path_factory)
    found = open_reader(open_checkpoint(folder), torch.bfloat16, torch.device("meta"))
    stored = open_checkpoint(folder).tensors
    for tensor, values in read_tensors(twin).items():
        if tensor not in stored or stored[tensor].dtype in ("F8_E4M3", "U8", "I8"):
            view = found.view(tensor)
            assert (view.device.type, view.dtype, view.shape) == ("meta", torch.bfloat16, values.shape)
    found.close()


def test_every_method_is_documented(repo: Path) -> None:
    rows = re.findall(r"^\| (`.*?) \|", (repo / "docs" / "quantised.md").read_text(), re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`([^`]+)`", row)) == sorted(
        ("quant_method", *quantised.METHODS)
    )


def test_plain_checkpoints_are_read_as_ever(tmp_path: Path) -> None:
    """Also where a quantization config names a method but nothing is quantised."""
    folder = write_tiny(tmp_path / "model", "qwen3_moe")
    assert type(reader(folder)) is TensorReader
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    found = reader(folder)
    assert set(found.names) == set(open_checkpoint(folder).tensors)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_no_code_is_nearer_than_the_one_that_is_taken(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All 256 are tried, on values that lie between those of codes, on them, and beyond the outermost."""
    checkpoint = open_checkpoint(quantised_pair(name, tmp_path_factory)[0])
    opened = open_reader(checkpoint, torch.float32, CPU)
    assert isinstance(opened, DequantisingReader)
    target = next(name for name in sorted(recodable(checkpoint)) if "experts" in name and "down_proj" in name)
    stored = opened.coded(target)
    torch.manual_seed(0)
    wanted = stored.values + torch.randn_like(stored.values) * stored.values.std()
    wanted.view(-1)[:3] = torch.tensor([1e4, -1e4, float(stored.values.flatten()[2])])
    found = stored.nearest(wanted)
    assert found.codes.dtype == stored.codes.dtype and float(found.values.flatten()[2]) == float(wanted.flatten()[2])
    every = torch.arange(256, dtype=torch.uint8).view(stored.codes.dtype)
    parts = dict(stored.parts)
    values = torch.stack([
        stored.formula({**parts, "weight": code.expand(stored.codes.shape).contiguous()}) for code in every
    ])  # fmt: skip
    away = (values - wanted).abs().nan_to_num(torch.inf)
    assert torch.allclose((found.values - wanted).abs(), away.amin(0), atol=1e-6, rtol=1e-4)


def test_formats_without_room_are_not_recodable(tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in FORMATS:
        found = recodable(open_checkpoint(quantised_pair(name, tmp_path_factory)[0]))
        assert bool(found) == (name in EIGHT_BITS), name
