"""Models as lm-eval wants them: streamed layer by layer, whole in transformers or vLLM, or served behind a URL.

Imported only with lm-eval installed. A streamed model scores given text and writes none.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

from expertcut.calibrate import hf
from expertcut.calibrate.run import resolve_dtype
from expertcut.calibrate.tokenizer import load_backend
from expertcut.calibrate.transfer import resolve_device
from expertcut.checkpoint import Checkpoint
from expertcut.errors import RuntimeLintError
from expertcut.measure.continuations import Predicted, Request
from expertcut.measure.load import Target, api_key, served_name
from expertcut.measure.quality import BASE
from expertcut.runtimes.transformers import from_pretrained

BATCH = 16
"""Sequences that transformers runs at a time on a CPU; on a GPU lm-eval finds out how many fit."""
CONCURRENT = 16
"""Requests that a server has at a time."""
_ALL = 1 << 30


class StreamedLM(HFLM):  # type: ignore[misc]
    """A checkpoint and plans for it; `name` says which of them answers. Text is cut into tokens as by `HFLM`."""

    def __init__(
        self, checkpoint: Checkpoint, limit: int | None, predict: Callable[[Sequence[Request]], Predicted]
    ) -> None:  # fmt: skip
        stand_in = SimpleNamespace(config=hf.load_config(checkpoint), device=torch.device("cpu"))
        super().__init__(stand_in, tokenizer=load_backend(checkpoint.path), max_length=limit, batch_size=_ALL)
        self.name = BASE
        self._predict = predict
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[str, tuple[float, bool]]] = {}

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of every continuation and whether it is the greedy one; all models are asked at once."""
        pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        if new:
            found = self._predict(new)
            for i, pair in enumerate(new):
                self._known[pair] = {
                    name: (float(found.logprob[n, i]), bool(found.greedy[n, i])) for n, name in enumerate(found.names)
                }
        return [self._known[pair][self.name] for pair in pairs]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Tasks that generate are refused before they get here."""
        raise NotImplementedError


def in_transformers(checkpoint: Checkpoint, device: str, dtype: str, limit: int | None) -> Any:
    """Load a whole checkpoint in transformers; `auto` is all GPUs there are, else the CPU."""
    where = resolve_device(device)
    kwargs: dict[str, Any] = {"dtype": resolve_dtype(dtype, where, checkpoint)}
    spread = device == "auto" and where.type == "cuda"
    model: Any = from_pretrained(checkpoint.path, **kwargs, **({"device_map": "auto"} if spread else {}))
    return HFLM(
        model if spread else model.to(where), tokenizer=load_backend(checkpoint.path), max_length=limit,
        batch_size="auto" if where.type == "cuda" else BATCH,
    )  # fmt: skip


def in_vllm(checkpoint: Checkpoint, dtype: str) -> Any:
    """Load a checkpoint in the vLLM that is installed here, as the distribution `vllm`, which lm-eval looks for.

    Raises:
        RuntimeLintError: none is.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeLintError(
            "vLLM is not installed in this environment",
            "install expertcut[eval] where it is; or run vllm serve there, and here --engine http://localhost:8000/v1",
        ) from None
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM(str(checkpoint.path), dtype=dtype)


def served(url: str, checkpoint: Checkpoint, limit: int | None) -> Any:
    """Ask a server that speaks OpenAI's completions protocol; it serves the checkpoint.

    Raises:
        RuntimeLintError: it does not answer.
        UsageError: it serves several models, none of that name.
    """
    base = url.rstrip("/")
    lm = LocalCompletionsAPI(
        f"{base}/completions", tokenizer_backend=None, model=served_name(Target(base, checkpoint.name, key=api_key())),
        num_concurrent=CONCURRENT, max_length=limit or 2048,
    )  # fmt: skip
    # It would load the tokenizer by the checkpoint's model type, which may be one of ours.
    lm.tokenizer, lm.tokenizer_backend, lm.tokenized_requests = load_backend(checkpoint.path), "huggingface", True
    return lm
