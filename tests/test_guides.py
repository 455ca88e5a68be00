"""The guide does what it says: its code works in a copy of the package, and its commands print what stands there."""

from pathlib import Path

import pytest
from golden_names import golden
from guides import follow, matches, scratch
from sparse import write

HEADERS = {
    "qwen3-30b": "Qwen3-30B-A3B", "qwen3-30b-gptq": "Qwen3-30B-A3B-GPTQ-Int4", "deepseek-v2-lite": "DeepSeek-V2-Lite",
    "deepseek-v3": "DeepSeek-V3",
}  # fmt: skip
PAGES = {
    "prune": ("qwen3-30b", "qwen3-30b-gptq"), "fewer-experts": ("deepseek-v2-lite", "deepseek-v3"), "family": (),
    "criterion": (),
}  # fmt: skip
"""Page → the published headers that it works on."""


@pytest.mark.parametrize("page", PAGES)
def test_the_guide_prints_what_it_says(repo: Path, tmp_path: Path, page: str) -> None:
    where = scratch(tmp_path)
    for name in PAGES[page]:
        write(golden(name), where.folder / HEADERS[name])
    assert follow(repo / f"docs/guide/{page}.md", where) >= 3


def test_every_page_of_the_guide_is_followed(repo: Path) -> None:
    assert {path.stem for path in repo.glob("docs/guide/*.md")} == {*PAGES, "index"}


@pytest.mark.parametrize(
    ("expected", "found", "same"),
    [
        ("a\nb\n", "a  \nb\n", True),
        ("a\n", "a\nb\n", False),
        ("…\nb\n", "a\na\nb\n", True),
        ("…\nb\n", "a\n", False),
        ("a …\n", "a long line\n", True),
        ("a.b\n", "axb\n", False),
    ],
)
def test_what_counts_as_the_same_output(expected: str, found: str, same: bool) -> None:
    assert matches(expected, found) is same
