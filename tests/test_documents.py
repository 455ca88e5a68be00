"""What the documents say must be so: links lead somewhere, tables are complete, commands and their options exist."""

import json
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

import expertcut
from expertcut.choose.criteria import CRITERIA, FAMILY, get_criterion
from expertcut.model import BY_TYPE, FAMILIES, REFUSED
from expertcut.runtimes.rules import READ, RULES, RUNTIMES

ROOT = Path(expertcut.__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("expertcut/_demo_model/*.md")])


def commands_in_documents() -> dict[str, set[str]]:
    """Subcommand → the long options that the documents' shell examples and inline code give it."""
    used: dict[str, set[str]] = defaultdict(set)
    for document in DOCUMENTS:
        for name, rest in re.findall(r"expertcut ([a-z]+)((?: [^\n`|#]*)?)", document.read_text()):
            used[name] |= set(re.findall(r"(?<= )--[a-z][a-z-]*", rest))
    return used


COMMANDS = (
    "inspect", "profile", "merge", "show", "plan", "prune", "verify", "eval", "sweep", "bench", "estimate", "demo"
)  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_and_options_in_the_documents_exist(name: str) -> None:
    options = commands_in_documents()[name]
    code = "from expertcut.cli import main; main()"
    command = [sys.executable, "-c", code, name, "--help"]
    run = subprocess.run(command, env={"COLUMNS": "200", "NO_COLOR": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert options <= set(re.findall(r"--[a-z][a-z-]*", run.stdout))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)", document.read_text()):
        path, _, anchor = link.partition("#")
        if re.match(r"https?:", link):
            continue
        target = document.parent / path if path else document
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)", target.read_text(), re.MULTILINE) if anchor else []
        anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, link


def test_the_changelog_starts_with_this_version(repo: Path) -> None:
    newest = re.search(r"^## \[?([^\]\s]+)", (repo / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == expertcut.__version__


def test_every_family_and_every_refused_type_is_listed(repo: Path) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", (repo / "docs" / "families.md").read_text(), re.MULTILINE)
    expected = {f.model_type: ", ".join(f"`{name}`" for name in f.aliases) or "–" for f in FAMILIES} | dict(REFUSED)
    assert dict(rows) == expected
    famous = re.findall(r"^\| `(\w+)` \|", (repo / "README.md").read_text(), re.MULTILINE)
    assert set(famous) <= BY_TYPE.keys()


def test_every_criterion_is_listed_with_its_paper_and_what_it_needs(repo: Path) -> None:
    text = (repo / "docs/criteria.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| .+ \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    listed = {name: (needs, source) for name, needs, source in rows}
    assert len(rows) == len(listed) and listed.keys() == {*CRITERIA, FAMILY}
    for criterion in (*CRITERIA.values(), replace(get_criterion("unified:1,1"), name=FAMILY)):
        needs, source = listed[criterion.name]
        kind = "profile" if criterion.needs_profile else "weights" if criterion.needs_weights else "–"
        assert kind in needs, criterion.name
        assert (criterion.paper or source) in source, criterion.name


def test_every_rule_of_the_runtimes_is_listed(repo: Path) -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([^|`]+) \| (\w+) \|", (repo / "docs/runtimes.md").read_text(), re.MULTILINE)
    named = {"all": set(RUNTIMES), "all but vLLM": {*RUNTIMES} - {"vLLM"}}
    listed = {(rule, r, status) for rule, who, status in rows for r in named.get(who) or who.split(", ")}
    assert listed == {(rule.name, runtime, rule.status) for rule in RULES for runtime in rule.runtimes}
    versions = {version for version in READ.values() if version[0].isdigit()}
    assert versions <= set(re.findall(r"\d+(?:\.\d+)+", (repo / "docs/runtimes.md").read_text()))


def test_the_built_in_model_has_a_card_that_fits_it(demo_model: Path) -> None:
    config = json.loads((demo_model / "config.json").read_text())
    card = (demo_model / "README.md").read_text()
    for key in ("num_hidden_layers", "num_experts", "num_experts_per_tok", "hidden_size", "vocab_size"):
        assert re.search(rf"\| `{key}` \| {config[key]} \|", card), key
