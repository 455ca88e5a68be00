"""Exact arithmetic: held-out problems in; which of them a checkpoint, and it under plans, answers right out.

An item is a prompt of solved problems, one a line, that ends in one to solve: `3*4=12\n70-8=62\n23+65=`, answer `88`.
Items share no problem with calibration arithmetic, whatever the seeds (`calibrate.arithmetic`), and no item's own
problem stands in its prompt. An answer is right if all its tokens and the end of the line are the most likely ones,
each given the right ones before it: then, and only then, greedy decoding writes these tokens. So one pass answers all
items, for any number of plans, without generating anything.

Shapes: N models, S items.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertcut.calibrate.arithmetic import OPERATORS, draw
from expertcut.calibrate.passage import Advance, Notify
from expertcut.calibrate.run import ProfileOptions
from expertcut.calibrate.tokenizer import Tokenizer, load_tokenizer
from expertcut.checkpoint.types import Checkpoint
from expertcut.choose.plan import Plan
from expertcut.errors import CheckpointError
from expertcut.measure import scores
from expertcut.measure.continuations import Request, predict
from expertcut.measure.intervals import Estimate
from expertcut.measure.quality import BASE
from expertcut.model import Geometry

SOLVED, ASKED = 4, 20
"""Lines of a list that only show the form, and lines behind them that are items: each one's prompt is what is above."""
ITEMS = 2000


@dataclass(frozen=True)
class Item:
    """A problem to solve."""

    prompt: str
    answer: str
    """Decimal digits."""
    operator: str


@dataclass(frozen=True)
class Answers:
    """Which items each model answers right."""

    names: tuple[str, ...]
    """(N,) `BASE`, then the plans."""
    correct: NDArray[np.bool_]
    """(N, S)"""

    def accuracy(self, name: str) -> Estimate:
        """Return the share of items that a model answers right."""
        return scores.mean(self._of(name))

    def difference(self, name: str, other: str = BASE) -> Estimate:
        """Return by how much the share of a model is higher than that of another, item by item."""
        return scores.difference(self._of(name), self._of(other))

    def _of(self, name: str) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self.correct[self.names.index(name)]
        return found


def arithmetic_items(count: int = ITEMS, seed: int = 0) -> list[Item]:
    """Return items, every operator a third of them; the same seed gives the same ones, and more begin with fewer."""
    return list(islice(_items(random.Random(f"items/{seed}")), count))


def arithmetic_accuracy(
    checkpoint: Checkpoint, geometry: Geometry, plans: Mapping[str, Plan], items: Sequence[Item],
    options: ProfileOptions, *, notify: Notify, advance: Advance,
) -> Answers:  # fmt: skip
    """Let the checkpoint (named `base`) and it under each plan answer all items, in one pass.

    Raises:
        PlanError: a plan does not fit the checkpoint.
        CheckpointError: the tokenizer joins the end of a prompt with the answer.
        UsageError: a plan is named `base`.
    """
    tokenizer = load_tokenizer(checkpoint.path)
    requests = [_request(tokenizer, item, checkpoint.name) for item in items]
    found = predict(checkpoint, geometry, plans, requests, options, notify=notify, advance=advance)
    return Answers(found.names, found.greedy)


def dataset(count: int, seed: int, **metadata: object) -> dict[str, Any]:
    """Return the items as lm-eval wants the data of a task; called by the task files in `tasks/`."""
    from datasets import Dataset  # type: ignore[import-untyped]

    return {"test": Dataset.from_list([asdict(item) for item in arithmetic_items(count, seed)])}


def _items(rng: random.Random) -> Iterator[Item]:
    while True:
        text, seen = "", set[tuple[str, int, int]]()
        for line in range(SOLVED + ASKED):
            operator = rng.choice(OPERATORS)
            a, b, result = _unseen(rng, operator, seen)
            if line >= SOLVED:
                yield Item(f"{text}{a}{operator}{b}=", str(result), operator)
            text += f"{a}{operator}{b}={result}\n"


def _unseen(rng: random.Random, operator: str, seen: set[tuple[str, int, int]]) -> tuple[int, int, int]:
    """Draw a problem that is new to a list, whatever the order of its operands."""
    while True:
        a, b, result = draw(rng, operator, "heldout")
        problem = operator, min(a, b), max(a, b)
        if problem not in seen:
            seen.add(problem)
            return a, b, result


def _request(tokenizer: Tokenizer, item: Item, name: str) -> Request:
    prompt, whole = (tokenizer.begin(text).tolist() for text in (item.prompt, f"{item.prompt}{item.answer}\n"))
    if whole[: len(prompt)] != prompt:
        raise CheckpointError(f"{name}: the tokenizer joins '=' and the digits behind it, so that no prompt ends there")
    return prompt, whole[len(prompt) :]
