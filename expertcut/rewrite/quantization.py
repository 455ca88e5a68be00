"""A quantization config in, what it must say of the kept experts under their new numbers out. Pure.

Invariant: every module that survives is decided on as before. Entries are module paths (`….experts.5.up_proj`, whole or
from some dot on; `….experts.5` names all below), globs (`….experts.1.*`), or regexes matched at a name's beginning
(`re:…`, and the keys of GPTQ's `dynamic`). An entry that holds for the new numbers as it is stays as it is; otherwise
its numbers are replaced where that is exact, or it is spelled out; entries for dropped experts alone are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from typing import Any

from expertcut.errors import ConfigConflictError
from expertcut.model import Edit, ExpertTensor, Geometry

KEYS = ("quantization_config", "compression_config")
COMPANIONS = ("hf_quant_config.json", "quantize_config.json", "quantization_config.json", "quant_config.json")
"""Files beside the weights in which quantisers repeat their config."""
RELATIVE = "modules_in_block_to_quantize"
"""GPTQ's key whose entries name modules below a decoder layer, the same in every layer."""

Entry = tuple[str, Any]
"""An entry and its value; the entries of a list have none."""


def quantization_edits(config: Mapping[str, Any], geometry: Geometry, kept: Mapping[str, Sequence[int]]) -> list[Edit]:
    """Return the values below `quantization_config` that change; `kept` holds the kept ids of every block.

    Raises:
        ConfigConflictError: an entry cannot be rewritten exactly, naming it.
    """
    rewriter = _Rewriter(geometry, kept)
    edits: list[Edit] = []
    for path in dict.fromkeys(((), geometry.family.root)):
        scope: Any = config
        for key in path:
            scope = scope.get(key) or {}
        for key in KEYS:
            if scope.get(key):
                edits += _changes(scope[key], rewriter.value(scope[key], key), (*path, key))
    return edits


def rewrite_document(document: Any, name: str, geometry: Geometry, kept: Mapping[str, Sequence[int]]) -> Any:
    """Return a companion's parsed JSON with its entries rewritten; `name` is the file that errors name.

    Raises:
        ConfigConflictError: an entry cannot be rewritten exactly, naming it.
    """
    return _Rewriter(geometry, kept, name).value(document, "")


@dataclass(frozen=True)
class _Block:
    prefix: str
    """What stands before an expert's number, on disk."""
    ids: tuple[int, ...]
    parts: tuple[str, ...]
    """Modules of an expert, such as `up_proj`."""

    @property
    def tail(self) -> str:
        """The prefix from `layers.` on, without the names of the stacks around it."""
        return self.prefix[max(0, self.prefix.rfind("layers.")) :]

    def renamed(self) -> Iterator[tuple[int, str, str, str]]:
        """Yield (new number, part, old name, new name) of every module that is left."""
        for new, old in enumerate(self.ids):
            for part in self.parts:
                yield new, part, f"{self.prefix}{old}.{part}", f"{self.prefix}{new}.{part}"

    def dropped(self, experts: int) -> Iterator[str]:
        """Yield the names of the modules that go, of `experts` numbers on disk."""
        for old in sorted(set(range(experts)) - set(self.ids)):
            for part in self.parts:
                yield f"{self.prefix}{old}.{part}"


