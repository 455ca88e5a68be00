"""Texts with what follows them in; how a checkpoint, and it under plans, predicts that out. Nothing is generated.

Every weight is read once for any number of requests and plans, as in a what-if pass, as long as the hidden states fit
in `HIDDEN_BYTES`; beyond that, once for each portion that does. A token's prediction depends on nothing behind it. So a
request whose text begins another's rides along with that: the choices A to D behind one question, or all problems of a
list one below the other, are one sequence.

Shapes: N models, R requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from expertcut.calibrate.batches import Batch, make_batches
from expertcut.calibrate.passage import Advance, Notify, Passage
from expertcut.calibrate.run import ProfileOptions, open_stream
from expertcut.calibrate.transfer import fetch
from expertcut.checkpoint.types import Checkpoint
from expertcut.choose.plan import Plan
from expertcut.errors import DataError
from expertcut.measure.intervals import Floats
from expertcut.measure.quality import BASE
from expertcut.measure.whatif import check_plans, run_plans
from expertcut.model import Geometry
from expertcut.model.summary import max_positions

HIDDEN_BYTES = 4 << 30
"""Hidden states of all models that are held at a time."""

Tokens = tuple[int, ...]
Request = tuple[Sequence[int], Sequence[int]]
"""Ids of a context and of what follows it; neither is empty."""


@dataclass(frozen=True)
class Predicted:
    """What each model makes of what follows."""

    names: tuple[str, ...]
    """(N,) `BASE`, then the plans."""
    logprob: Floats
    """(N, R) log-probability of all that follows, nats."""
    greedy: NDArray[np.bool_]
    """(N, R) every token that follows is the most likely one: greedy decoding would write just that."""


def predict(
    checkpoint: Checkpoint, geometry: Geometry, plans: Mapping[str, Plan], requests: Sequence[Request],
    options: ProfileOptions, *, notify: Notify, advance: Advance,
) -> Predicted:  # fmt: skip
    """Predict the continuation of every request, given its true beginning, by the checkpoint and it under each plan.

    A context that does not fit into the model's positions loses its beginning, as in lm-eval.

    Raises:
        PlanError: a plan does not fit the checkpoint.
        DataError: a continuation alone is longer than the model's positions.
        UsageError: a plan is named `base`.
    """
    check_plans(plans, checkpoint, geometry)
    texts, at = _texts([_text(request, max_positions(checkpoint, geometry)) for request in requests])
    by_text: dict[int, list[int]] = {}
    for request, (text, _) in enumerate(at):
        by_text.setdefault(text, []).append(request)
    sums = np.zeros((2, 1 + len(plans), len(requests)))
    with open_stream(checkpoint, geometry, None, options, notify) as stream:
        each = geometry.hidden * stream.dtype.itemsize * (1 + len(plans))
        portions = list(_portions(texts, HIDDEN_BYTES // each))
        for number, portion in enumerate(portions):
            batches = make_batches([np.array(texts[i]) for i in portion], [0] * len(portion), options.micro_tokens)

            def done(layer: int, layers: int, before: int = number) -> None:
                advance(before * layers + layer, len(portions) * layers)

            passage, tracks = run_plans(stream, batches, list(plans.values()), notify, done)
            wanted = [[(r, at[r][1], requests[r][1]) for r in by_text[i]] for i in portion]
            sums += _collect(passage, wanted, len(requests))[:, [0, *tracks]]
    return Predicted((BASE, *plans), sums[0], sums[1] == [len(continuation) for _, continuation in requests])


def _text(request: Request, limit: int | None) -> Tokens:
    """What the model is given: all but the last token, which is only predicted."""
    context, continuation = request
    if limit is not None and len(continuation) > limit:
        raise DataError(f"a continuation of {len(continuation)} tokens, but the model has {limit} positions")
    given = (*context, *continuation[:-1])
    return given if limit is None else given[-limit:]


def _texts(given: Sequence[Tokens]) -> tuple[list[Tokens], list[tuple[int, int]]]:
    """Texts that begin no other; for each given one the number of the text that it begins, and its own length."""
    texts: list[Tokens] = []
    at = [(0, 0)] * len(given)
    for i in sorted(range(len(given)), key=given.__getitem__, reverse=True):
        if not texts or texts[-1][: len(given[i])] != given[i]:
            texts.append(given[i])
        at[i] = len(texts) - 1, len(given[i])
    return texts, at


def _portions(texts: Sequence[Tokens], tokens: int) -> Iterator[list[int]]:
    """Split the numbers of texts into runs of similar length and at most `tokens` tokens (at least one text)."""
    portion, held = list[int](), 0
    for i in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        if portion and held + len(texts[i]) > tokens:
            yield portion
            portion, held = [], 0
        portion.append(i)
        held += len(texts[i])
    if portion:
        yield portion


def _collect(
    passage: Passage, wanted: Sequence[Sequence[tuple[int, int, Sequence[int]]]], requests: int
) -> Floats:  # fmt: skip
    """Log-probability and number of hits of every track and request, (2, tracks, R) float64.

    `wanted` has for every sequence the requests that end in it: number, length of its text, continuation.
    """
    stream, tracks = passage.stream, len(passage.hidden)
    sums = torch.zeros(2, tracks, requests, dtype=torch.float64)
    for i, prepared in enumerate(passage.prepared):
        row, position, target, request = _targets(prepared.batch, wanted)
        hidden = [fetch(track[i], stream.device) for track in passage.hidden]
        for where in stream.chunks(prepared.batch):
            some = (position >= where.start) & (position < where.stop)
            if not some.any():
                continue
            for track in range(tracks):
                logits = stream.logits(prepared.batch, hidden[track], where)[row[some], position[some] - where.start]
                own = target[some].to(logits.device)
                log_p = logits.float().log_softmax(-1).gather(1, own[:, None])[:, 0]
                found = torch.stack((log_p.double(), (logits.argmax(-1) == own).double()))
                sums[:, track].index_add_(1, request[some], found.cpu())
    return sums.numpy()


def _targets(
    batch: Batch, wanted: Sequence[Sequence[tuple[int, int, Sequence[int]]]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row and position of every prediction that counts, the id it should be, and the request it counts for."""
    found = [
        (row, length - len(ids) + n, token, request)
        for row, sequence in enumerate(batch.rows)
        for request, length, ids in wanted[sequence]
        for n, token in enumerate(ids)
    ]
    row, position, target, request = torch.tensor(found).T
    return row, position, target, request
