"""A quantization config in, what it must say of the modules that are left, under their new names, out. Pure.

Invariant: every module that survives is decided on as before. Entries are module paths (`….experts.5.up_proj`, whole or
from some dot on; `….experts.5` names all below) or patterns. An entry that holds for the new numbers as it is stays as
it is; otherwise its numbers are replaced where that is exact, or it is spelled out; entries that name nothing but
dropped experts or layers are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from expertcut.errors import ConfigConflictError
from expertcut.model import Edit, Geometry
from expertcut.rewrite.modules import Block, Modules
from expertcut.rewrite.patterns import Pattern, alternative, globs, is_pattern, plain

KEYS = ("quantization_config", "compression_config")
COMPANIONS = ("hf_quant_config.json", "quantize_config.json", "quantization_config.json", "quant_config.json")
"""Files beside the weights in which quantisers repeat their config."""
RELATIVE = "modules_in_block_to_quantize"
"""GPTQ's key whose entries name modules below a decoder layer, the same in every layer."""

Entry = tuple[str, Any]
"""An entry and its value; the entries of a list have none."""
Kept = Mapping[str, Sequence[int]]
"""Kept ids by block."""


def quantization_edits(
    config: Mapping[str, Any], geometry: Geometry, kept: Kept, dropped: Collection[str] = ()
) -> list[Edit]:  # fmt: skip
    """Return the values below `quantization_config` that change; `dropped` names tensors that go altogether.

    Raises:
        ConfigConflictError: an entry cannot be rewritten exactly, naming it.
    """
    rewriter = _Rewriter(Modules(geometry, kept, dropped))
    edits: list[Edit] = []
    for path in dict.fromkeys(((), geometry.family.root)):
        scope: Any = config
        for key in path:
            scope = scope.get(key) or {}
        for key in KEYS:
            if scope.get(key):
                edits += _changes(scope[key], rewriter.value(scope[key], key), (*path, key))
    return edits


def rewrite_document(
    document: Any, name: str, geometry: Geometry, kept: Kept, dropped: Collection[str] = ()
) -> Any:  # fmt: skip
    """Return a companion's parsed JSON with its entries rewritten; `name` is the file that errors name.

    Raises:
        ConfigConflictError: an entry cannot be rewritten exactly, naming it.
    """
    return _Rewriter(Modules(geometry, kept, dropped), name).value(document, "")