class _Rewriter:
    def __init__(self, geometry: Geometry, kept: Mapping[str, Sequence[int]], file: str = "config.json") -> None:
        self.geometry, self.kept, self.file = geometry, kept, file
        self.word = re.escape(geometry.family.expert or "experts")
        self._experts = geometry.num_experts * geometry.family.sets
        self._meant: dict[str, list[_Block]] = {}
        self._numbered = re.compile(rf"(?P<before>(?:.*\.)?{self.word}\.)(?P<id>\d+)(?P<after>(?:\..+)?)")

    def value(self, value: Any, key: str) -> Any:
        """Return any part of a config rewritten; `key` is where it stands."""
        if isinstance(value, dict):
            inner = [(name, self.value(member, name)) for name, member in value.items()]
            return dict(self.entries(inner, key))
        if isinstance(value, str):
            found = self.entries([(value, None)], key)
            if len(found) != 1:
                raise self._error(key, value, f"has to become {len(found)} entries, but is no list")
            return found[0][0]
        if isinstance(value, list) and value and all(isinstance(member, str) for member in value):
            return [text for text, _ in self.entries([(text, None) for text in value], key)]
        if isinstance(value, list) and key == RELATIVE and all(isinstance(member, list) for member in value):
            nested = self.entries([(text, place) for place, group in enumerate(value) for text in group], key)
            groups = [[text for text, place in nested if place == i] for i in range(len(value))]
            return [group for group, old in zip(groups, value, strict=True) if group or not old]
        return [self.value(member, key) for member in value] if isinstance(value, list) else value

    def entries(self, entries: Sequence[Entry], key: str) -> list[Entry]:
        """Return entries of a list, or of an object with their values, rewritten; order is kept."""
        placed: list[tuple[int, Entry]] = []
        templates: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        for place, (text, value) in enumerate(entries):
            named = None if key == "dynamic" or _is_pattern(text) else self._numbered.fullmatch(text)
            if named and self._blocks(named["before"]):
                templates.setdefault((named["before"], named["after"]), []).append((place, int(named["id"]), value))
            elif key == "dynamic" or _is_pattern(text):
                placed += [(place, (new, value)) for new in self._pattern(text, key)]
            else:
                placed.append((place, (text, value)))
        for (before, after), found in templates.items():
            placed += self._paths(before, after, found, key)
        return [entry for _, entry in sorted(placed, key=lambda item: item[0])]

    def _blocks(self, before: str) -> list[_Block]:
        """The blocks that a path up to an expert's number may mean: by its full name, else by where both end."""
        if before not in self._meant:
            exact = [b for b in self._all if b.prefix == before]
            self._meant[before] = exact or [
                b for b in self._all
                if before not in self._foreign
                and (b.prefix.endswith("." + before) or before.endswith("." + b.tail))
            ]  # fmt: skip
        return self._meant[before]

    def _paths(
        self, before: str, after: str, found: Sequence[tuple[int, int, Any]], key: str
    ) -> Iterator[tuple[int, Entry]]:
        """Renumber the entries that are alike but for the expert; in every block that they mean."""
        blocks = self._blocks(before)
        if blocks[0].prefix != before and any(name.endswith("." + before) for name in self._foreign):
            text = f"{before}{found[0][1]}{after}"
            raise self._error(key, text, "means experts that are not pruned too")
        renumbered = []
        for block in blocks:
            new = {old: number for number, old in enumerate(block.ids)}
            renumbered.append({new[old]: (place, value) for place, old, value in found if old in new})
        values = [{number: value for number, (_, value) in sorted(one.items())} for one in renumbered]
        if key == RELATIVE:
            values = [dict.fromkeys(one) for one in values]
        if all(one == values[0] for one in values):
            free = [place for place, _, _ in found]
            for number, (place, value) in sorted(renumbered[0].items()):
                spot = place if len(blocks) == 1 else free.pop(0)
                for end in self._ends(blocks[0], after):
                    yield spot, (f"{before}{number}{end}", value)
            return
        if key == RELATIVE:
            text = f"{before}{found[0][1]}{after}"
            raise self._error(key, text, "means layers whose experts are numbered differently by the plan")
        for block, one in zip(blocks, renumbered, strict=True):
            for number, (place, value) in sorted(one.items()):
                for end in self._ends(block, after):
                    yield place, (f"{block.prefix}{number}{end}", value)

    @staticmethod
    def _ends(block: _Block, after: str) -> list[str]:
        """Spell out an expert's modules where runtimes might take `experts.1` for the beginning of `experts.10`."""
        ambiguous = not after and len(block.ids) > 10 and block.parts
        return [f".{part}" for part in block.parts] if ambiguous else [after]

    def _pattern(self, text: str, key: str) -> list[str]:
        """Return what a glob or regex becomes."""
        sign, body, matches = self._compiled(text, key)
        if _is_blind(body, matches.regex):
            return [text]
        old: dict[_Block, dict[int, list[str]]] = {}
        same, stale, near = True, False, self._near(body)
        for block in near:
            for number, part, before, after in block.renamed():
                hit = bool(matches(before))
                same = same and hit == bool(matches(after))
                if hit:
                    old.setdefault(block, {}).setdefault(number, []).append(part)
            stale = stale or (not old and any(matches(name) for name in block.dropped(self._experts)))
        if same and (old or not stale):
            return [text] if old or near else self._under_root(text, sign, body, key)
        return self._renumbered(sign, body, key, old) or self._spelled_out(text, key, old)

    def _under_root(self, text: str, sign: str, body: str, key: str) -> list[str]:
        """Leave out what a pattern begins with, such as the name of a model around this one, and try what follows."""
        root = re.match(r"(?!layers)[A-Za-z_]\w*(\\?\.)(?=\w)", body)
        if not root or not re.search(rf"\b{self.word}\\?\.", body):
            return [text]
        rest = sign + body[root.end() :]
        found = self._pattern(rest, key)
        if found == [rest]:
            return [text]
        return [sign + root[0] + (f"(?:{new})" if "|" in new else new) for new in (f[len(sign) :] for f in found)]

    def _renumbered(self, sign: str, body: str, key: str, old: dict[_Block, dict[int, list[str]]]) -> list[str]:
        """The same pattern with other numbers in it, if that says exactly the same; else nothing."""
        literal = re.compile(rf"({self.word}\\?\.)(\d+)(?!\d)")
        numbers = {int(found[2]) for found in literal.finditer(body)}
        if len(numbers) != 1:
            return []
        (number,) = numbers
        targets = {block.ids.index(number) for block in old if number in block.ids}
        if len(targets) != 1:
            return []
        text = sign + literal.sub(rf"\g<1>{targets.pop()}", body)
        _, changed, matches = self._compiled(text, key)
        for block in dict.fromkeys((*self._near(body), *self._near(changed))):
            for new, part, _, after in block.renamed():
                if bool(matches(after)) != (part in old.get(block, {}).get(new, ())):
                    return []
        before = self._compiled(sign + body, key)[2]
        return [text] if all(bool(before(name)) == bool(matches(name)) for name in self._others) else []

    def _spelled_out(self, text: str, key: str, old: dict[_Block, dict[int, list[str]]]) -> list[str]:
        sign, body, matches = self._compiled(text, key)
        others = [name for name in self._others if matches(name)]
        if not matches.regex:
            if others:
                raise self._error(key, text, "names other modules too, beside single experts")
            return [name for block, numbers in old.items() for name in _globs(block, numbers)]
        choices = [_alternative(block, numbers) for block, numbers in old.items()]
        numbered = rf".*\b{self.word}\.\d"
        choices += [re.escape(name) + "$" for name in others if re.match(numbered, name)]
        if not all(re.match(numbered, name) for name in others):
            choices.append(rf"(?!{numbered})(?:{body})")
        return [sign + "|".join(choices)] if choices else []

    def _compiled(self, text: str, key: str) -> tuple[str, str, _Matches]:
        """Sign, pattern and matcher of an entry."""
        sign = next((s for s in ("re:", "+:", "-:") if text.startswith(s)), "")
        body = text[len(sign) :]
        regex = key == "dynamic" or bool(sign) or _looks_regex(body)
        try:
            return (
                sign,
                body,
                _Matches(re.compile(body if regex else f"{translate(body)}|{translate(body + '.*')}"), regex),
            )
        except re.error as error:
            raise self._error(key, text, f"is no valid regular expression ({error})") from None

    def _near(self, body: str) -> list[_Block]:
        """The blocks whose experts a pattern may match, by what it begins with."""
        start = re.match(r"\^?((?:\\\.|[\w.-])*)", body)
        assert start
        literal = start[1].replace("\\.", ".")
        if "|" in body or "(?" in body:
            return self._all
        if start.end() < len(body):  # what follows may repeat or drop the last character
            literal = literal[:-1]
        wild = re.compile(re.escape(literal).replace(r"\.", "."))
        return [
            b for b in self._all if wild.match(b.prefix) or re.match(re.escape(b.prefix).replace(r"\.", "."), literal)
        ]

    @cached_property
    def _all(self) -> list[_Block]:
        parts: dict[str, dict[str, None]] = {prefix: {} for prefix in self.geometry.blocks}
        tails: dict[str, dict[int, None]] = {prefix: {} for prefix in self.geometry.blocks}
        for role in self.geometry.roles.values():
            if isinstance(role, ExpertTensor):
                parts[role.block][role.part.rpartition(".")[0]] = None
                if role.expert >= self._experts:  # behind the routed ones, always kept
                    tails[role.block][role.expert] = None
        ids = {prefix: self.geometry.numbers(block, self.kept) for prefix, block in self.geometry.blocks.items()}
        fused = ("gate_proj", "up_proj", "down_proj")
        return [
            _Block(block.expert_prefix, (*ids[prefix], *sorted(tails[prefix])), tuple(parts[prefix]) or fused)
            for prefix, block in self.geometry.blocks.items()
        ]

    @cached_property
    def _foreign(self) -> set[str]:
        """What stands before the numbers of experts that are not pruned, such as those of a second model."""
        return {found["before"] for name in self._others if (found := self._numbered.fullmatch(name))}

    @cached_property
    def _others(self) -> list[str]:
        """Modules that are no expert's."""
        names = (n for n, role in self.geometry.roles.items() if not isinstance(role, ExpertTensor))
        return list(dict.fromkeys(name.rpartition(".")[0] for name in names))

    def _error(self, key: str, text: str, why: str) -> ConfigConflictError:
        return ConfigConflictError(
            f"{self.file}: {key}: {text!r} {why}",
            "replace the entry by one that names full modules or covers all experts",
        )


