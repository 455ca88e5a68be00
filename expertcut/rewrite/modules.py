"""Geometry and kept ids in; the modules of a checkpoint out, by their names before and after a rewrite.

Quantization configs speak of modules, not of tensors: `….experts.5.up_proj`, not `….experts.5.up_proj.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from expertcut.model import ExpertTensor, Geometry

_FUSED = ("gate_proj", "up_proj", "down_proj")
"""What runtimes call the modules of stacked experts."""


@dataclass(frozen=True)
class Block:
    """The experts of one MoE block."""

    prefix: str
    """What stands before an expert's number, on disk."""
    ids: tuple[int, ...]
    """Old numbers of those that are left, in the order of their new ones."""
    parts: tuple[str, ...]
    """Modules of an expert, such as `up_proj`."""

    @property
    def tail(self) -> str:
        """The prefix from `layers.` on, without the names of the stacks around it."""
        return self.prefix[max(0, self.prefix.rfind("layers.")) :]

    def renamed(self) -> Iterator[tuple[int, str, str, str]]:
        """Yield (new number, part, old name, new name) of every module that is left."""
        for new, old in enumerate(self.ids):
            for part in self.parts:
                yield new, part, f"{self.prefix}{old}.{part}", f"{self.prefix}{new}.{part}"

    def dropped(self, experts: int) -> Iterator[str]:
        """Yield the names of the modules that go."""
        for old in sorted(set(range(experts)) - set(self.ids)):
            for part in self.parts:
                yield f"{self.prefix}{old}.{part}"


class Modules:
    """The modules of a checkpoint; `kept` holds the kept ids of every block, `dropped` tensors that go altogether."""

    def __init__(self, geometry: Geometry, kept: Mapping[str, Sequence[int]], dropped: Collection[str] = ()) -> None:
        self._geometry, self._kept, self._dropped = geometry, kept, dropped
        self.experts = geometry.num_experts * geometry.family.sets
        self.word = re.escape(geometry.family.expert or "experts")
        """What stands before the dot and an expert's number, as a regex."""
        self.numbered = re.compile(rf"(?P<before>(?:.*\.)?{self.word}\.)(?P<id>\d+)(?P<after>(?:\..+)?)")
        """A path to or below a numbered expert."""
        self._meant: dict[str, list[Block]] = {}

    @cached_property
    def blocks(self) -> list[Block]:
        """Every MoE block that is left."""
        geometry = self._geometry
        left = [prefix for prefix, block in geometry.blocks.items() if block.router not in self._dropped]
        parts: dict[str, dict[str, None]] = {prefix: {} for prefix in left}
        tails: dict[str, dict[int, None]] = {prefix: {} for prefix in left}
        for role in geometry.roles.values():
            if isinstance(role, ExpertTensor) and role.block in parts:
                parts[role.block][role.part.rpartition(".")[0]] = None
                if role.expert >= self.experts:  # behind the routed ones, always kept
                    tails[role.block][role.expert] = None
        ids = {p: (*geometry.ids_on_disk(geometry.blocks[p], self._kept), *sorted(tails[p])) for p in left}
        return [Block(geometry.blocks[p].expert_prefix, ids[p], tuple(parts[p]) or _FUSED) for p in left]

    @cached_property
    def others(self) -> list[str]:
        """Modules that are left and no expert's."""
        roles = self._geometry.roles.items()
        names = (n for n, role in roles if not isinstance(role, ExpertTensor) and n not in self._dropped)
        return list(dict.fromkeys(name.rpartition(".")[0] for name in names))

    @cached_property
    def foreign(self) -> set[str]:
        """What stands before the numbers of experts that are not pruned, such as those of a second model."""
        return {found["before"] for name in self.others if (found := self.numbered.fullmatch(name))}

    @cached_property
    def gone(self) -> set[str]:
        """Full names of modules, and of what holds them, of which no tensor is left."""
        left = (name for name in self._geometry.roles if name not in self._dropped)
        return _holders(self._dropped) - _holders(left) if self._dropped else set()

    def meant(self, before: str) -> list[Block]:
        """Return the blocks that a path up to an expert's number may mean: by its full name, else by where both end."""
        if before not in self._meant:
            exact = [block for block in self.blocks if block.prefix == before]
            self._meant[before] = exact or [
                b for b in self.blocks
                if before not in self.foreign and (b.prefix.endswith("." + before) or before.endswith("." + b.tail))
            ]  # fmt: skip
        return self._meant[before]

    def near(self, body: str) -> list[Block]:
        """Return the blocks whose experts a glob or regex may match, by what it begins with."""
        start = re.match(r"\^?((?:\\\.|[\w.-])*)", body)
        assert start
        literal = start[1].replace("\\.", ".")
        if "|" in body or "(?" in body:
            return self.blocks
        if start.end() < len(body):  # what follows may repeat or drop the last character
            literal = literal[:-1]
        wild = re.compile(re.escape(literal).replace(r"\.", "."))
        return [
            b for b in self.blocks
            if wild.match(b.prefix) or re.match(re.escape(b.prefix).replace(r"\.", "."), literal)
        ]  # fmt: skip


def _holders(names: Iterable[str]) -> set[str]:
    """Every name that ends before a dot of one of these."""
    return {name[: dot.start()] for name in names for dot in re.finditer(r"\.", name)}
