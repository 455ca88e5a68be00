"""A plan in; new rows of its routers out, trained so that the plan predicts what the base predicts. With gradients.

Only the routers' matrices are trained, by KL(base‖plan) of the next token's distribution on calibration text; all else
of the plan stays, correction biases and the new values that it has included. Every so manieth sequence is held back.
Invariant: of all values that were looked at, rounded as in the file, those written do best on these sequences; the
plan's own are among them.

Memory: nothing is streamed. The whole model, what every layer keeps of STEP_TOKENS tokens for its gradient, and the
hidden states of all of the text, as they enter the first layer and as they leave the base's last one.

Shapes: B sequences, C positions, T predicted tokens, V vocabulary, H hidden, R rows of a router.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from expertcut.calibrate.batches import Batch, make_batches
from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.executor import LayerStream, find_matrix
from expertcut.calibrate.passage import Advance, Notify, Passage
from expertcut.calibrate.run import ProfileOptions, open_stream
from expertcut.calibrate.transfer import fetch
from expertcut.checkpoint.types import Checkpoint
from expertcut.choose.plan import Deltas, Plan, deltas_of, validate
from expertcut.errors import DataError, PlanError
from expertcut.measure.variants import Variant
from expertcut.measure.whatif import picked, predicted
from expertcut.model import Geometry, MoeBlock, Sliced
from expertcut.rewrite.deltas import DeltaFile, new_shape, new_tensors, read_new
from expertcut.rewrite.gain import ROUNDING

STEP_TOKENS = 2048
"""Tokens of a step."""
STEPS = 80
"""Steps that are worth their time."""
RATE = 0.02
"""Adam's first step size, in root mean squares of a router's matrix; it falls to 0 with the steps."""
HELD = 16
"""Every so manieth sequence is held back."""
LOOKS = 4
"""How often the routers are tried on the sequences that are held back."""


def distil_routers(
    checkpoint: Checkpoint, geometry: Geometry, plan: Plan, data: CalibrationSet, path: Path, options: ProfileOptions,
    *, steps: int, notify: Notify, advance: Advance,
) -> Deltas:  # fmt: skip
    """Train the routers of a plan, and write them, beside copies of what new values it has, to the file `path`.

    `advance` is called with steps done and steps in all.

    Raises:
        PlanError: the plan does not fit the checkpoint, or its routers are quantised or cannot be told.
        DataError: fewer than two sequences of two tokens.
        DestinationError: the file cannot be written.
    """
    validate(plan, geometry)
    for block in geometry.trunk:
        _check_router(checkpoint, geometry, block)
    with open_stream(checkpoint, geometry, data, replace(options, resident=True), notify) as stream:
        stream.gradients = True
        batches, held = _batches(data, min(options.micro_tokens, STEP_TOKENS))
        run = _Run(stream, plan, Passage(stream, [*batches, *held], 1, notify))
        run.train(len(batches), steps, advance)
        new = {router.name: router.stored() for router in run.routers}
    return _write(checkpoint, geometry, plan, path, new)


def _check_router(checkpoint: Checkpoint, geometry: Geometry, block: MoeBlock) -> None:
    info = checkpoint.tensors[block.router]
    if info.dtype not in ROUNDING:
        raise PlanError(
            f"{info.shard}: {info.name} is {info.dtype}, which no router can be trained in; expected one of "
            f"{', '.join(ROUNDING)}",
            "distil an unquantised checkpoint of the model, and quantise that",
        )
    if not isinstance(geometry.roles[block.router], Sliced):
        raise _unknown(block)


def _unknown(block: MoeBlock) -> PlanError:
    return PlanError(f"{block.router}: is not stored as the router uses it, so that it cannot be trained")


def _batches(data: CalibrationSet, tokens: int) -> tuple[list[Batch], list[Batch]]:
    """Micro-batches to train on, domains mixed, and those that are held back."""
    sequences = [s for s in data.sequences if len(s.ids) > 1]
    if len(sequences) < 2:
        raise DataError(f"found {len(sequences)} sequences of two tokens or more, expected at least 2 to train on")
    order = np.random.default_rng(0).permutation(len(sequences)).tolist()
    every = min(HELD, len(sequences))
    parts = ([i for i in order if i % every != every - 1], [i for i in order if i % every == every - 1])
    train, held = (
        make_batches([sequences[i].ids for i in part], [data.domains.index(sequences[i].domain) for i in part], tokens)
        for part in parts
    )
    return train, held


@dataclass
class _Router:
    """A router's matrix while it is trained."""

    name: str
    """Of the stored tensor."""
    owner: nn.Module
    leaf: str
    matrix: nn.Parameter
    """(R, H) float32."""
    runs_in: torch.dtype
    stored_in: torch.dtype
    turned: bool
    """Stored as (H, R)."""

    def put(self, matrix: torch.Tensor) -> None:
        """Let the layer use a matrix (R, H)."""
        self.owner._parameters[self.leaf] = matrix.to(self.runs_in)  # type: ignore[assignment]

    def rounded(self) -> torch.Tensor:
        """The matrix as the file would hold it, (R, H)."""
        return self.matrix.detach().to(self.stored_in)

    def stored(self) -> torch.Tensor:
        """What the file holds."""
        rounded = self.rounded().cpu()
        return (rounded.T if self.turned else rounded).contiguous()