@dataclass(frozen=True)
class _Matches:
    pattern: re.Pattern[str]
    regex: bool

    def __call__(self, name: str) -> object:
        return self.pattern.match(name)


def _is_pattern(text: str) -> bool:
    return text.startswith("re:") or any(c in text for c in "*?[") or _looks_regex(text)


def _looks_regex(text: str) -> bool:
    return text.startswith((".*", "^")) or any(c in text for c in "\\(|$")


def _is_blind(body: str, regex: bool) -> bool:
    """True if a pattern cannot tell one number from another: it has neither digits nor single-character wildcards."""
    if regex:
        body = re.sub(r"\\[.\-_]", "_", body).replace(".*", "")
        return not re.search(r"[\d\\\[.{]", body)
    return not re.search(r"[\d?\[]", body)


def _globs(block: _Block, numbers: Mapping[int, Sequence[str]]) -> Iterator[str]:
    for number, parts in numbers.items():
        if len(parts) == len(block.parts):
            yield f"{block.prefix}{number}.*"
        else:
            yield from (f"{block.prefix}{number}.{part}" for part in parts)


def _alternative(block: _Block, numbers: Mapping[int, Sequence[str]]) -> str:
    """A regex that matches these modules of a block and no other."""
    by_parts: dict[tuple[str, ...], list[str]] = {}
    for number, parts in numbers.items():
        by_parts.setdefault(tuple(parts), []).append(str(number))
    choices = []
    for names, ids in by_parts.items():
        end = r"\." if len(names) == len(block.parts) else rf"\.{_either(map(re.escape, names))}$"
        choices.append(_either(ids) + end)
    return re.escape(block.prefix) + _either(choices)


def _either(choices: Iterator[str] | Sequence[str]) -> str:
    options = list(choices)
    return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"


def _changes(old: Any, new: Any, path: tuple[str, ...]) -> Iterator[Edit]:
    """Yield what differs, members of an object one by one where it keeps its keys."""
    if isinstance(old, dict) and isinstance(new, dict) and list(old) == list(new):
        for key in old:
            yield from _changes(old[key], new[key], (*path, key))
    elif old != new:
        yield Edit(path, old, new)
