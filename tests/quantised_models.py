"""Tiny checkpoints in every quantised format, and beside each the twin with its values written out in float32.

The formats are packed here from random codes and scales, value by value as published layouts say; a twin's values are
computed from the codes before they are packed. Nothing of the package or of a quantisation library is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import Tensors, read_tensors, write_shards, write_tiny

Array = np.ndarray[Any, Any]
Random = np.random.Generator
Packed = tuple[Tensors, Array]
"""Tensors by what they are called in place of `.weight`, and the plain float32 values."""
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
BLOCK = 16
"""Width and height of FP8 blocks, and the group size of integers and NVFP4."""


def _fp8(shape: tuple[int, ...], random: Random) -> torch.Tensor:
    return torch.from_numpy(random.normal(size=shape).astype(np.float32)).to(torch.float8_e4m3fn)


def _scales(shape: tuple[int, ...], dtype: torch.dtype, random: Random, size: float = 0.15) -> torch.Tensor:
    values = size * random.uniform(0.5, 2, shape).astype(np.float32)
    return torch.from_numpy(np.asarray(values)).to(dtype)


def _over(scale: torch.Tensor, shape: tuple[int, ...], size: int) -> Array:
    """One entry per block to one per element, in the last two dimensions."""
    grid = scale.float().numpy().repeat(size, -2).repeat(size, -1)
    return np.asarray(grid[..., : shape[-2], : shape[-1]])


def fp8_block(dtype: torch.dtype) -> Callable[..., Packed]:
    def pack(shape: tuple[int, ...], random: Random) -> Packed:
        weight = _fp8(shape, random)
        grid = (*shape[:-2], *(-(-n // BLOCK) for n in shape[-2:]))
        scale = _scales(grid, dtype, random)
        return {"": weight, "_scale_inv": scale}, weight.float().numpy() * _over(scale, shape, BLOCK)

    return pack


def fp8_channel(shape: tuple[int, int], random: Random) -> Packed:
    weight, scale = _fp8(shape, random), _scales((shape[0], 1), torch.bfloat16, random)
    return {"": weight, "_scale": scale}, weight.float().numpy() * scale.float().numpy()


def fp8_tensor(shape: tuple[int, int], random: Random) -> Packed:
    weight, scale = _fp8(shape, random), _scales((), torch.float32, random)
    tensors = {"": weight, "_scale": scale, ".input_scale": torch.tensor(0.5)}
    return tensors, weight.float().numpy() * scale.numpy()


def mxfp8(shape: tuple[int, int], random: Random) -> Packed:
    weight = _fp8(shape, random)
    scale = random.integers(123, 126, (shape[0], shape[1] // 32))
    values = weight.float().numpy() * np.exp2(scale - 127.0).astype(np.float32).repeat(32, 1)
    return {"": weight, "_scale": torch.from_numpy(scale.astype(np.uint8))}, values


def int8(shape: tuple[int, int], random: Random) -> Packed:
    codes, scale = random.integers(-128, 128, shape), _scales((shape[0], 1), torch.float32, random, 0.002)
    return {"": torch.from_numpy(codes.astype(np.int8)), "_scale": scale}, codes.astype(np.float32) * scale.numpy()


def words(codes: Array, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Unsigned codes (…, n) to 32-bit words along the last axis; `order` names the code in each place of a word."""
    count = 32 // bits
    padded = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // count) * count), np.uint32)
    padded[..., : codes.shape[-1]] = codes
    places = padded.reshape(*padded.shape[:-1], -1, count)
    found = np.zeros(places.shape[:-1], np.uint32)
    for place, code in enumerate(order or range(count)):
        found |= places[..., code] << np.uint32(bits * place)
    return torch.from_numpy(found.view(np.int32))


def int4(*, asymmetric: bool = False, act_order: bool = False, bits: int = 4) -> Callable[..., Packed]:
    """compressed-tensors, pack-quantized: groups along the inputs, or one per row for 8 bits."""

    def pack(shape: tuple[int, int], random: Random) -> Packed:
        rows, columns = shape
        groups = columns // BLOCK if bits == 4 else 1
        half = 1 << bits - 1
        codes, zero = random.integers(-half, half, shape), random.integers(-half, half, (rows, groups))
        scale = _scales((rows, groups), torch.bfloat16, random, 0.16 / half)
        group = np.arange(columns) // -(-columns // groups)
        tensors = {
            "_packed": words(codes + half, bits), "_scale": scale, "_shape": torch.tensor(shape, dtype=torch.int64)
        }  # fmt: skip
        if act_order:
            random.shuffle(group)
            tensors["_g_idx"] = torch.from_numpy(group.astype(np.int32))
        if asymmetric:
            tensors["_zero_point"] = words((zero + half).T, bits).T.contiguous()
        else:
            zero[:] = 0
        return tensors, (codes - zero[:, group]).astype(np.float32) * scale.float().numpy()[:, group]

    return pack


def _nibbles(codes: Array) -> torch.Tensor:
    return torch.from_numpy((codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8))


