"""Merging instead of dropping, for comparison: a plan in, the same with merged experts as new values of tensors out.

Two ways, rewritten from the papers and their code. REAM (arXiv:2604.04356): kept experts are the centres; beginning
with the most salient, each takes the nearest of those that are left, up to a group's size; neurons are aligned with the
centre's; weights are averaged by saliency (REAP's); layer after layer on the merged model's own hidden states.
HC-SMoE (arXiv:2410.08589): experts are clustered by their mean outputs, average linkage; weights are averaged by how
often each is routed to. Here, unlike there, routers keep the row of the kept expert only, as REAM does, and where a
router has groups of experts, clusters stay within them. For models with plainly stored, gated experts.

Shapes: T tokens, E experts, I expert width, H hidden, N neurons of either side of an assignment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_common import OPTIONS, Subject, say
from torch import nn

from expertcut.calibrate.batches import make_batches
from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.executor import LayerStream, find_experts, find_matrix
from expertcut.calibrate.observer import activations
from expertcut.calibrate.passage import Passage
from expertcut.calibrate.profile import Profile
from expertcut.calibrate.run import open_stream
from expertcut.choose import Plan
from expertcut.measure.variants import Variant
from expertcut.model import ExpertTensor, MoeBlock
from expertcut.rewrite.deltas import DeltaFile

PARTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
SHARE = 8
"""A group holds at most one of so many experts: REAM's 16 of its 128."""
SAMPLE = 1024
"""Tokens whose activations align neurons."""


@dataclass
class Behaviour:
    """What all experts of a layer make of all tokens."""

    mean_EH: torch.Tensor
    gated_EH: torch.Tensor
    """Means of outputs times router probability."""
    logits_ET: torch.Tensor
    neurons_EIT: torch.Tensor
    """Activations of a sample of tokens."""


def ream(subject: Subject, plan: Plan, data: CalibrationSet, profile: Profile, path: Path) -> Plan:
    """Merge every dropped expert into a kept one, found one layer after the other."""
    tensors = dict[str, torch.Tensor]()
    with _opened(subject, data) as (stream, passage):
        variant = Variant(stream, plan)
        for index, base in stream.layers():
            block = stream.block(index)
            if block is not None:
                stats = profile.layer(block.prefix)
                saliency_E = stats.gated_norm_sum / np.maximum(stats.count, 1)
                saliency_E[saliency_E == 0] = min(0.5, saliency_E[saliency_E > 0].min())
                found = _behaviour(stream, passage, index, base)
                groups = gather(_distances(found), saliency_E, plan.layers[block.prefix].kept)
                experts: Any = base.get_submodule(find_experts(base) or "")
                for kept, group in groups.items():
                    new = _average(stream, block, [kept, *group], saliency_E, found.neurons_EIT)
                    tensors |= {_names(stream, block)[kept, part]: value for part, value in new.items()}
                    _put(experts, kept, new)
            passage.step(index, variant.layer(index, base))
    return _written(subject, plan, path, tensors)


def hc_smoe(subject: Subject, plan: Plan, data: CalibrationSet, profile: Profile, path: Path) -> Plan:
    """Cluster the experts into as many as the plan keeps, and merge each cluster; the plan's own choice is not used."""
    tensors, layers = dict[str, torch.Tensor](), dict(plan.layers)
    with _opened(subject, data) as (stream, passage):
        for index, base in stream.layers():
            block = stream.block(index)
            if block is not None:
                count_E, entry = profile.layer(block.prefix).count, plan.layers[block.prefix]
                found = _behaviour(stream, passage, index, base)
                clusters = cluster(found.mean_EH.numpy(), len(entry.kept), subject.geometry.n_group)
                groups = {max(some, key=lambda e: (count_E[e], -e)): some for some in clusters}
                layers[block.prefix] = entry.model_copy(update={"kept": tuple(sorted(groups))})
                for kept, group in groups.items():
                    others = [e for e in group if e != kept]
                    if others:
                        new = _average(stream, block, [kept, *others], np.maximum(count_E, 1e-9), None)
                        tensors |= {_names(stream, block)[kept, part]: value for part, value in new.items()}
            passage.step(index, base)
    return _written(subject, plan.model_copy(update={"layers": layers}), path, tensors)


