"""Documents from a dataset of the Hub, streamed: only what is asked for is downloaded.

Rows become text by a field, by a sandboxed jinja2 template, or as a chat in the model's own template.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import jinja2
import numpy as np
from jinja2.sandbox import SandboxedEnvironment

from expertcut.calibrate.recipes import HubSource
from expertcut.calibrate.tokenizer import Tokenizer
from expertcut.errors import DataError, HubError

# Files of a dataset that are read at the same time, and rows held back, of which the next is drawn at random.
SHARDS = 4
BUFFER = 256
OFFLINE_HINT = "without the Hub: --calibration builtin, or local .txt, .jsonl or .parquet files"

_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}

Row = Mapping[str, Any]
T = TypeVar("T")


def hub_texts(source: HubSource, tokenizer: Tokenizer, seed: int, warnings: list[str]) -> Iterator[tuple[str, bool]]:
    """Yield (text, rendered by a chat template) row by row, files and rows in an order that depends on the seed.

    Rows that are empty, or that the chat template refuses, are left out; `warnings` says of the latter how many.
    Raises: HubError if the dataset cannot be reached, DataError if it lacks the split, the config or a field.
    """
    to_text = _reader(source, tokenizer, warnings)
    refused = 0
    for row in _rows(source, seed):
        try:
            text, rendered = to_text(row)
        except (jinja2.TemplateError, TypeError) as error:
            if source.messages is None:
                raise DataError(f"{_place(source)}: the template fails: {error}") from error
            refused += 1
            warnings[:] = [f"{_place(source)}: {refused} chats left out, refused by the chat template: {error}"]
            continue
        if text.strip():
            yield text, rendered


def _rows(source: HubSource, seed: int) -> Iterator[Row]:
    from datasets import load_dataset  # type: ignore[import-untyped]
    from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
    from huggingface_hub import errors

    # The HTTP library's own base class; which library that is depends on the version of huggingface_hub.
    http_error: type[Exception] = getattr(errors, "HTTPError", errors.HfHubHTTPError)
    try:
        rows = load_dataset(source.dataset, source.config, split=source.split, revision=source.revision, streaming=True)
        yield from shuffled(_interleaved(rows, seed), seed)
    except FileNotFoundError as error:
        raise HubError(f"{_place(source)}: not found: {_first_line(error)}", hint=OFFLINE_HINT) from error
    except (OSError, http_error) as error:
        raise HubError(f"{_place(source)}: {_first_line(error)}", hint=OFFLINE_HINT) from error
    except (ValueError, DatasetsError) as error:
        raise DataError(f"{_place(source)}: {_first_line(error)}") from error


def _interleaved(rows: Any, seed: int) -> Iterator[Row]:
    """Take one row in turn from each of `SHARDS` files, the files in random order."""
    # The library's own shuffle does likewise, but sleeps for seconds whenever it ends.
    order = [int(i) for i in np.random.default_rng(seed).permutation(rows.num_shards)]
    waiting = (iter(rows.shard(num_shards=rows.num_shards, index=i)) for i in order)
    active = deque(islice(waiting, SHARDS))
    while active:
        shard = active.popleft()
        row = next(shard, None)
        if row is not None:
            yield row
            active.append(shard)
        else:
            active.extend(islice(waiting, 1))


def shuffled(rows: Iterable[T], seed: int, buffer: int = BUFFER) -> Iterator[T]:
    """Yield every row once, each drawn at random from the `buffer` rows that come next."""
    rng = np.random.default_rng(seed)
    held: list[T] = []
    for row in rows:
        held.append(row)
        if len(held) == buffer:
            i = int(rng.integers(buffer))
            held[i], held[-1] = held[-1], held[i]
            yield held.pop()
    yield from (held[i] for i in rng.permutation(len(held)))


def _reader(source: HubSource, tokenizer: Tokenizer, warnings: list[str]) -> Callable[[Row], tuple[str, bool]]:
    if source.field is not None:
        return lambda row: (_field(row, str(source.field), source), False)
    if source.template is not None:
        try:
            template = SandboxedEnvironment(undefined=jinja2.StrictUndefined).from_string(source.template)
        except jinja2.TemplateError as error:
            raise DataError(f"{_place(source)}: the template is not jinja2: {error}") from error
        return lambda row: (template.render(**row), False)
    render = source.chat_template and tokenizer.has_chat_template
    if source.chat_template and not render:
        warnings.append(f"{_place(source)}: the tokenizer has no chat template; messages are joined as plain text")
    return lambda row: _chat(_messages(row, source), tokenizer if render else None)


def _chat(messages: list[dict[str, Any]], tokenizer: Tokenizer | None) -> tuple[str, bool]:
    if tokenizer is not None and messages:
        return tokenizer.render(messages), True
    return "\n\n".join(message["content"] for message in messages if message["content"]), False


def _messages(row: Row, source: HubSource) -> list[dict[str, Any]]:
    """Bring a row's chat into the form role, content (a string)."""
    if isinstance(source.messages, dict):
        return [{"role": role, "content": _field(row, name, source)} for role, name in source.messages.items()]
    name = str(source.messages)
    chat = _cell(row, name, source) or []
    if isinstance(chat, str):
        try:
            chat = json.loads(chat)
        except json.JSONDecodeError as error:
            raise DataError(f"{_place(source)}: field {name}: found a string that is not JSON") from error
    if not isinstance(chat, list) or not all(isinstance(turn, dict) for turn in chat):
        raise DataError(f"{_place(source)}: field {name}: found {type(chat).__name__}, expected a list of messages")
    return [_message(turn, source) for turn in chat]


def _message(turn: dict[str, Any], source: HubSource) -> dict[str, Any]:
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if not isinstance(role, str):
        raise DataError(f"{_place(source)}: found a message with {', '.join(turn)}, expected role and content")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    message: dict[str, Any] = {"role": _ROLES.get(role, role), "content": content or ""}
    if turn.get("tool_calls"):
        message["tool_calls"] = turn["tool_calls"]
    return message


def _field(row: Row, name: str, source: HubSource) -> str:
    value = _cell(row, name, source)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{_place(source)}: field {name}: found {type(value).__name__}, expected a string")
    return value or ""


def _cell(row: Row, name: str, source: HubSource) -> Any:
    if name not in row:
        raise DataError(f"{_place(source)}: found fields {', '.join(row)}, expected {name}")
    return row[name]


def _place(source: HubSource) -> str:
    return "/".join(("dataset " + source.dataset, *filter(None, (source.config, source.split))))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
