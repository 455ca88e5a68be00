"""What the weights of a layer's experts say, without data: read when asked for, a few rows at a time. numpy only.

Memory is bounded by a few rows of a matrix, whatever the model's size. Legend: E experts, R rows and C columns of a
matrix, r × c the grid of its scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from expertcut.checkpoint import read_array, read_elements
from expertcut.checkpoint.quantised import block_sizes, quantization_config
from expertcut.checkpoint.types import Checkpoint, TensorInfo
from expertcut.errors import CheckpointError
from expertcut.model import Geometry
from expertcut.model.geometry import ExpertTensor, Sliced

Floats = NDArray[np.float64]
Tell = Callable[[int], None]
"""Called with the bytes of weights just read."""
Scales = Callable[[NDArray[np.intp]], NDArray[np.float32]]
"""Row numbers → what their weights are multiplied with."""

PIECE = 1 << 16
"""Weights in memory at a time, at least one row; what fits into a processor's cache is fastest."""
_PLAIN = ("BF16", "F16", "F32", "F64")
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")
"""What the name of 8-bit floats' scales ends with."""


class WeightStats:
    """Statistics of one set of experts, each read from the checkpoint when asked for."""

    def __init__(self, checkpoint: Checkpoint, geometry: Geometry, key: str, tell: Tell) -> None:
        """`key` is the plan's: the prefix of a block, or of its twin."""
        self._checkpoint, self._geometry, self._key, self._tell = checkpoint, geometry, key, tell
        self._block = geometry.keys[key]
        self._twin = self._block.twin if key != self._block.prefix else None

    @cached_property
    def router_norm(self) -> Floats:
        """Euclidean norm of each expert's router row, (E,)."""
        stored = read_array(self._checkpoint, (self._twin or self._block).router).astype(np.float64)
        router_EH = (stored.T if self._geometry.family.router_axis else stored)[: self._geometry.num_experts]
        norms: Floats = np.linalg.norm(router_EH, axis=1)
        return norms

    @property
    def weight_mean(self) -> Floats:
        """Mean magnitude over an expert's matrices, biases left out, (E,).

        Raises:
            CheckpointError: the weights are quantised otherwise than to 8-bit floats.
        """
        return self._means[0]

    @property
    def weight_rms(self) -> Floats:
        """Root mean square over an expert's matrices, (E,); raises as `weight_mean` does."""
        return self._means[1]

    @cached_property
    def _means(self) -> tuple[Floats, Floats]:
        sums_3E = np.zeros((3, self._geometry.num_experts))  # magnitudes, squares, how many
        for info, experts in self._tensors():
            scales, rows = self._scales(info), prod(info.shape[:-1]) // len(experts)
            for place, expert in enumerate(experts):
                for piece in self._pieces(info, place * rows, rows, scales):
                    sums_3E[:, expert] += np.abs(piece).sum(), np.square(piece).sum(), piece.size
                self._tell(info.nbytes // len(experts))
        magnitude_E, square_E = sums_3E[:2] / np.maximum(sums_3E[2], 1)
        return magnitude_E, np.sqrt(square_E)

    def _tensors(self) -> Iterator[tuple[TensorInfo, Sequence[int]]]:
        """The tensors that hold matrices, in checkpoint order, each with its experts, which share its rows equally."""
        experts = self._geometry.num_experts
        ours = range(experts, 2 * experts) if self._twin else range(experts)
        for name in self._block.tensors:
            role, info = self._geometry.roles[name], self._checkpoint.tensors[name]
            if name.endswith(_SCALES):
                continue
            if isinstance(role, ExpertTensor) and role.expert in ours and len(info.shape) > 1:
                yield info, (role.expert - ours.start,)
            elif isinstance(role, Sliced) and (role.unit > 1 or len(info.shape) > 2):
                yield info, range(experts)

    def _pieces(self, info: TensorInfo, first: int, rows: int, scales: Scales | None) -> Iterator[NDArray[np.float32]]:
        columns = info.shape[-1]
        step = max(1, PIECE // columns)
        for row in range(first, first + rows, step):
            stop = min(row + step, first + rows)
            piece = read_elements(self._checkpoint, info.name, row * columns, stop * columns).reshape(-1, columns)
            yield piece if scales is None else piece * scales(np.arange(row, stop))

    def _scales(self, info: TensorInfo) -> Scales | None:
        """What to multiply a tensor's rows with, by their numbers over all its matrices; None for plain weights."""
        if info.dtype in _PLAIN:
            return None
        stored, quantization = self._checkpoint.tensors, quantization_config(self._checkpoint.config)
        found = next((n for end in _SCALES if (n := info.name + end) in stored), None)
        if info.dtype not in _FP8 or found is None or stored[found].dtype not in (*_PLAIN, "F8_E8M0"):
            method = quantization.get("quant_method", "an unnamed method")
            raise CheckpointError(
                f"{info.shard}: {info.name}: quantised by {method} to {info.dtype}; of quantised weights, only 8-bit "
                "floats with their scales can be looked at",
                "plan with the unquantised sibling; its plan applies to this checkpoint too",
            )
        grid = read_array(self._checkpoint, found).astype(np.float32)
        if grid.size == 1:
            return lambda rows: grid.reshape(())
        grid = grid.reshape(*grid.shape, *[1] * (len(info.shape) - grid.ndim))
        sizes = block_sizes(quantization)
        height, width = (_block(info, grid.shape, sizes, axis) for axis in (-2, -1))
        flat, per = grid.reshape(-1, *grid.shape[-2:]), info.shape[-2]
        columns = np.arange(info.shape[-1]) // width
        return lambda rows: flat[(rows // per)[:, None], (rows % per // height)[:, None], columns]


def _block(info: TensorInfo, grid: tuple[int, ...], sizes: tuple[tuple[int, ...], ...], axis: int) -> int:
    """How many entries along an axis share a scale."""
    length, count = info.shape[axis], grid[axis]
    fitting = [n for n in (length, 1, *(size[axis] for size in sizes if len(size) == 2)) if -(-length // n) == count]
    if not fitting and length % count:
        raise CheckpointError(f"{info.shard}: {info.name}: scales {list(grid)} do not fit weights {list(info.shape)}")
    return fitting[0] if fitting else length // count
