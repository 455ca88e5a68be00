"""What published checkpoints look like on disk, from `goldens/`: tensor names, dtypes, shapes, and the config keys that
matter here.

One YAML file a checkpoint: `source`, its repository on the Hub; `grade`, A: transcribed from a listing of the real
headers, B: read off the checkpoint by somebody's code, C: derived from code and config; `facts`, in words; `tensors`
and `nbytes`, the published count and size, and `shards`, the published file names, where known; `config`; `expected`,
what geometry must find; `rows`, every tensor of the language model as name, dtype, shape.

`{a,b}` is one name each, `{0-3}` a range of numbers, `{00-10:5}` one of width two in steps of five, `{full}` the
numbers under that key of `layers`: `layers.{0-1}.{q,k}_proj` is four names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import yaml

from expertcut.checkpoint import DTYPE_BITS, Checkpoint, TensorInfo

FOLDER = Path(__file__).parent / "goldens"
FIRST = 4
"""Layers that `thin` keeps, besides the trunk's last and those behind it."""
_LAYERS = re.compile(r"(?<=(?:layers|blocks)\.\{)[^{}]+")
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, dtype, shape."""


@dataclass(frozen=True)
class Expected:
    """What geometry must find."""

    moe: str
    """Numbers of the trunk's layers with routed experts."""
    experts: int
    top_k: int
    per_expert: int
    """Tensors per expert."""
    sliced: int
    """Further tensors per trunk block that are cut along an axis, or remapped."""
    groups: tuple[int, int] = (1, 1)
    """Expert groups, and how many of them a token uses."""
    mtp: dict[str, int] = field(default_factory=dict)
    """Prefix of every MoE block for multi-token prediction → its layer."""


@dataclass(frozen=True)
class Golden:
    """One published checkpoint."""

    source: str
    grade: str
    facts: str
    config: dict[str, Any]
    expected: Expected
    rows: str
    layers: dict[str, str] = field(default_factory=dict)
    tensors: int | None = None
    nbytes: int | None = None
    shards: str | None = None

    def expand(self, thin: bool = False) -> Iterator[Tensor]:
        """Yield every tensor; `thin` keeps the first and the last layers only, which have all there is to see."""
        rows = self.rows
        for name, numbers in self.layers.items():
            rows = rows.replace(f"{{{name}}}", f"{{{numbers}}}")
        return expand(_LAYERS.sub(self._thin, rows) if thin else rows)

    def checkpoint(self, thin: bool = False) -> Checkpoint:
        """Headers only: one imaginary shard, tensors in the order of the rows."""
        return as_checkpoint(list(self.expand(thin)), self.config)

    def moe_layers(self, thin: bool = False) -> list[int]:
        """Numbers of the trunk's layers with routed experts."""
        numbers = [int(number) for number in _numbers(self.layers.get(self.expected.moe, self.expected.moe))]
        return [number for number in numbers if not thin or number < FIRST or number == numbers[-1]]

    def templates(self) -> set[str]:
        """Names without their numbers, `model.layers.*.mlp.experts.*.up_proj.weight`."""
        return {template(name) for name, _, _ in self.expand()}

    def _thin(self, layers: re.Match[str]) -> str:
        last = self.moe_layers()[-1]
        return ",".join(number for number in _numbers(layers[0]) if int(number) < FIRST or int(number) >= last)


@cache
def golden(name: str) -> Golden:
    """The golden in `goldens/NAME.yaml`."""
    facts = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    expected = facts.pop("expected")
    groups = tuple(expected.pop("groups", (1, 1)))
    return Golden(expected=Expected(**expected, groups=groups), **facts)


def expand(rows: str) -> Iterator[Tensor]:
    """Yield every tensor of rows of name, dtype and shape; a shape is `2x3`, or `scalar`."""
    for row in rows.splitlines():
        if not row.strip() or "{}" in row:
            continue
        pattern, dtype, shape = row.split()
        sizes = () if shape == "scalar" else tuple(map(int, shape.split("x")))
        for name in expand_name(pattern):
            yield name, dtype, sizes


def template(name: str) -> str:
    """The name with `*` for every number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def as_checkpoint(tensors: list[Tensor], config: dict[str, Any]) -> Checkpoint:
    """An opened checkpoint of these tensors, in one imaginary shard."""
    infos, at = {}, 0
    for name, dtype, shape in tensors:
        end = at + prod(shape) * DTYPE_BITS[dtype] // 8
        assert name not in infos, name
        infos[name] = TensorInfo(name, dtype, shape, "model.safetensors", at, end)
        at = end
    return Checkpoint("golden", Path("golden"), config, infos, {"model.safetensors": at}, False, ())


def expand_name(pattern: str) -> Iterator[str]:
    """Yield every name that a pattern stands for."""
    parts: list[list[str]] = []
    while pattern:
        head, _, rest = pattern.partition("{")
        choices, pattern = _choices(rest) if rest else ([""], "")
        names = [
            name for choice in choices for name in (_numbers(choice) if choice[:1].isdigit() else expand_name(choice))
        ]
        parts.append([head + name for name in names or [""]])
    return map("".join, product(*parts))


def _numbers(text: str) -> Iterator[str]:
    """`0-2,7` is 0, 1, 2, 7; `00-10:5` is 00, 05, 10."""
    for part in text.split(","):
        first, _, rest = part.partition("-")
        last, _, step = rest.partition(":")
        for number in range(int(first), int(last or first) + 1, int(step or 1)):
            yield str(number).zfill(len(first))


def _choices(text: str) -> tuple[list[str], str]:
    """Split `a,b{c,d}}rest` into its choices and the rest."""
    depth, start, choices = 1, 0, []
    for at, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0 or (depth == 1 and character == ","):
            choices.append(text[start:at])
            start = at + 1
        if depth == 0:
            break
    return choices, text[start:]
