"""Generated arithmetic: endless lines such as `23+65=88`, from a seed, without any file.

Sums and differences of numbers below 100 and products of digits, forty lines a document. Every problem belongs to
exactly one part: problems are the same whatever the order of their operands, and the parity of a hash of operator and
operands decides. So calibration and held-out arithmetic share no problem, whatever their seeds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Literal

Part = Literal["calibration", "heldout"]

LINES = 40
OPERATORS = ("+", "-", "*")
_SHARES = (0.5, 0.3, 0.2)
_LARGEST = {"+": 99, "-": 99, "*": 9}


def part_of(operator: str, a: int, b: int) -> Part:
    """Name the part that the problem `a operator b` belongs to; the order of the operands does not matter."""
    problem = f"{min(a, b)}{operator}{max(a, b)}"
    return "heldout" if hashlib.sha256(problem.encode()).digest()[0] & 1 else "calibration"


def arithmetic(part: Part, seed: int) -> Iterator[str]:
    """Yield documents of `LINES` problems of one part without end; the same seed gives the same documents."""
    rng = random.Random(f"{part}/{seed}")
    while True:
        yield "".join(_line(rng, part) for _ in range(LINES))


def draw(rng: random.Random, operator: str, part: Part) -> tuple[int, int, int]:
    """Draw a problem of one part: both operands and the result."""
    while True:
        a, b = rng.randint(0, _LARGEST[operator]), rng.randint(0, _LARGEST[operator])
        if part_of(operator, a, b) == part:
            break
    if operator == "-":
        a, b = max(a, b), min(a, b)
    return a, b, a + b if operator == "+" else a - b if operator == "-" else a * b


def _line(rng: random.Random, part: Part) -> str:
    (operator,) = rng.choices(OPERATORS, _SHARES)
    a, b, result = draw(rng, operator, part)
    return f"{a}{operator}{b}={result}\n"
