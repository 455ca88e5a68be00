"""Text sampled from the model itself, the calibration that needs no data at all.

The whole model is loaded (there is no streaming here: each new token reads every layer), so it must fit into the
memory of the device. torch and transformers are imported only when text is sampled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from expertcut.calibrate.tokenizer import Ids, Tokenizer
from expertcut.errors import DataError

# Sequences sampled at a time.
BATCH = 32


def sample_self(
    model_dir: Path,
    tokenizer: Tokenizer,
    *,
    tokens: int,
    seq_len: int,
    seed: int,
    device: str = "auto",
    dtype: str | None = None,
) -> list[Ids]:
    """Sample about `tokens` tokens at temperature 1, from the whole distribution.

    Each sequence starts with the tokenizer's first token (BOS, else EOS, else a random token) and goes on behind an EOS
    with the next document, so all are exactly `seq_len` long, save the last, which is cut so that the sum is `tokens`.
    The same seed gives the same text on the same machine and libraries.

    dtype: a torch dtype's name; default: the checkpoint's own, on the CPU float32.
    Returns: arrays (T,) int64. Raises: DataError if the model does not load as a causal language model.
    """
    import torch

    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model = _load(model_dir, dtype or ("float32" if where == "cpu" else "auto")).to(where)
    rows = -(-tokens // seq_len)
    sampled: list[Ids] = []
    with torch.random.fork_rng(devices=[where] if where.startswith("cuda") else []), torch.inference_mode():
        torch.manual_seed(seed)
        for first in range(0, rows, BATCH):
            start = _first_tokens(model, tokenizer, min(BATCH, rows - first))
            batch = model.generate(start.to(where), attention_mask=torch.ones_like(start).to(where), **_free(seq_len))
            sampled += list(batch.cpu().numpy().astype(np.int64))
    sampled[-1] = sampled[-1][: tokens - (rows - 1) * seq_len]
    return sampled


def _load(model_dir: Path, dtype: str) -> Any:
    import transformers
    from transformers.utils import logging

    hf: Any = transformers
    bars: Any = logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model = hf.AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{model_dir}: cannot sample from the model: {reason}", hint="use --calibration general or builtin"
        ) from error
    finally:
        if shown:
            bars.enable_progress_bar()
    # The checkpoint's own settings (top-k, penalties, stop tokens) would narrow the distribution.
    model.generation_config = hf.GenerationConfig(pad_token_id=0)
    return model.eval()


def _free(seq_len: int) -> dict[str, Any]:
    return {
        "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "max_length": seq_len, "use_cache": True,
    }  # fmt: skip


def _first_tokens(model: Any, tokenizer: Tokenizer, rows: int) -> Any:
    import torch

    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if start is not None:
        return torch.full((rows, 1), start, dtype=torch.long)
    return torch.randint(model.get_input_embeddings().num_embeddings, (rows, 1))
