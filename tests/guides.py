"""Runs what a page of the guide tells its readers to do, in a scratch copy of the package.

Blocks of a page, in order: `python` ones say in their first line where they belong (a file to write and run, or a place
in the package), `console` ones hold commands behind `$` and what they print, where a line `…` stands for any lines and
`…` at the end of a line for its rest. Other blocks are for reading.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import expertcut

PACKAGE = Path(expertcut.__file__).parent
_BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r'^    _\w+\(\n        "(\w+)",.*?^    \),\n', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Scratch:
    """A folder to work in, and a copy of the package beside it."""

    folder: Path
    source: Path

    def run(self, *command: str) -> str:
        """What a Python command prints, both streams."""
        env = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
        env |= {"PYTHONPATH": str(self.source), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.stdout


def scratch(folder: Path) -> Scratch:
    """Copy the package without its models, which stay where they are, and the shipped calibration text."""
    source, work = folder / "source", folder / "work"
    shutil.copytree(PACKAGE, source / "expertcut", ignore=shutil.ignore_patterns("__pycache__", "_demo_model"))
    (source / "expertcut" / "_demo_model").symlink_to(PACKAGE / "_demo_model")
    (source / "calibration").symlink_to(PACKAGE.parent / "calibration")
    work.mkdir()
    (work / "demo").symlink_to(PACKAGE / "_demo_model")
    return Scratch(work, source)


def follow(page: Path, where: Scratch) -> int:
    """Do what a page says; the number of commands whose output was compared."""
    compared = 0
    for kind, text in _BLOCK.findall(page.read_text()):
        if kind == "python":
            _place(text, where)
            continue
        for command, expected in re.findall(r"^\$ expertcut (.+)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
            found = where.run("-m", "expertcut", *shlex.split(command))
            assert matches(expected, found), f"{page.name}: expertcut {command}\nexpected\n{expected}\nfound\n{found}"
            compared += 1
    return compared


def _place(text: str, where: Scratch) -> None:
    first, body = text.split("\n", 1)
    name = first.removeprefix("# ").partition(",")[0]
    file = where.source / name
    if name.endswith("families.py"):
        file.write_text(_with_row(file.read_text(), body))
    elif name.startswith("expertcut/"):
        file.write_text(f"{file.read_text()}\n\n{body}")
    else:
        (where.folder / name).write_text(body)
        assert where.run(name) == ""


def _with_row(table: str, row: str) -> str:
    """The family table with a row in front, in place of one that an earlier block added for its type."""
    new = _ROW.fullmatch(row)
    assert new is not None, row
    others = _ROW.sub(lambda old: "" if old[1] == new[1] else old[0], table)
    return re.sub(r"^(FAMILIES.*\(\n)", lambda head: head[1] + row, others, flags=re.MULTILINE)


def matches(expected: str, found: str) -> bool:
    """True if the lines are the same but for trailing spaces and what `…` stands for."""
    pattern = "".join(_pattern(line.rstrip()) for line in expected.splitlines())
    return re.fullmatch(pattern, "".join(f"{line.rstrip()}\n" for line in found.splitlines())) is not None


def _pattern(line: str) -> str:
    if line == "…":
        return r"(?:.*\n)*?"
    return re.escape(line.removesuffix("…")) + (r".*\n" if line.endswith("…") else r"\n")
