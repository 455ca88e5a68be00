"""What mkdocs does besides: files at the top level become pages, and headings get the anchors that GitHub gives them.

Pages link to `../CONTRIBUTING.md` and to source files, as GitHub reads them. Here the former lead to pages, and of the
latter the name is left.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

TOP = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def on_config(config: Any) -> Any:
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the files at the top level."""
    root = Path(config.config_file_path).parent
    for source, page in TOP.items():
        files.append(File.generated(config, page, content=_rebased((root / source).read_text(), root)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links out of docs/ to the pages made of those files; other files are not part of the site."""
    here = Path(config.docs_dir, page.file.src_uri).parent
    return LINK.sub(lambda link: _link(link, here, Path(config.docs_dir)), markdown)


def _link(link: re.Match[str], here: Path, docs: Path) -> str:
    path, hash_, anchor = link[2].partition("#")
    target = (here / path).resolve()
    if not path or ":" in path or target.is_relative_to(docs):
        return link[0]
    name = str(target.relative_to(docs.parent))
    if name in TOP:
        return f"[{link[1]}]({'../' * (len(here.parts) - len(docs.parts))}{TOP[name]}{hash_}{anchor})"
    return link[1]


def _rebased(text: str, root: Path) -> str:
    """A top-level file as if it lay in docs/: links into docs/ lose that, others go up first."""

    def rebase(link: re.Match[str]) -> str:
        path = link[2]
        if ":" in path or path.startswith("#"):
            return link[0]
        return f"[{link[1]}]({path.removeprefix('docs/') if path.startswith('docs/') else '../' + path})"

    return LINK.sub(rebase, text)
