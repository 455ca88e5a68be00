"""Writes docs/commands/, and its part of mkdocs.yml, from the command line's own objects: the help as pages.

`scripts/docs` runs it; a test holds the committed pages against what it makes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer.main

from expertcut.cli.app import COMMANDS, application

ROOT = Path(__file__).resolve().parents[1]
MADE = "<!-- Made by scripts/docs from the command's own help: change that, not this page. -->"
MORE = {
    "inspect": ("families.md", "runtimes.md", "hub.md"), "profile": ("file-formats.md", "quantised.md", "hub.md"),
    "merge": ("file-formats.md",), "show": ("topk.md",),
    "plan": ("criteria.md", "searching.md", "replay.md", "topk.md", "estimate.md"),
    "prune": ("evaluation.md", "topk.md", "hub.md"), "verify": ("architecture.md",), "eval": ("evaluation.md",),
    "sweep": ("estimate.md",),
}  # fmt: skip
"""Pages of docs/ that explain what a command does; one that is called like the command is found by itself."""


def commands() -> dict[str, Any]:
    """Every command by name, in the order of the help: typer's own objects."""
    return dict(typer.main.get_group(application(COMMANDS)).commands)


def pages() -> dict[str, str]:
    """File name below docs/commands → its text."""
    return {"index.md": overview(), **{f"{name}.md": page(name, command) for name, command in commands().items()}}


def navigation(config: str) -> str:
    """The text of mkdocs.yml with every command listed under `Commands`."""
    listed = "".join(f"      - {name}: commands/{name}.md\n" for name in commands())
    return re.sub(r"(?<=  - Commands:\n      - commands/index\.md\n)(?:      - .*\n)*", lambda _: listed, config)


def overview() -> str:
    group = typer.main.get_group(application(COMMANDS))
    rows = [(f"[`{name}`]({name}.md)", cell(str(c.help).split("\n\n")[0])) for name, c in commands().items()]
    return "\n".join(
        [
            MADE, "# Commands", "", *table(("command", "what it does"), rows), "",
            "Options go behind the command, but for these, which go before it:", "",
            *option_table(group.params), "",
            "What commands print, and their exit codes: [documentation](../index.md#output-and-exit-codes).", "",
        ]
    )  # fmt: skip


def page(name: str, command: Any) -> str:
    text, _, example = str(command.help).partition("\n\nExample:\n")
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    needed = [f"{p.opts[0]} {p.metavar}" for p in options if p.required]
    usage = " ".join(["expertcut", name, *(p.metavar for p in arguments), *needed, "[OPTIONS]"])
    lines = [MADE, f"# {name}", "", text, "", "```text", usage, "```", ""]
    lines += ["## Example", "", "```bash", *shell(example), "```", ""]
    if arguments:
        lines += ["## Arguments", ""]
        lines += [*table(("argument", "meaning"), [(code(p.metavar), cell(p.help)) for p in arguments]), ""]
    for panel in dict.fromkeys(p.rich_help_panel for p in sorted(options, key=lambda p: p.rich_help_panel is not None)):
        some = [p for p in options if p.rich_help_panel == panel]
        lines += [f"## {panel or 'Options'}", "", *option_table(some), ""]
    more = [file for file in (f"{name}.md", *MORE.get(name, ())) if (ROOT / "docs" / file).exists()]
    if more:
        lines += ["## More", "", *(f"- [{title(file)}](../{file})" for file in dict.fromkeys(more)), ""]
    return "\n".join(lines)


def shell(example: str) -> list[str]:
    """Lines of an example; one that is indented further goes on with the line before it."""
    return re.sub(r"\n(?=  )", " \\\\\n", "\n".join(line[2:] for line in example.splitlines())).splitlines()


def option_table(options: Iterable[Any]) -> list[str]:
    """Rows of options, shown with what help shows: the value's name and a default that says something."""
    return table(("option", "value", "default", "meaning"), [
        (", ".join(map(code, (*p.opts, *p.secondary_opts))), value(p), default(p), cell(p.help)) for p in options
    ])  # fmt: skip


def value(option: Any) -> str:
    return "" if option.is_flag else code(option.metavar)


def default(option: Any) -> str:
    if option.required:
        return "required"
    return "" if option.is_flag or option.default in (None, (), []) else code(str(option.default))


def title(file: str) -> str:
    return (ROOT / "docs" / file).read_text().partition("\n")[0].removeprefix("# ")


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def code(text: str) -> str:
    return f"`{cell(text)}`"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    folder = ROOT / "docs" / "commands"
    folder.mkdir(exist_ok=True)
    made = pages()
    for stale in {path.name for path in folder.glob("*.md")} - made.keys():
        (folder / stale).unlink()
    for name, text in made.items():
        (folder / name).write_text(text)
    config = ROOT / "mkdocs.yml"
    config.write_text(navigation(config.read_text()))


if __name__ == "__main__":
    main()
