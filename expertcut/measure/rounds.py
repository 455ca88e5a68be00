"""Variants, loads and whatever starts an engine in; samples out, every variant in its turn.

Invariant: within a round all variants get the same prompts, and no two rounds get the same ones, so that no engine can
answer from what it has kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

from expertcut.measure.bench import Cell, Sample, Variant
from expertcut.measure.completions import Reply
from expertcut.measure.prompts import Prompts

WARM_UP = 8
"""Tokens that are written for every request of a load before anything is measured, at most."""


@dataclass(frozen=True)
class Outcome:
    """What an engine did with some prompts, and what it took; see `Sample`."""

    replies: Sequence[Reply]
    client_share: float = 0
    memory: int | None = None
    gpu_memory: int | None = None


class Engine(Protocol):
    """An engine with one variant, ready to answer."""

    def run(self, prompts: Sequence[Sequence[int]], output_len: int, clients: int) -> Outcome:
        """Have so many tokens written for every prompt, each of the clients asking for its share one by one."""
        ...


Start = Callable[[Variant], AbstractContextManager[Engine]]


def take_turns(
    variants: Sequence[Variant], loads: Sequence[Cell], rounds: int, start: Start, prompts: Prompts,
    record: Callable[[Sample], None], *, at_once: int = 1, advance: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Measure every variant under every load, `rounds` times, and hand each sample on as soon as it is there.

    at_once: engines that may be up at a time. With one for several variants, every engine is started anew in every
    round. Else the first variant stays up, and the others come in groups beside it, each group with rounds of its own.
    """
    sets = groups(variants, at_once)
    total, done, number = rounds * len(loads) * sum(map(len, sets)), 0, 0
    stay = at_once >= min(2, len(variants))
    with ExitStack() as stack:
        kept = {variants[0]: _ready(stack, start, variants[0], loads, prompts)} if stay else {}
        for some in sets:
            with ExitStack() as beside:
                if stay:
                    kept |= {v: _ready(beside, start, v, loads, prompts) for v in some[1:]}
                for _ in range(rounds):
                    number += 1
                    for variant in some:
                        done = _turn(variant, loads, number, start, prompts, record, kept, done)
                        advance(done, total)


def groups(variants: Sequence[Variant], at_once: int) -> list[list[Variant]]:
    """Return which variants take turns: all, or the first with so many others that `at_once` are up."""
    first, *others = variants
    if at_once == 1 or not others:
        return [list(variants)]
    step = at_once - 1
    return [[first, *others[i : i + step]] for i in range(0, len(others), step)]


def _turn(
    variant: Variant, loads: Sequence[Cell], number: int, start: Start, prompts: Prompts,
    record: Callable[[Sample], None], kept: Mapping[Variant, Engine], done: int,
) -> int:  # fmt: skip
    """One variant in one round; returns how many samples there are now."""
    with ExitStack() as stack:
        engine = kept.get(variant) or _ready(stack, start, variant, loads, prompts)
        for cell in loads:
            outcome = engine.run(prompts.draw(cell, number), cell.output_len, cell.concurrency)
            record(
                Sample(variant, cell, number, tuple(outcome.replies), outcome.client_share, outcome.memory,
                       outcome.gpu_memory)
            )  # fmt: skip
    return done + len(loads)


def _ready(stack: ExitStack, start: Start, variant: Variant, loads: Sequence[Cell], prompts: Prompts) -> Engine:
    """Start an engine and let it write a few tokens under every load, which is not measured."""
    engine = stack.enter_context(start(variant))
    for cell in loads:
        engine.run(prompts.draw(cell, 0), min(WARM_UP, cell.output_len), cell.concurrency)
    return engine