class _Run:
    """Base and plan in memory; the base's track has reached the end, the plan starts from the first layer each time."""

    def __init__(self, stream: LayerStream, plan: Plan, passage: Passage) -> None:
        self.stream, self.passage = stream, passage
        variant, start = Variant(stream, plan), passage.branch(0)
        self.layers: list[nn.Module] = []
        self.routers: list[_Router] = []
        for index, base in stream.layers():
            passage.step(index, base, 0)
            self.layers.append(variant.layer(index, base))
            if block := stream.block(index):
                self.routers.append(_router(stream, variant, block, self.layers[-1]))
        self.start = passage.hidden[start]

    def train(self, batches: int, steps: int, advance: Advance) -> None:
        """Train on the first so many micro-batches, and leave the matrices that do best on the others."""
        groups = [{"params": [r.matrix], "lr": RATE * float(r.matrix.detach().square().mean().sqrt())}
                  for r in self.routers]  # fmt: skip
        adam = torch.optim.Adam(groups, betas=(0.9, 0.98))
        fall = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
        best, values = self._look(batches)
        looks = {-(-steps * look // LOOKS) for look in range(1, LOOKS + 1)}
        for step, at in enumerate(_shuffled(batches, steps), 1):
            for router in self.routers:
                router.put(router.matrix)
            adam.zero_grad()
            self._divergence(at, learn=True)
            adam.step()
            fall.step()
            if step in looks and (found := self._look(batches))[0] < best:
                best, values = found
            advance(step, steps)
        with torch.no_grad():
            for router, value in zip(self.routers, values, strict=True):
                router.matrix.copy_(value)

    def _look(self, batches: int) -> tuple[float, list[torch.Tensor]]:
        """KL per token on the held-back micro-batches, with the matrices rounded as in the file; and these."""
        values = [router.rounded() for router in self.routers]
        for router, value in zip(self.routers, values, strict=True):
            router.put(value)
        sums = [self._divergence(at, learn=False) for at in range(batches, len(self.passage.prepared))]
        return sum(kl for kl, _ in sums) / sum(count for _, count in sums), values

    def _divergence(self, at: int, *, learn: bool) -> tuple[float, int]:
        """KL(base‖plan) over a micro-batch's predicted tokens, and how many these are; with the mean's gradients.

        The head and its logits are taken a few positions at a time.
        """
        batch, device = self.passage.prepared[at].batch, self.stream.device
        whole, hidden = fetch(self.passage.hidden[0][at], device), self._through(at)
        end, total = hidden.detach().requires_grad_(learn), 0.0
        count = int((batch.domain[:, 1:] >= 0).sum())
        for where in self.stream.chunks(batch, STEP_TOKENS):
            *_, pick = predicted(batch, where)
            if not bool(pick.any()):
                continue
            base, planned = (picked(self.stream.logits(batch, some, where), pick) for some in (whole, end))
            kl = _kl(base, planned)
            if learn:
                (kl / count).backward()  # type: ignore[no-untyped-call]
            total += float(kl.detach())
        if learn:
            hidden.backward(end.grad)  # type: ignore[no-untyped-call]
        return total, count

    def _through(self, at: int) -> torch.Tensor:
        """The plan's hidden states behind the last layer, (B, C, H)."""
        hidden, carried = fetch(self.start[at], self.stream.device), None
        for layer, call in zip(self.layers, self.passage.prepared[at].calls, strict=True):
            hidden, carried = self.stream.call(layer, hidden, call, carried)
        return hidden


def _router(stream: LayerStream, variant: Variant, block: MoeBlock, layer: nn.Module) -> _Router:
    """A router that is used as it is stored, but for the order of its axes."""
    rows = len(variant.kept[block.layer]) + stream.geometry.tail
    try:
        owner, leaf = find_matrix(layer, stream.geometry.family, rows)
    except IndexError:
        raise _unknown(block) from None
    used, stored, role = getattr(owner, leaf), variant.stored(block.router), stream.geometry.roles[block.router]
    assert isinstance(role, Sliced)
    kept = (*variant.kept[block.layer], *range(stream.geometry.num_experts, stored.shape[role.axis]))
    values = stored.index_select(role.axis, torch.tensor(kept)).to(used.device)
    for turned in (False, True):
        matrix = values.T if turned else values
        if torch.equal(matrix.to(used.dtype), used):
            parameter = nn.Parameter(matrix.float().contiguous())
            return _Router(block.router, owner, leaf, parameter, used.dtype, stored.dtype, turned)
    raise _unknown(block)


def _shuffled(count: int, steps: int) -> Iterator[int]:
    """Yield numbers below `count`, all of them before any comes again."""
    random, left = np.random.default_rng(0), list[int]()
    for _ in range(steps):
        left = left or random.permutation(count).tolist()
        yield left.pop()


def _kl(base: torch.Tensor, planned: torch.Tensor) -> torch.Tensor:
    """Sum over T tokens of KL(base‖planned), from logits (T, V), nats."""
    log_p, log_q = base.float().log_softmax(-1), planned.float().log_softmax(-1)
    return ((log_p - log_q) * log_p.exp()).nansum()  # both minus infinity where a head rules tokens out


def _write(
    checkpoint: Checkpoint, geometry: Geometry, plan: Plan, path: Path, routers: dict[str, torch.Tensor]
) -> Deltas:
    """Write the routers and copies of the plan's other new values, layer by layer."""
    own = new_tensors(checkpoint, geometry, plan)
    names: Sequence[str] = [
        name for block in geometry.trunk for name in dict.fromkeys((*deltas_of(plan, block), block.router))
    ]
    announced = [(n, checkpoint.tensors[n].dtype, new_shape(checkpoint, geometry, plan, n)) for n in names]
    with DeltaFile(path, announced) as file:
        for name in names:
            if name in routers:
                file.add(name, routers[name].view(torch.uint8).flatten().numpy())
            else:
                assert plan.deltas is not None
                file.add(name, read_new(own[name], plan.deltas.tensors[name]))
        return file.finish()