def gather(distance_EE: np.ndarray, saliency_E: np.ndarray, kept: tuple[int, ...]) -> dict[int, list[int]]:
    """Which dropped experts go to which kept one; the most salient takes first, and takes as many as a group holds."""
    left = set(range(len(saliency_E))) - set(kept)
    room, groups = max(2, len(saliency_E) // SHARE) - 1, {}
    for centre in sorted(kept, key=lambda e: -saliency_E[e]):
        taken = sorted(left, key=lambda e: distance_EE[centre, e])[:room]
        if taken:
            groups[centre] = taken
        left -= set(taken)
    assert not left, "groups hold all experts, as at least one of SHARE is kept"
    return groups


def cluster(points_EH: np.ndarray, count: int, n_group: int) -> list[list[int]]:
    """Clusters of experts by average linkage of Euclidean distances, equally many in every group of the router."""
    size, found = len(points_EH) // n_group, []
    distance_EE = np.linalg.norm(points_EH[:, None] - points_EH[None], axis=-1)
    for start in range(0, len(points_EH), size):
        clusters = [[e] for e in range(start, start + size)]
        while len(clusters) > count // n_group:
            pairs = [(i, j) for j in range(len(clusters)) for i in range(j)]
            i, j = min(pairs, key=lambda pair: distance_EE[np.ix_(clusters[pair[0]], clusters[pair[1]])].mean())
            clusters[i] += clusters.pop(j)
        found += clusters
    return found


def assign(cost_NN: np.ndarray) -> np.ndarray:
    """The permutation of least cost, row → column, (N,): shortest augmenting paths (Kuhn, Munkres, Jonker, Volgenant).

    Row and column 0 of all arrays within are no one's.
    """
    n = len(cost_NN)
    row_price, price, owner, way = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1, int), np.zeros(n + 1, int)
    for row in range(1, n + 1):
        owner[0], at = row, 0
        least, seen = np.full(n + 1, np.inf), np.zeros(n + 1, bool)
        while owner[at]:
            seen[at] = True
            slack = np.append(np.inf, cost_NN[owner[at] - 1] - row_price[owner[at]] - price[1:])
            closer = ~seen & (slack < least)
            least[closer], way[closer] = slack[closer], at
            nearest = int(np.where(seen, np.inf, least).argmin())
            step = least[nearest]
            row_price[owner[seen]] += step
            price[seen] -= step
            least[~seen] -= step
            at = nearest
        while at:
            owner[at], at = owner[way[at]], way[at]
    found = np.empty(n, int)
    found[owner[1:] - 1] = np.arange(n)
    return found


class _Seen:
    """Keeps what the experts are given, without padding."""

    def __init__(self) -> None:
        self.domain_T: torch.Tensor | None = None
        self.given: list[torch.Tensor] = []
        self._now = torch.empty(0)

    def note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._now = args[0].flatten(0, -2)

    def commit(self) -> None:
        assert self.domain_T is not None
        self.given.append(self._now[self.domain_T >= 0])

    def discard(self) -> None:
        """Nothing was kept."""


def _behaviour(stream: LayerStream, passage: Passage, index: int, base: nn.Module) -> Behaviour:
    """Run every expert of a layer on what the text brings to it; the text stays where it is."""
    seen, name = _Seen(), find_experts(base) or ""
    hook = base.get_submodule(name).register_forward_pre_hook(seen.note)
    passage.branch(0)
    passage.step(index, base, len(passage.hidden) - 1, seen)
    passage.drop()
    hook.remove()
    rows = stream.geometry.num_experts
    matrix = getattr(*find_matrix(base, stream.geometry.family, rows))
    return _all(base.get_submodule(name), torch.cat(seen.given), matrix)


