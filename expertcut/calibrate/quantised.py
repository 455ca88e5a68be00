"""A quantised checkpoint read as if it were plain: names and values of the unquantised model, dequantised on demand.

Tensors that belong together are found by their names and dtypes, not by what the quantization config says of modules;
the config gives block sizes and versions. Stored bytes go to the device first and are dequantised there, of stacked
experts a few at a time, so that memory beyond the result is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch

from expertcut.calibrate import dequantise as dq
from expertcut.calibrate.reader import TensorReader
from expertcut.checkpoint.quantised import block_sizes, quantization_config
from expertcut.checkpoint.types import Checkpoint, TensorInfo
from expertcut.errors import CheckpointError

METHODS = (
    "fp8", "fbgemm_fp8", "compressed-tensors", "gptq", "awq", "mxfp4", "modelopt", "modelopt_fp4", "auto-round",
)  # fmt: skip
"""Values of `quant_method` whose tensors are understood."""
VERSIONS = (None, "gemm", "GEMM", "gptq", "gptq_v2")
"""Values of GPTQ's `checkpoint_format` and AWQ's `version` whose packing is understood."""
CHUNK = 256 * 2**20
"""Bytes of float32 values, beside the result, while stacked experts are dequantised; at least one expert."""
RECODED = ("F8_E4M3", "F8_E5M2", "I8")
"""Dtypes of weights that, with scales alone, can be given other values: 4 bits are too coarse for it."""
_FLOATS = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")
_CODES = (*_FLOATS, "U8", "I8")


@dataclass(frozen=True)
class _Format:
    """How the tensors of one quantised tensor are named."""

    dtypes: tuple[str, ...]
    """In which the weight is stored."""
    end: str
    """What the stored weight's name ends with."""
    plain: str
    """What stands there in the unquantised model."""
    needed: Mapping[str, tuple[str, ...]]
    """Part → endings that it may have; one must be there."""
    optional: Mapping[str, tuple[str, ...]]
    values: Callable[[dq.Parts, dq.Settings], torch.Tensor]


_FORMATS = (
    _Format(("U8",), "_blocks", "", {"scale": ("_scales",)}, {}, dq.mxfp4_blocks),
    _Format(
        ("I32",), ".weight_packed", ".weight", {"scale": (".weight_scale",), "shape": (".weight_shape",)},
        {"zero": (".weight_zero_point",), "group": (".weight_g_idx",)}, dq.packed_integers,
    ),
    _Format(
        ("U8", "F4"), ".weight_packed", ".weight", {"scale": (".weight_scale",)},
        {"divisor": (".weight_global_scale",)}, dq.scaled,
    ),
    _Format(
        ("I32",), ".qweight", ".weight", {"scale": (".scales",), "zero": (".qzeros",)}, {"group": (".g_idx",)}, dq.gptq,
    ),
    _Format(
        _CODES, "", "", {"scale": ("_scale_inv", "_scale")}, {"scale_2": ("_scale_2",), "zero": ("_zero_point",)},
        dq.scaled,
    ),
    _Format(_CODES, ".weight", ".weight", {"scale": (".scale",)}, {}, dq.scaled),
)  # fmt: skip


@dataclass(frozen=True)
class Quantised:
    """One tensor of the unquantised model, and what it is made of."""

    parts: Mapping[str, str]
    """Part → name of the stored tensor."""
    shape: tuple[int, ...] | None
    """None: stored as the part `shape`."""
    values: Callable[[dq.Parts, dq.Settings], torch.Tensor]


@dataclass(frozen=True)
class Coded:
    """A quantised tensor in memory. Other values are for `recodable` ones only."""

    parts: dq.Parts
    formula: Callable[[dq.Parts], torch.Tensor]

    @property
    def codes(self) -> torch.Tensor:
        """The stored weight."""
        return self.parts["weight"]

    @property
    def values(self) -> torch.Tensor:
        """What it stands for, float32."""
        return self.formula(self.parts)

    def nearest(self, values: torch.Tensor) -> Coded:
        """Return it with the codes nearest to other values under the scales that it has; beyond them, the outermost."""
        codes = self.codes
        steps = self.formula({**self.parts, "weight": torch.ones_like(codes, dtype=torch.float32).to(codes.dtype)})
        whole = torch.where(steps == 0, 0.0, values / steps)
        if codes.dtype == torch.int8:
            new = whole.round().clamp(-128, 127)
        else:
            most = torch.finfo(codes.dtype).max
            new = whole.clamp(-most, most)
        return Coded({**self.parts, "weight": new.to(codes.dtype)}, self.formula)