class _Rewriter:
    def __init__(self, modules: Modules, file: str = "config.json") -> None:
        self.modules, self.file = modules, file

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
            if plain(text) in self.modules.gone:
                continue
            pattern = key == "dynamic" or is_pattern(text)
            named = None if pattern else self.modules.numbered.fullmatch(text)
            if named and self.modules.meant(named["before"]):
                templates.setdefault((named["before"], named["after"]), []).append((place, int(named["id"]), value))
            elif pattern:
                placed += [(place, (new, value)) for new in self._pattern(text, key)]
            else:
                placed.append((place, (text, value)))
        for (before, after), found in templates.items():
            placed += self._paths(before, after, found, key)
        return [entry for _, entry in sorted(placed, key=lambda item: item[0])]

    def _paths(
        self, before: str, after: str, found: Sequence[tuple[int, int, Any]], key: str
    ) -> Iterator[tuple[int, Entry]]:
        """Renumber the entries that are alike but for the expert; in every block that they mean."""
        blocks = self.modules.meant(before)
        if blocks[0].prefix != before and any(name.endswith("." + before) for name in self.modules.foreign):
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
                for end in _ends(blocks[0], after):
                    yield spot, (f"{before}{number}{end}", value)
            return
        if key == RELATIVE:
            text = f"{before}{found[0][1]}{after}"
            raise self._error(key, text, "means layers whose experts are numbered differently by the plan")
        for block, one in zip(blocks, renumbered, strict=True):
            for number, (place, value) in sorted(one.items()):
                for end in _ends(block, after):
                    yield place, (f"{block.prefix}{number}{end}", value)

    def _pattern(self, text: str, key: str) -> list[str]:
        """Return what a glob or regex becomes."""
        pattern = self._parsed(text, key)
        if pattern.blind:
            return [text]
        old: dict[Block, dict[int, list[str]]] = {}
        same, stale, near = True, False, self.modules.near(pattern.body)
        for block in near:
            for number, part, before, after in block.renamed():
                hit = pattern.matches(before)
                same = same and hit == pattern.matches(after)
                if hit:
                    old.setdefault(block, {}).setdefault(number, []).append(part)
            stale = stale or (not old and any(map(pattern.matches, block.dropped(self.modules.experts))))
        if same and (old or not stale):
            return [text] if old or near else self._under_root(text, pattern, key)
        return self._renumbered(pattern, key, old) or self._spelled_out(text, pattern, key, old)

    def _under_root(self, text: str, pattern: Pattern, key: str) -> list[str]:
        """Leave out what a pattern begins with, such as the name of a model around this one, and try what follows."""
        sign, body = pattern.sign, pattern.body
        root = re.match(r"(?!layers)[A-Za-z_]\w*(\\?\.)(?=\w)", body)
        if not root or not re.search(rf"\b{self.modules.word}\\?\.", body):
            return [text]
        rest = sign + body[root.end() :]
        found = self._pattern(rest, key)
        if found == [rest]:
            return [text]
        return [sign + root[0] + (f"(?:{new})" if "|" in new else new) for new in (f[len(sign) :] for f in found)]

    def _renumbered(self, pattern: Pattern, key: str, old: dict[Block, dict[int, list[str]]]) -> list[str]:
        """The same pattern with other numbers in it, if that says exactly the same; else nothing."""
        literal = re.compile(rf"({self.modules.word}\\?\.)(\d+)(?!\d)")
        numbers = {int(found[2]) for found in literal.finditer(pattern.body)}
        if len(numbers) != 1:
            return []
        (number,) = numbers
        targets = {block.ids.index(number) for block in old if number in block.ids}
        if len(targets) != 1:
            return []
        text = pattern.sign + literal.sub(rf"\g<1>{targets.pop()}", pattern.body)
        changed = self._parsed(text, key)
        for block in dict.fromkeys((*self.modules.near(pattern.body), *self.modules.near(changed.body))):
            for new, part, _, after in block.renamed():
                if changed.matches(after) != (part in old.get(block, {}).get(new, ())):
                    return []
        alike = all(pattern.matches(name) == changed.matches(name) for name in self.modules.others)
        return [text] if alike else []

    def _spelled_out(
        self, text: str, pattern: Pattern, key: str, old: dict[Block, dict[int, list[str]]]
    ) -> list[str]:  # fmt: skip
        others = [name for name in self.modules.others if pattern.matches(name)]
        if not pattern.regex:
            if others:
                raise self._error(key, text, "names other modules too, beside single experts")
            return [name for block, numbers in old.items() for name in globs(block, numbers)]
        choices = [alternative(block, numbers) for block, numbers in old.items()]
        numbered = rf".*\b{self.modules.word}\.\d"
        choices += [re.escape(name) + "$" for name in others if re.match(numbered, name)]
        if not all(re.match(numbered, name) for name in others):
            choices.append(rf"(?!{numbered})(?:{pattern.body})")
        return [pattern.sign + "|".join(choices)] if choices else []

    def _parsed(self, text: str, key: str) -> Pattern:
        try:
            return Pattern.parse(text, regex=key == "dynamic")
        except re.error as error:
            raise self._error(key, text, f"is no valid regular expression ({error})") from None

    def _error(self, key: str, text: str, why: str) -> ConfigConflictError:
        return ConfigConflictError(
            f"{self.file}: {key}: {text!r} {why}",
            "replace the entry by one that names full modules or covers all experts",
        )


def _ends(block: Block, after: str) -> list[str]:
    """Spell out an expert's modules where runtimes might take `experts.1` for the beginning of `experts.10`."""
    ambiguous = not after and len(block.ids) > 10 and block.parts
    return [f".{part}" for part in block.parts] if ambiguous else [after]


def _changes(old: Any, new: Any, path: tuple[str, ...]) -> Iterator[Edit]:
    """Yield what differs, members of an object one by one where it keeps its keys."""
    if isinstance(old, dict) and isinstance(new, dict) and list(old) == list(new):
        for key in old:
            yield from _changes(old[key], new[key], (*path, key))
    elif old != new:
        yield Edit(path, old, new)
