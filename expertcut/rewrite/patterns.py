"""Entries of quantization configs that are patterns: what a text matches, and texts that match given modules. Pure.

A pattern is a glob (`….experts.1.*`), or a regex matched at a name's beginning (`re:…`, and the keys of GPTQ's
`dynamic`, with or without `+:` and `-:`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate

from expertcut.rewrite.modules import Block

_SIGNS = ("re:", "+:", "-:")


@dataclass(frozen=True)
class Pattern:
    """A glob or regex."""

    sign: str
    body: str
    regex: bool
    """False: a glob, which also matches all below what it matches."""
    compiled: re.Pattern[str]

    @classmethod
    def parse(cls, text: str, regex: bool) -> Pattern:
        """Return the pattern of an entry; `regex` says that it is one though it may not look so.

        Raises:
            re.error: it is no valid regular expression.
        """
        sign = next((s for s in _SIGNS if text.startswith(s)), "")
        body = text[len(sign) :]
        regex = regex or bool(sign) or _looks_regex(body)
        return cls(sign, body, regex, re.compile(body if regex else f"{translate(body)}|{translate(body + '.*')}"))

    def matches(self, name: str) -> bool:
        """True if a module of this name is meant."""
        return self.compiled.match(name) is not None

    @property
    def blind(self) -> bool:
        """True if it cannot tell one number from another: it has neither digits nor single-character wildcards."""
        if self.regex:
            return not re.search(r"[\d\\\[.{]", re.sub(r"\\[.\-_]", "_", self.body).replace(".*", ""))
        return not re.search(r"[\d?\[]", self.body)


def is_pattern(text: str) -> bool:
    """True for a glob or regex, by its looks."""
    return text.startswith("re:") or any(c in text for c in "*?[") or _looks_regex(text)


def plain(text: str) -> str:
    """Return the path that a text names, with all below it, if it is a path with nothing but a wildcard at its end."""
    for sign in _SIGNS:
        text = text.removeprefix(sign)
    return text.replace("\\.", ".").rstrip("*").rstrip(".")


def globs(block: Block, numbers: Mapping[int, Sequence[str]]) -> Iterator[str]:
    """Yield globs and paths of modules of a block: new numbers, and the parts of each."""
    for number, parts in numbers.items():
        if len(parts) == len(block.parts):
            yield f"{block.prefix}{number}.*"
        else:
            yield from (f"{block.prefix}{number}.{part}" for part in parts)


def alternative(block: Block, numbers: Mapping[int, Sequence[str]]) -> str:
    """Return a regex that matches these modules of a block and no other."""
    by_parts: dict[tuple[str, ...], list[str]] = {}
    for number, parts in numbers.items():
        by_parts.setdefault(tuple(parts), []).append(str(number))
    choices = []
    for names, ids in by_parts.items():
        end = r"\." if len(names) == len(block.parts) else rf"\.{_either(map(re.escape, names))}$"
        choices.append(_either(ids) + end)
    return re.escape(block.prefix) + _either(choices)


def _looks_regex(text: str) -> bool:
    return text.startswith((".*", "^")) or any(c in text for c in "\\(|$")


def _either(choices: Iterable[str]) -> str:
    options = list(choices)
    return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"
