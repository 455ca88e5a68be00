"""What the documents say must be so: links lead somewhere, tables are complete, commands exist, pages are not stale."""

import ast
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import expertcut
from expertcut.choose.criteria import CRITERIA, FAMILY, get_criterion
from expertcut.model import BY_TYPE, FAMILIES, REFUSED
from expertcut.runtimes.rules import READ, RULES, RUNTIMES

ROOT = Path(expertcut.__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("expertcut/_demo_model/*.md")])


SCRIPTS = ROOT / "scripts"


def load_script(name: str) -> ModuleType:
    """A module of scripts/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = load_script("command_pages")
COMMANDS: dict[str, Any] = PAGES.commands()


def code(document: Path) -> tuple[list[str], list[str]]:
    """Lines of code blocks, one that ends in a backslash joined to the next, and pieces of inline code."""
    text = re.sub(r"\\\n\s*", "", document.read_text())
    fence = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
    blocks = [*fence.findall(text), *re.findall(r"^    .+", text, re.MULTILINE)]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return lines, re.findall(r"(?<!`)`([^`\n]+)`", fence.sub("", text))


def options_of(command: str) -> set[str]:
    return {name for option in COMMANDS[command].params for name in (*option.opts, *option.secondary_opts)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_options_in_the_documents_exist(document: Path) -> None:
    """All of them in code blocks and inline code."""
    lines, pieces = code(document)
    for name, rest in re.findall(r"\bexpertcut ([a-z]+)\b([^\n|#]*)", "\n".join(lines + pieces)):
        assert name in COMMANDS, f"expertcut {name}"
        used = set(re.findall(r"(?<= )--?[a-z][a-z-]*", rest))
        assert used <= options_of(name), f"expertcut {name}{rest}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_are_valid_command_lines(document: Path) -> None:
    """Lines of code blocks that can be typed as they stand have their arguments, and values of the right kind."""
    for line in re.findall(r"^(?:\$ )?expertcut (.+)$", "\n".join(code(document)[0]), re.MULTILINE):
        if not set(line) & set("…[]"):  # of a synopsis
            name, *arguments = shlex.split(line.partition(" > ")[0], comments=True)
            COMMANDS[name].make_context(name, arguments)


def test_command_pages_are_what_scripts_docs_makes_now() -> None:
    made = PAGES.pages()
    assert made.keys() == {"index.md"} | {f"{name}.md" for name in COMMANDS}
    found = {path.name: path.read_text() for path in (ROOT / "docs" / "commands").iterdir()}
    assert found == made, "run scripts/docs"
    for name in COMMANDS:
        assert {option for option in options_of(name) if option[0] == "-"} <= set(
            re.findall("`(-.+?)`", made[f"{name}.md"])
        )


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert PAGES.navigation(text) == text, "run scripts/docs"

    def entries(part: Any) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        else:
            for inner in part.values() if isinstance(part, dict) else part:
                yield from entries(inner)

    listed = list(entries(yaml.safe_load(text)["nav"]))
    top = re.search(r"^TOP = (.+)$", (SCRIPTS / "docs_hooks.py").read_text(), re.MULTILINE)
    assert top is not None
    made = ast.literal_eval(top[1])
    assert all((ROOT / source).exists() for source in made)
    pages = [str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")]
    assert sorted(listed) == sorted([*pages, *made.values()])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
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
