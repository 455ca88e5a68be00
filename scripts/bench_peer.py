"""llm-compressor's REAP on one checkpoint: load, calibrate, prune, save. Runs in `.venv-llmcompressor`.

bench_peer.py MODEL TOKENS.npy OUT EXPERTS DTYPE routed|all
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.pruning import REAPPruningModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

# Loading lists every module of transformers, its lazy aliases too, and some of those need torchvision.
for name, module in list(sys.modules.items()):
    if name.startswith("transformers.") and getattr(module, "__file__", "") is None:
        del sys.modules[name]


def main(source: str, tokens: str, out: str, experts: str, dtype: str, mode: str) -> None:
    start = time.monotonic()
    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    loaded = time.monotonic()
    ids = torch.from_numpy(np.load(tokens))
    # Its tracing drops the causal mask unless the caller brings one: tokens would attend to later ones.
    seq_len = ids.shape[1]
    mask = torch.full((seq_len, seq_len), torch.finfo(model.dtype).min, dtype=model.dtype).triu(1)[None, None]
    rows = [{"input_ids": row[None], "attention_mask": mask} for row in ids]
    oneshot(
        model=model,
        dataset=DataLoader(rows, batch_size=None),  # type: ignore[arg-type]
        recipe=REAPPruningModifier(sparsity=1 - int(experts) / model.config.num_experts),
        moe_calibrate_all_experts=mode == "all",
    )
    calibrated = time.monotonic()
    model.save_pretrained(out)
    saved = time.monotonic()
    print(json.dumps({"load": loaded - start, "calibrate": calibrated - loaded, "save": saved - calibrated}))


if __name__ == "__main__":
    main(*sys.argv[1:])
