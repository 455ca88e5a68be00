"""A request and calibration text in; the kept experts of every layer out, chosen while the text runs through the model.

One pass over the weights: the whole layer runs and is watched, its experts are chosen, and the text goes on through
the layer as it was; or sequentially through the pruned one, so that later layers are seen behind pruned ones.
Invariant: with all experts kept, what is seen is what a profile sees.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from itertools import islice

import torch
from torch import nn

from expertcut.calibrate.batches import make_batches
from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.executor import LayerStream
from expertcut.calibrate.overlap import sequence_hashes
from expertcut.calibrate.passage import Advance, Notify, Passage, Watcher
from expertcut.calibrate.profile import MOMENTS, TEXT, Profile
from expertcut.calibrate.run import ProfileOptions, open_observer, open_stream, profile_meta
from expertcut.choose.criteria import Found
from expertcut.choose.make import Request
from expertcut.choose.plan import LayerPlan
from expertcut.measure.replay import TOKENS, Replay, Sample, Variants
from expertcut.model import MoeBlock


def walk(
    request: Request, data: CalibrationSet, options: ProfileOptions, *, sequential: bool, tokenizer: str,
    notify: Notify, advance: Advance,
) -> tuple[dict[str, LayerPlan], Profile]:  # fmt: skip
    """Return the layers of the plan, and the profile of what was seen of each layer before it was pruned.

    `tokenizer` is the fingerprint of the text's tokenizer. Statistics that the criterion needs are recorded whatever
    the options say. Host memory: as for a profile; sequentially the hidden states twice; with a replay T·E² numbers.

    Raises:
        UsageError: a weighted domain is not in the text.
        PlanError: protection exceeds the budget, or a layer cannot be replayed.
    """
    options = replace(
        options, moments=not set(MOMENTS).isdisjoint(request.criterion.needs),
        pair_domains=request.domain_weights is not None,
    )  # fmt: skip
    domains = [data.domains.index(s.domain) for s in data.sequences]
    batches = make_batches([s.ids for s in data.sequences], domains, options.micro_tokens)
    last = request.geometry.trunk[-1].layer
    with open_stream(request.checkpoint, request.geometry, data, options, notify) as stream:
        meta = profile_meta(request.checkpoint, request.geometry, data, options, tokenizer, stream.dtype)
        profile = Profile(meta, {TEXT: sequence_hashes(s.ids for s in data.sequences)})
        run = _Walk(stream, request, options, profile, Passage(stream, batches, 1, notify))
        layers: dict[str, LayerPlan] = {}
        for index, base in islice(stream.layers(), last + 1):
            block = stream.block(index)
            if block is None:
                run.passage.step(index, base)
            else:
                layers |= run.sequentially(block, base) if sequential else run.choose(block, base, 0)
            advance(index + 1, last + 1)
    return layers, run.profile


class _Walk:
    """A text on its way through the layers; track 0 is that of the plan."""

    def __init__(
        self, stream: LayerStream, request: Request, options: ProfileOptions, profile: Profile, passage: Passage
    ) -> None:
        self.stream, self.request, self.options, self.passage = stream, request, options, passage
        self.profile = profile
        self.weights = profile.domain_weights(request.domain_weights)
        self.variants = Variants(stream, request)

    def sequentially(self, block: MoeBlock, base: nn.Module) -> dict[str, LayerPlan]:
        """Choose a block's experts, and take the plan's track through the pruned layer."""
        chosen = self.choose(block, base, self.passage.branch(0))
        self.passage.drop()
        variant = self.variants[self.request.experts]
        variant.kept[block.layer] = chosen[block.prefix].kept
        self.passage.step(block.layer, variant.layer(block.layer, base))
        return chosen

    def choose(self, block: MoeBlock, base: nn.Module, track: int) -> dict[str, LayerPlan]:
        """Choose a block's experts by what is seen of it while a track goes through the whole layer."""
        observer = open_observer(self.stream, base, len(self.profile.meta.domains), self.options)
        sample = None
        with ExitStack() as watching:
            watching.callback(observer.close)
            watchers: list[Watcher] = [observer]
            if self.request.criterion.needs_replay:
                sample = Sample(max(1, -(-sum(self.profile.meta.tokens().values()) // TOKENS)))
                watching.enter_context(sample.watching(base, self.stream.geometry.family))
                watchers.append(sample)
            self.passage.step(block.layer, base, track, _Together(watchers))
        self.profile = Profile(self.profile.meta, {**self.profile.arrays, **observer.sums.arrays(block.prefix)})
        return self.request.choose(block, self._found(block, base, sample))

    def _found(self, block: MoeBlock, base: nn.Module, sample: Sample | None) -> Found:
        if sample is None:
            return self.request.judged(block, self.profile)
        replay = Replay(self.stream, self.variants, block.layer, base, sample, self.weights)
        found: Found = self.request.criterion.score(replay)
        return found


class _Together:
    """Several watchers of one passage."""

    def __init__(self, watchers: list[Watcher]) -> None:
        self._watchers = watchers

    @property
    def domain_T(self) -> torch.Tensor | None:  # noqa: D102
        return self._watchers[0].domain_T

    @domain_T.setter
    def domain_T(self, value: torch.Tensor | None) -> None:
        for watcher in self._watchers:
            watcher.domain_T = value

    def commit(self) -> None:
        for watcher in self._watchers:
            watcher.commit()

    def discard(self) -> None:
        for watcher in self._watchers:
            watcher.discard()