@torch.inference_mode()
def _all(experts: Any, given_TH: torch.Tensor, matrix_EH: torch.Tensor) -> Behaviour:
    logits_TE = given_TH.float() @ matrix_EH.float().T
    gates_TE, every = logits_TE.softmax(-1), max(1, len(given_TH) // SAMPLE)
    mean, gated, neurons = [], [], []
    for e in range(len(matrix_EH)):
        ends = torch.tensor([len(given_TH)], dtype=torch.int32)
        a_TI = activations(experts, given_TH, slice(e, e + 1), ends, torch.full((len(given_TH),), e)).float()
        down_HI = experts.down_proj[e].float()
        mean.append(down_HI @ a_TI.mean(0))
        gated.append(down_HI @ (a_TI * gates_TE[:, e, None]).mean(0))
        neurons.append(a_TI[::every].T)
    return Behaviour(torch.stack(mean), torch.stack(gated), logits_TE.T, torch.stack(neurons))


def _distances(found: Behaviour) -> np.ndarray:
    """(E, E): 1 less the mean of two likenesses, of gated outputs and of the router's logits over tokens."""
    outputs = torch.nn.functional.normalize(found.gated_EH, dim=-1)
    logits = torch.nn.functional.normalize(found.logits_ET, dim=-1)
    apart = torch.cdist(logits, logits)
    like = ((outputs @ outputs.T + 1) / 2 + 1 - apart / apart.max()) / 2
    return (1 - like).numpy()


def _average(
    stream: LayerStream, block: MoeBlock, group: list[int], weight_E: np.ndarray, neurons_EIT: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The weighted mean of a group's matrices, rounded as they are stored; neurons aligned with those of the first."""
    names, share = _names(stream, block), weight_E[group] / weight_E[group].sum()
    matrices = [{part: stream.reader.view(names[e, part]) for part in PARTS} for e in group]
    sums = {part: torch.zeros(value.shape) for part, value in matrices[0].items()}
    for e, own, w in zip(group, matrices, share, strict=True):
        order = torch.arange(len(own[PARTS[0]]))
        if neurons_EIT is not None and e != group[0]:
            cost = _apart(neurons_EIT[group[0]], neurons_EIT[e]) + _apart(_rows(matrices[0]), _rows(own))
            order = torch.from_numpy(assign(cost))
        for part, value in own.items():
            sums[part] += float(w) * value.float().index_select(int(part == PARTS[2]), order)
    return {part: value.to(matrices[0][part].dtype) for part, value in sums.items()}


def _rows(matrices: dict[str, torch.Tensor]) -> torch.Tensor:
    """All weights of each neuron, (I, 3·H)."""
    gate, up, down = (matrices[part].float() for part in PARTS)
    return torch.cat((gate, up, down.T), dim=1)


def _apart(one_NX: torch.Tensor, other_NX: torch.Tensor) -> np.ndarray:
    normal = torch.nn.functional.normalize
    return torch.cdist(normal(one_NX, dim=-1), normal(other_NX, dim=-1)).double().numpy()


def _put(experts: Any, expert: int, new: dict[str, torch.Tensor]) -> None:
    """Let a loaded layer have new matrices of an expert."""
    gate, up, down = (new[part].to(experts.down_proj.dtype) for part in PARTS)
    experts.gate_up_proj[expert].copy_(torch.cat((gate, up)))
    experts.down_proj[expert].copy_(down)


def _names(stream: LayerStream, block: MoeBlock) -> dict[tuple[int, str], str]:
    roles = ((name, stream.geometry.roles[name]) for name in block.tensors)
    return {(role.expert, role.part): name for name, role in roles if isinstance(role, ExpertTensor)}


def _written(subject: Subject, plan: Plan, path: Path, tensors: dict[str, torch.Tensor]) -> Plan:
    infos = subject.checkpoint.tensors
    with DeltaFile(path, ((name, infos[name].dtype, infos[name].shape) for name in tensors)) as file:
        for name, value in tensors.items():
            file.add(name, value.contiguous().view(torch.uint8).flatten().numpy())
        return plan.beside(path.parent, file.finish())


@contextmanager
def _opened(subject: Subject, data: CalibrationSet) -> Iterator[tuple[LayerStream, Passage]]:
    domains = [data.domains.index(s.domain) for s in data.sequences]
    batches = make_batches([s.ids for s in data.sequences], domains, OPTIONS.micro_tokens)
    with open_stream(subject.checkpoint, subject.geometry, data, OPTIONS, say) as stream:
        yield stream, Passage(stream, batches, 1, say)
