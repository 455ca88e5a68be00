"""The parts of a quantised tensor in, its plain values out: float32, on the parts' device. The formulas alone.

Every format is exact in float32 but for one rounding per product, as in the libraries that wrote the checkpoints.
Shapes: O output and I input features, G groups along I, R × C any matrix and r × c the grid of its scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from expertcut.errors import CheckpointError

Parts = Mapping[str, torch.Tensor]
"""Tensors as stored, by the short names that the formulas below use."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 4-bit floats, by code."""
E8M0 = (*(2.0 ** (code - 127) for code in range(255)), float("nan"))
"""Values of scales that are exponents, by code."""
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word, from the lowest, holds column j of eight."""


@dataclass(frozen=True)
class Settings:
    """What the tensors do not tell: from the quantization config."""

    blocks: tuple[tuple[int, ...], ...] = ()
    """Block sizes (rows, columns) that may be in use."""
    zero_offset: int = 1
    """What GPTQ's stored zero points lack; 0 from its second format on."""


def fp4(packed: torch.Tensor) -> torch.Tensor:
    """Unpack 4-bit floats, (…, n) bytes to (…, 2n) float32; the low half of a byte comes first."""
    table = _table(E2M1, packed.device)
    codes = packed.contiguous().view(torch.uint8)
    return torch.stack((table[(codes & 15).int()], table[(codes >> 4).int()]), dim=-1).flatten(-2)


def exponents(codes: torch.Tensor) -> torch.Tensor:
    """Decode scales that are powers of two, 2^(code − 127), to float32; code 255 is not a number."""
    return _table(E8M0, codes.device)[codes.view(torch.uint8).int()]


def integers(words: torch.Tensor, bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """Unpack unsigned integers, (…, n) int32 words to (…, n · 32/bits) int32, lowest bits first or in `order`."""
    places = torch.tensor(order or range(32 // bits), device=words.device, dtype=torch.int32) * bits
    return (words[..., None] >> places & (1 << bits) - 1).flatten(-2)


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Return scales as float32; bytes hold exponents."""
    return exponents(scale) if scale.dtype in (torch.uint8, torch.float8_e8m0fnu) else scale.float()


def spread(grid: torch.Tensor, shape: Sequence[int], blocks: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return a (…, r, c) grid as something that multiplies a tensor of `shape` (…, R, C), one entry per block.

    Raises:
        CheckpointError: no block size explains the grid.
    """
    if grid.numel() == 1:
        return grid.reshape(())
    if grid.dim() < len(shape):
        return grid.reshape(*grid.shape, *[1] * (len(shape) - grid.dim()))  # per channel, or per expert
    for axis in (-2, -1):
        length, count = shape[axis], grid.shape[axis]
        if count not in (1, length):
            sizes = [b[axis] for b in blocks if len(b) == 2 and -(-length // b[axis]) == count]
            if not sizes and length % count:
                raise CheckpointError(f"scales {list(grid.shape)} do not fit weights {list(shape)}")
            grid = grid.repeat_interleave((sizes or [length // count])[0], axis).narrow(axis, 0, length)
    return grid


def scaled(parts: Parts, settings: Settings) -> torch.Tensor:
    """8-bit floats or integers, or packed 4-bit floats, times scales per tensor, channel, group or block.

    Parts: weight; scale; optional: scale_2 (a factor), divisor, zero.
    """
    weight, scale = parts["weight"], scale_values(parts["scale"])
    values = fp4(weight) if _holds_fp4(weight, parts) else weight.float()
    if "scale_2" in parts:
        scale = scale * spread(parts["scale_2"].float(), scale.shape, ())
    if "divisor" in parts:
        scale = scale / spread(parts["divisor"].float(), scale.shape, ())
    if "zero" in parts:
        values = values - spread(parts["zero"].float(), values.shape, settings.blocks)
    return values.mul_(spread(scale, values.shape, settings.blocks))


def packed_integers(parts: Parts, settings: Settings) -> torch.Tensor:
    """compressed-tensors' packed integers.

    Parts: weight (O, words); scale (O, G); shape (2,), on the CPU; optional: zero (words, G); group (I,), that of each
    column.
    """
    rows, columns = (int(n) for n in parts["shape"])
    bits = packed_bits(parts["weight"].shape[-1], columns)
    middle = 1 << bits - 1
    values = (integers(parts["weight"], bits)[:, :columns] - middle).float()
    scale = parts["scale"].float().reshape(rows, -1)
    zero = parts.get("zero")
    if zero is not None and zero.dtype == torch.int32:
        zero = integers(zero.T, bits).T[:rows] - middle
    in_order = torch.arange(columns, device=scale.device) // -(-columns // scale.shape[1])
    stored = parts.get("group", in_order)
    group = torch.where(stored < 0, in_order, stored)  # all −1: never filled in
    if zero is not None:
        values -= zero.float().reshape(rows, -1)[:, group]
    return values.mul_(scale[:, group])


def packed_bits(words: int, columns: int) -> int:
    """Return how many bits an integer has if `columns` of them fill `words` 32-bit words.

    Raises:
        CheckpointError: none of 2, 4 and 8.
    """
    for bits in (2, 4, 8):
        if -(-columns * bits // 32) == words:
            return bits
    raise CheckpointError(f"{columns} integers in {words} words of 32 bits: expected 2, 4 or 8 bits each")


def gptq(parts: Parts, settings: Settings) -> torch.Tensor:
    """GPTQ: parts weight (I·bits/32, O), zero (G, O·bits/32), scale (G, O), optional group (I,); out (O, I)."""
    scale = parts["scale"].float()
    bits = packed_bits(parts["zero"].shape[1], scale.shape[1])
    values = integers(parts["weight"].T, bits)
    ones = 0xFFFFFFFF // ((1 << bits) - 1)  # in every field; fields that overflow borrowed from the next when stored
    zero = integers(parts["zero"] + settings.zero_offset * ones, bits)[:, : scale.shape[1]]
    group = parts.get("group")
    if group is None:
        group = torch.arange(values.shape[1], device=scale.device) // -(-values.shape[1] // len(scale))
    return (values - zero[group.long()].T).float().mul_(scale[group.long()].T)


def awq(parts: Parts, settings: Settings) -> torch.Tensor:
    """AWQ: parts weight (I, O/8), zero (G, O/8), scale (G, O); out (O, I)."""
    values, zero = (integers(parts[name], 4, AWQ_ORDER) for name in ("weight", "zero"))
    size = -(-len(values) // len(zero))
    zero, scale = (t.repeat_interleave(size, 0)[: len(values)] for t in (zero, parts["scale"].float()))
    return (values - zero).float().mul_(scale).T


def mxfp4_blocks(parts: Parts, settings: Settings) -> torch.Tensor:
    """gpt-oss: parts weight (E, O, G, 16) bytes, scale (E, O, G) exponents; out (E, I, O) as the experts compute."""
    values = fp4(parts["weight"]).mul_(exponents(parts["scale"])[..., None])
    return values.flatten(-2).transpose(-1, -2)


@cache
def _table(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _holds_fp4(weight: torch.Tensor, parts: Parts) -> bool:
    """True for bytes; signed ones hold 4-bit floats if their scales are exponents."""
    exponent = parts["scale"].dtype in (torch.uint8, torch.float8_e8m0fnu)
    return weight.dtype == torch.uint8 or (weight.dtype == torch.int8 and exponent)
