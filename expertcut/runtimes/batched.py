"""A checkpoint in; transformers' own generation over whole batches out: the floor that an engine is seen against.

Everything runs in this process. All requests of a batch begin and end together, so their times are the batch's.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from expertcut.calibrate.transfer import resolve_device
from expertcut.checkpoint import Checkpoint
from expertcut.measure.completions import Reply
from expertcut.measure.rounds import Outcome
from expertcut.model import Edit
from expertcut.rewrite.config import config_bytes, edit_config
from expertcut.runtimes.machine import Watch, gpus
from expertcut.runtimes.transformers import from_pretrained


class Batched:
    """A model in this process that answers a batch at a time."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def run(self, prompts: Sequence[Sequence[int]], output_len: int, clients: int) -> Outcome:
        """Answer the prompts, `clients` at a time."""
        replies: list[Reply] = []
        with Watch(os.getpid()) as watch:
            for start in range(0, len(prompts), clients):
                replies += self._batch(prompts[start : start + clients], output_len)
        used = [used for _, used in gpus()]
        return Outcome(replies, memory=watch.peak, gpu_memory=sum(used) if used else None)

    def _batch(self, prompts: Sequence[Sequence[int]], output_len: int) -> list[Reply]:
        longest, device = max(map(len, prompts)), self.model.device
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        clock = _Clock(device)
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=output_len, min_new_tokens=output_len, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            pad_token_id=0,
        )  # fmt: skip
        sent = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids, attention_mask=mask, generation_config=config, stopping_criteria=StoppingCriteriaList([clock])
            )
        first, last = clock.times[0], clock.times[-1]
        return [Reply(sent, first, last, len(prompt), len(clock.times)) for prompt in prompts]


class _Clock(StoppingCriteria):  # type: ignore[no-untyped-call,unused-ignore]
    """Stops nothing; notes when every token is there."""

    def __init__(self, device: torch.device) -> None:
        self.times: list[float] = []
        self._cuda = device.type == "cuda"

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        if self._cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


@contextmanager
def batched(checkpoint: Checkpoint, edits: Sequence[Edit]) -> Iterator[Batched]:
    """Load a checkpoint, with values of its config edited, in the dtype that it is stored in: on the GPU or the CPU."""
    device = resolve_device("auto")
    with _edited(checkpoint, edits) as folder:
        model: Any = from_pretrained(folder, dtype="auto")
    yield Batched(model.to(device).eval())


@contextmanager
def _edited(checkpoint: Checkpoint, edits: Sequence[Edit]) -> Iterator[Path]:
    """A folder that looks like the checkpoint but for its config."""
    with tempfile.TemporaryDirectory(prefix="expertcut-") as name:
        for path in checkpoint.path.resolve().iterdir():
            (Path(name) / path.name).symlink_to(path)
        config = Path(name) / "config.json"
        config.unlink()
        config.write_bytes(config_bytes(edit_config(checkpoint.config, edits)))
        yield Path(name)
