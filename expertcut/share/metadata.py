"""The YAML head of a model card: what still holds of the source's, and what the cut adds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from expertcut.errors import UsageError

RELATION = "finetune"
"""Of the four relations that the Hub knows (adapter, merge, quantized, finetune) the one for a model with other
weights in the same format; by itself the Hub would take pruned FP8 weights for a quantisation of the base."""
KEPT = (
    "license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "datasets", "tags",
    "extra_gated_prompt", "extra_gated_fields",
)  # fmt: skip
"""Fields of the source's card that hold for any part of it; figures (`model-index`) and pictures do not."""
_HEAD = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


def source_metadata(folder: Path) -> dict[str, Any]:
    """Return what still holds of the card that lies in a checkpoint; empty if there is none that can be read.

    Scalars are strings as they stand: the language `no` is Norwegian.
    """
    try:
        head = _HEAD.match((folder / "README.md").read_text(encoding="utf-8"))
        found = yaml.load(head[1], Loader=yaml.BaseLoader) if head else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return {key: found[key] for key in KEPT if found.get(key)} if isinstance(found, dict) else {}


def metadata(
    source: Mapping[str, Any], *, base: str | None, licence: str | None, tags: Iterable[str], datasets: Iterable[str],
    text: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return the fields of the card, in the order in which they are written.

    Raises:
        UsageError: another licence is asked for than the source's card names.
    """
    if licence and source.get("license") and source["license"] != licence:
        raise UsageError(
            f"--license {licence}: the source's card says {source['license']}", "leave it out: the source's is copied"
        )
    fields: dict[str, Any] = {
        "base_model": base, "base_model_relation": RELATION if base else None,
        "library_name": source.get("library_name", "transformers"),
        "pipeline_tag": source.get("pipeline_tag", "text-generation" if text else None),
        "license": source.get("license") or licence,
        **{key: source.get(key) for key in KEPT if key.startswith(("license_", "extra_")) or key == "language"},
        "datasets": _merged(source.get("datasets"), datasets), "tags": _merged(tags, source.get("tags")),
    }  # fmt: skip
    return {key: value for key, value in fields.items() if value}


def head(fields: Mapping[str, Any]) -> str:
    """Return the YAML between the lines of dashes."""
    return yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, width=10_000)


def _merged(*lists: Iterable[str] | str | None) -> list[str]:
    """Each once, in order; a card may have one where it could have several."""
    return list(dict.fromkeys(item for one in lists for item in ([one] if isinstance(one, str) else one or ())))