def nvfp4(shape: tuple[int, int], random: Random) -> Packed:
    """As compressed-tensors stores it: scales are divided by the global scale."""
    codes = random.integers(0, 16, shape)
    scale, whole = _fp8((shape[0], shape[1] // 16), random).float().abs().to(torch.float8_e4m3fn), np.float32(11.7)
    tensors = {
        "_packed": _nibbles(codes), "_scale": scale, "_global_scale": torch.tensor([whole]),
        ".input_global_scale": torch.tensor([3.0]),
    }  # fmt: skip
    return tensors, FP4[codes] * (scale.float().numpy() / whole).repeat(16, 1)


def nvfp4_modelopt(shape: tuple[int, int], random: Random) -> Packed:
    """As modelopt stores it: scales are multiplied by a second one."""
    codes = random.integers(0, 16, shape)
    scale, second = _fp8((shape[0], shape[1] // 16), random).float().abs().to(torch.float8_e4m3fn), np.float32(0.09)
    tensors = {
        "": _nibbles(codes), "_scale": scale, "_scale_2": torch.tensor(second), ".input_scale": torch.tensor(3.0)
    }  # fmt: skip
    return tensors, FP4[codes] * (scale.float().numpy() * second).repeat(16, 1)


def _powers(shape: tuple[int, ...], random: Random) -> tuple[torch.Tensor, Array]:
    codes = random.integers(121, 125, shape)
    return torch.from_numpy(codes.astype(np.uint8)), np.exp2(codes - 127.0).astype(np.float32)


def mxfp4(shape: tuple[int, int], random: Random) -> Packed:
    """As compressed-tensors stores it."""
    codes, (scale, powers) = random.integers(0, 16, shape), _powers((shape[0], shape[1] // 32), random)
    return {"_packed": _nibbles(codes), "_scale": scale}, FP4[codes] * powers.repeat(32, 1)


def fp4_deepseek(shape: tuple[int, int], random: Random) -> Packed:
    """As DeepSeek-V4 stores experts: signed bytes, scales in the exponent-only dtype."""
    codes, (scale, powers) = random.integers(0, 16, shape), _powers((shape[0], shape[1] // 32), random)
    tensors = {"": _nibbles(codes).view(torch.int8), ".scale": scale.view(torch.float8_e8m0fnu)}
    return tensors, FP4[codes] * powers.repeat(32, 1)


def mxfp4_fused(shape: tuple[int, int, int], random: Random) -> Packed:
    """As gpt-oss stores experts: (E, O, I/32, 16); the unquantised model holds (E, I, O)."""
    experts, inputs, outputs = shape
    codes = random.integers(0, 16, (experts, outputs, inputs // 32, 32))
    scale, powers = _powers(codes.shape[:-1], random)
    values = (FP4[codes] * powers[..., None]).reshape(experts, outputs, inputs)
    return {"_blocks": _nibbles(codes), "_scales": scale}, np.ascontiguousarray(values.transpose(0, 2, 1))


def gptq(*, act_order: bool, lacking: int = 1, bits: int = 4) -> Callable[..., Packed]:
    """(I, O) words along the inputs; in the first version a word of zero points lacks one in every field."""

    def pack(shape: tuple[int, int], random: Random) -> Packed:
        outputs, inputs = shape
        groups = inputs // BLOCK
        codes = random.integers(0, 1 << bits, (inputs, outputs))
        zero = random.integers(0, 1 << bits, (groups, outputs))
        stored = words(zero, bits).numpy().view(np.uint32) - np.uint32(lacking * (2**32 // ((1 << bits) - 1)))
        scale = _scales((groups, outputs), torch.float16, random, 0.32 / (1 << bits))
        group = np.arange(inputs) // BLOCK
        if act_order:
            random.shuffle(group)
        values = (codes - zero[group]).astype(np.float32) * scale.float().numpy()[group]
        qweight, qzeros = words(codes.T, bits).T.contiguous(), torch.from_numpy(stored.view(np.int32))
        g_idx = torch.from_numpy(group.astype(np.int32))
        tensors = {".qweight": qweight, ".qzeros": qzeros, ".scales": scale, ".g_idx": g_idx}
        return tensors, np.ascontiguousarray(values.T)

    return pack


def awq(shape: tuple[int, int], random: Random) -> Packed:
    """(I, O) words along the outputs, in its own order."""
    outputs, inputs = shape
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes, zero = random.integers(0, 16, (inputs, outputs)), random.integers(0, 16, (inputs // BLOCK, outputs))
    scale = _scales((inputs // BLOCK, outputs), torch.float16, random, 0.02)
    values = (codes - zero.repeat(BLOCK, 0)).astype(np.float32) * scale.float().numpy().repeat(BLOCK, 0)
    tensors = {".qweight": words(codes, 4, order), ".qzeros": words(zero, 4, order), ".scales": scale}
    return tensors, np.ascontiguousarray(values.T)


@dataclass(frozen=True)
class Format:
    """One quantised format on one tiny model."""

    pack: Callable[..., Packed]
    config: dict[str, Any]
    """`quantization_config`."""
    model: str = "qwen3_moe"
    overrides: dict[str, Any] = field(default_factory=lambda: {"moe_intermediate_size": 64})
    fused: bool = False
    """Stacked experts are quantised, and nothing else."""


def _compressed(kind: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group"} | weights}
    return {
        "quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }  # fmt: skip


_BLOCKS = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
}  # fmt: skip
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": BLOCK, "desc_act": False, "sym": False}
_MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.0.mlp.gate*"]}
FORMATS: dict[str, Format] = {
    "FP8 blocks": Format(fp8_block(torch.float32), _BLOCKS, overrides={}),  # width 24: blocks are cut off at the edge
    "FP8 blocks, BF16 scales": Format(fp8_block(torch.bfloat16), _BLOCKS),
    "FP8 blocks, MTP and groups": Format(fp8_block(torch.float32), _BLOCKS, "deepseek_v3", {"qk_nope_head_dim": 24}),
    "FP8 blocks, stacked": Format(fp8_block(torch.float32), _BLOCKS, "qwen3_vl_moe", {}, fused=True),
    "FP8 channels": Format(fp8_channel, _compressed("float-quantized", num_bits=8, type="float", strategy="channel")),
    "FP8 tensors": Format(fp8_tensor, _compressed("float-quantized", num_bits=8, type="float", strategy="tensor")),
    "MXFP8": Format(mxfp8, {"quant_method": "modelopt", "quant_algo": "MXFP8"}),
    "INT8": Format(int8, _compressed("int-quantized", num_bits=8, strategy="channel")),
    "INT8 packed": Format(int4(bits=8), _compressed("pack-quantized", num_bits=8, strategy="channel")),
    "INT4": Format(int4(), _compressed("pack-quantized", group_size=BLOCK)),
    "INT4 asymmetric": Format(int4(asymmetric=True), _compressed("pack-quantized", symmetric=False)),
    "INT4 by activation": Format(int4(asymmetric=True, act_order=True), _compressed("pack-quantized", actorder=True)),
    "NVFP4": Format(nvfp4, _compressed("nvfp4-pack-quantized", type="float", strategy="tensor_group")),
    "NVFP4 of modelopt": Format(nvfp4_modelopt, _MODELOPT),
    "MXFP4": Format(mxfp4, _compressed("mxfp4-pack-quantized", type="float", group_size=32)),
    "FP4 of DeepSeek": Format(fp4_deepseek, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "MXFP4, stacked": Format(mxfp4_fused, {"quant_method": "mxfp4"}, "gpt_oss", {"intermediate_size": 64}, fused=True),
    "GPTQ": Format(gptq(act_order=False), _GPTQ | {"dynamic": {"-:.*mlp\\.gate.*": {}}}),
    "GPTQ by activation": Format(gptq(act_order=True), _GPTQ | {"desc_act": True}),
    "GPTQ, second version": Format(gptq(act_order=False, lacking=0), _GPTQ | {"checkpoint_format": "gptq_v2"}),
    "GPTQ, 8 bits": Format(gptq(act_order=False, bits=8), _GPTQ | {"bits": 8}),
    "AWQ": Format(awq, {"quant_method": "awq", "bits": 4, "group_size": BLOCK, "version": "gemm"}),
}  # fmt: skip
EIGHT_BITS = tuple(name for name in FORMATS if "FP8" in name or name == "INT8")
"""Those whose codes have room for other values."""
every_format = pytest.mark.parametrize("name", FORMATS)


def quantised_pair(name: str, factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a quantised checkpoint and of its plain twin; made once per test run. Read only."""
    folder = factory.getbasetemp() / "quantised-models" / name
    if not folder.exists():
        _write_pair(folder, FORMATS[name])
    return folder / "quantised", folder / "twin"


def _write_pair(folder: Path, form: Format) -> None:
    random = np.random.default_rng(7)
    for kind in ("quantised", "twin"):
        write_tiny(folder / kind, form.model, **form.overrides)
    path = folder / "quantised/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": form.config}))
    quantised: Tensors = {}
    plain: Tensors = {}
    for name, tensor in read_tensors(folder / "twin").items():
        if not _is_quantised(name, form):
            quantised[name] = plain[name] = tensor
            continue
        packed, values = form.pack(tuple(tensor.shape), random)
        assert values.shape == tuple(tensor.shape) and values.dtype == np.float32
        plain[name] = torch.from_numpy(values)
        for end, part in packed.items():
            quantised[(name.removesuffix(".weight") if end.startswith(".") else name) + end] = part
    assert len(quantised) > len(plain)
    write_shards(folder / "quantised", quantised, 20_000)
    write_shards(folder / "twin", plain, 100_000)


def _is_quantised(name: str, form: Format) -> bool:
    if form.fused:
        return re.search(r"\.experts\.\w+_proj$", name) is not None
    return re.search(r"layers\..*_proj(_with_mqa)?\.weight$", name) is not None and "eh_proj" not in name
