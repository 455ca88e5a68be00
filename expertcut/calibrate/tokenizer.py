"""The checkpoint's own tokenizer, reduced to what calibration needs: text → ids, the end of a document, a fingerprint.

transformers is imported only when a tokenizer is loaded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertcut.checkpoint.jsonio import load_json
from expertcut.errors import CheckpointError
from expertcut.model.uneven import is_uneven, stock_config

Ids = NDArray[np.int64]

# Whichever of these a checkpoint has make its tokenizer, in this order of preference.
_FILES = (("tokenizer.json",), ("tokenizer.model", "tiktoken.model", "vocab.json", "merges.txt", "vocab.txt"))


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer."""

    fingerprint: str
    """sha256 of `tokenizer.json`, or of the vocabulary files where there is none."""
    bos_id: int | None
    eos_id: int | None
    has_chat_template: bool
    _backend: Any

    def encode(self, text: str, *, special: bool = True) -> Ids:
        """Tokenise one document. Returns (T,) int64.

        It begins as the tokenizer begins a text (`special=False`: the text brings its own special tokens, as rendered
        chats do) and ends with the end-of-sequence token, if there is one.
        """
        ids = self._ids(text, special)
        if self.eos_id is not None and ids and ids[-1] != self.eos_id:
            ids = [*ids, self.eos_id]
        return np.asarray(ids, dtype=np.int64)

    def begin(self, text: str) -> Ids:
        """Tokenise the beginning of a document, for the model to go on from. Returns (T,) int64."""
        return np.asarray(self._ids(text, True), dtype=np.int64)

    def decode(self, ids: Ids) -> str:
        """Turn ids (T,) back into text."""
        return str(self._backend.decode(ids.tolist()))

    def render(self, messages: list[dict[str, Any]]) -> str:
        """Render a chat with the model's template; raises what the template raises."""
        return str(self._backend.apply_chat_template(messages, tokenize=False))

    def _ids(self, text: str, special: bool) -> list[int]:
        found = self._backend(text, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return list(found["input_ids"])


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer of a local checkpoint directory. Raises: CheckpointError if it has none that loads."""
    fingerprint = tokenizer_fingerprint(path)
    backend = load_backend(path, trust_remote_code=trust_remote_code)
    return Tokenizer(
        fingerprint=fingerprint,
        bos_id=backend.bos_token_id,
        eos_id=backend.eos_token_id,
        has_chat_template=bool(getattr(backend, "chat_template", None)),
        _backend=backend,
    )


def load_backend(path: Path, *, trust_remote_code: bool = False) -> Any:
    """Load transformers' own tokenizer of a local checkpoint directory. Raises: CheckpointError if it does not load."""
    from transformers import AutoConfig, AutoTokenizer

    config = path / "config.json"
    raw = load_json(config) if config.is_file() else {}
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if is_uneven(raw):  # a model type of ours, which transformers does not know
        kwargs["config"] = AutoConfig.for_model(**stock_config(raw))
    try:
        return AutoTokenizer.from_pretrained(path, **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path}: the tokenizer does not load: {reason[0]}") from error


def tokenizer_fingerprint(path: Path) -> str:
    """Hash the files that make a checkpoint's tokenizer: sha256 hex. Raises: CheckpointError if there are none."""
    for names in _FILES:
        files = [path / name for name in names if (path / name).is_file()]
        if files:
            digest = hashlib.sha256()
            for file in files:
                digest.update(file.read_bytes())
            return digest.hexdigest()
    raise CheckpointError(
        f"{path}: no tokenizer: found none of {', '.join(name for names in _FILES for name in names)}",
        hint="copy the original model's tokenizer files into the folder",
    )