def open_reader(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> TensorReader:
    """Return what reads the checkpoint's tensors as plain ones: in `dtype` on `device` where they are quantised.

    Raises:
        CheckpointError: the checkpoint is quantised in a way that is not understood.
    """
    config = quantization_config(checkpoint.config)
    method, version = config.get("quant_method"), config.get("checkpoint_format", config.get("version"))
    if config and (method not in METHODS or (method in ("gptq", "awq") and version not in VERSIONS)):
        what = f"{method} ({version})" if method in METHODS else f"{method!r}"
        first = next((f", such as {t.name}" for t in checkpoint.tensors.values() if t.dtype in (*_CODES, "I32")), "")
        raise CheckpointError(
            f"{checkpoint.name}: quantised by {what}{first}, which cannot be run; known: {', '.join(METHODS)}",
            "profile the unquantised sibling; its plan applies to this checkpoint too",
        )
    groups = dict(find_quantised(checkpoint))
    coded = any(info.dtype in _FLOATS for info in checkpoint.tensors.values())
    if not config and not groups and not coded:
        return TensorReader(checkpoint)
    return DequantisingReader(checkpoint, groups, _settings(config), dtype, device)


class DequantisingReader(TensorReader):
    """Access to a quantised checkpoint by the names of the unquantised model."""

    def __init__(
        self, checkpoint: Checkpoint, groups: Mapping[str, Quantised], settings: dq.Settings, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__(checkpoint)
        self._groups, self._settings, self._dtype, self._device = groups, settings, dtype, device

    @property
    def names(self) -> Iterable[str]:
        """Names of the unquantised model, and of stored tensors that are no part of a quantised one."""
        parts = {name for group in self._groups.values() for name in group.parts.values()}
        return [*self._groups, *(name for name in self.checkpoint.tensors if name not in parts)]

    def stored(self, name: str) -> Iterable[str]:
        """Names of the stored tensors that a plain one is made of."""
        return self._groups[name].parts.values() if name in self._groups else [name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the plain tensor."""
        if name not in self._groups:
            return super().shape(name)
        group = self._groups[name]
        return tuple(super().view(group.parts["shape"]).tolist()) if group.shape is None else group.shape

    def view(self, name: str) -> torch.Tensor:
        """Return a plain tensor: a quantised one in the reader's dtype on its device, any other as stored.

        Raises:
            CheckpointError: 8-bit floats without scales, or scales that do not fit.
        """
        if name in self._groups:
            return self._values(name, self._placed(self._stored(name))).to(self._dtype)
        info = self.checkpoint.tensors[name]
        if info.dtype in _FLOATS:
            raise CheckpointError(f"{info.shard}: {name}: found {info.dtype} values, but no scales for them")
        return super().view(name)

    def copy(self, name: str, out: torch.Tensor) -> None:
        """Write a plain tensor to `out`; stacked experts a few at a time.

        Raises:
            CheckpointError: see `view`.
        """
        shape = self.shape(name)
        if name not in self._groups or len(shape) < 3:
            out.copy_(self.view(name))
            return
        step = max(1, CHUNK // (4 * prod(shape[1:])))
        stored = self._stored(name)
        for first in range(0, shape[0], step):
            rows = slice(first, first + step)
            out[rows].copy_(self._values(name, self._placed(stored, rows)))

    def coded(self, name: str, at: int | None = None) -> Coded:
        """Return a quantised tensor as stored, on the device; of a stack, `at` takes one matrix, with its axis."""
        rows = None if at is None else slice(at, at + 1)
        return Coded(self._placed(self._stored(name), rows), partial(self._values, name))

    def _stored(self, name: str) -> dict[str, torch.Tensor]:
        return {part: super(DequantisingReader, self).view(n) for part, n in self._groups[name].parts.items()}

    def _placed(self, stored: dq.Parts, rows: slice | None = None) -> dict[str, torch.Tensor]:
        """Parts on the device; of a stack, some rows of those that are stacked."""
        count = len(stored["weight"])
        some = stored if rows is None else {
            part: t[rows] if t.dim() and len(t) == count else t for part, t in stored.items()
        }  # fmt: skip
        return {part: t if part == "shape" else t.to(self._device) for part, t in some.items()}

    def _values(self, name: str, parts: dq.Parts) -> torch.Tensor:
        try:
            return self._groups[name].values(parts, self._settings)
        except CheckpointError as error:
            method = quantization_config(self.checkpoint.config).get("quant_method", "an unnamed method")
            raise CheckpointError(
                f"{self.checkpoint.name}: {name}, quantised by {method}: {error.message}",
                "profile the unquantised sibling; its plan applies to this checkpoint too",
            ) from None


def recodable(checkpoint: Checkpoint) -> set[str]:
    """Return the names of tensors in 8 bits that have scales and nothing else, so that values round to their codes."""
    groups, tensors = dict(find_quantised(checkpoint)), checkpoint.tensors
    return {
        name for name, group in groups.items()
        if name == (weight := group.parts["weight"]) and group.values is dq.scaled and "zero" not in group.parts
        and tensors[weight].dtype in RECODED and group.shape == tensors[weight].shape
    }  # fmt: skip


def find_quantised(checkpoint: Checkpoint) -> Iterator[tuple[str, Quantised]]:
    """Yield (plain name, what it is made of) of every quantised tensor."""
    tensors = checkpoint.tensors
    for name, info in tensors.items():
        for form in _FORMATS:
            if info.dtype not in form.dtypes or not name.endswith(form.end):
                continue
            stem = name.removesuffix(form.end)
            parts = {"weight": name}
            for part, ends in (*form.needed.items(), *form.optional.items()):
                found = [stem + end for end in ends if stem + end in tensors]
                parts |= {part: found[0]} if found else {}
            if form.needed.keys() <= parts.keys():
                infos = {part: tensors[n] for part, n in parts.items()}
                values = _values(form, infos)
                yield stem + form.plain, Quantised(parts, _shape(values, infos), values)
                break


def _values(form: _Format, infos: Mapping[str, TensorInfo]) -> Callable[[dq.Parts, dq.Settings], torch.Tensor]:
    """The format's formula; AWQ names its tensors as GPTQ does, but packs along the outputs."""
    weight, scale = infos["weight"], infos["scale"]
    if form.values is not dq.gptq or weight.shape[1] == scale.shape[1]:
        return form.values
    if weight.shape[1] * 8 == scale.shape[1]:
        return dq.awq
    raise CheckpointError(
        f"{weight.shard}: {weight.name}: shape {list(weight.shape)} with scales {list(scale.shape)} is neither GPTQ's "
        "layout nor AWQ's of 4 bits"
    )


def _shape(values: Callable[..., torch.Tensor], infos: Mapping[str, TensorInfo]) -> tuple[int, ...] | None:
    weight, scale = infos["weight"], infos["scale"]
    if values is dq.packed_integers:
        return None
    if values is dq.mxfp4_blocks:
        return weight.shape[0], 2 * prod(weight.shape[2:]), weight.shape[1]
    if values is dq.awq:
        return scale.shape[1], weight.shape[0]
    if values is dq.gptq:
        return scale.shape[1], weight.shape[0] * scale.shape[1] // infos["zero"].shape[1]
    halves = weight.dtype == "U8" or (weight.dtype == "I8" and scale.dtype in ("U8", "F8_E8M0"))
    return (*weight.shape[:-1], 2 * weight.shape[-1]) if halves else weight.shape


def _settings(config: Mapping[str, Any]) -> dq.Settings:
    return dq.Settings(block_sizes(config), 0 if config.get("checkpoint_format") == "gptq_v2" else 1)
