"""Laws 1, 2, 3, 4 and 7 for every model type that the installed transformers has, on checkpoints as it saves them."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from law_models import Model
from tiny_models import VOCAB, read_tensors, silent, tokens
from tiny_types import NOT_STREAMED, SUPPORTED, model_class, tiny_type
from torch.overrides import TorchFunctionMode

from expertcut.checkpoint import TensorInfo, open_checkpoint, read_array
from expertcut.choose import LayerPlan, Plan
from expertcut.errors import ConfigConflictError, RuntimeLintError, UnknownTensorError
from expertcut.measure.numeric import verify_numeric
from expertcut.model import Remapped, read_geometry
from expertcut.rewrite import prune, verify_bytes, verify_structure
from expertcut.runtimes.transformers import from_pretrained

TOLERANCE = 1e-5
"""Of the logits' spread, for the middle token: see `expertcut.measure.numeric`."""
IDS = torch.randint(3, VOCAB - 6, (2, 24), generator=torch.Generator().manual_seed(1))
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=SUPPORTED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tiny_type(name, tmp_path_factory))


@pytest.fixture(scope="module")
def plan(model: Model) -> Plan:
    return model.random_plan(seed=3)


@pytest.fixture(scope="module")
def written(model: Model, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    prune(model.checkpoint, model.geometry, plan, out, max_shard_size=max(60_000, model.checkpoint.nbytes // 3))
    return out


def load(name: str, folder: Path) -> Any:
    return model_class(name).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(name: str, model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if name == "diffusion_gemma" else {}
    if name == "ernie4_5_vl_moe":
        more = {"moe_mm_token_type_ids": (IDS % 3 == 0).int()}  # every third token goes to the experts for images
    part = model.thinker if name == "qwen3_omni_moe" else model
    found: torch.Tensor = part(input_ids=IDS, **more).logits
    return found


def layer_of(name: str) -> int:
    found = re.search(r"\.(?:layers|blocks)\.(\d+)\.", f".{name}")
    assert found is not None, name
    return int(found[1])


def by_likeness(table: torch.Tensor, router: np.ndarray, kept: tuple[int, ...]) -> torch.Tensor:
    """A table of expert ids under a plan, entry by entry: a dropped expert's place goes to the likest one left."""
    unit = router.astype(np.float64) / np.linalg.norm(router.astype(np.float64), axis=1, keepdims=True)
    rows = []
    for old in table.tolist():
        new: list[int] = [e if e in kept else -1 for e in old]
        for column, e in enumerate(old):
            if e not in kept:
                new[column] = max((c for c in kept if c not in new), key=(unit @ unit[e]).__getitem__)
        rows.append(new)
    return torch.tensor(rows, dtype=table.dtype)


class Narrowing:
    """What transformers' own modules of the source and of the smaller config differ in, told by their shapes alone."""

    def __init__(self, model: Model, plan: Plan, source: State, smaller: State) -> None:
        self.geometry, self.source = model.geometry, source
        self.kept = {(entry.layer, "vision_moe" in prefix): entry.kept for prefix, entry in plan.layers.items()}
        assert source.keys() == smaller.keys()
        self.cut = [n for n in source if source[n].shape != smaller[n].shape]
        self.axis = {n: _differing(source[n], smaller[n]) for n in self.cut}
        self.tables = {
            layer_of(n): by_likeness(t, read_array(model.checkpoint, self._router(n)), self._kept(n))
            for n, t in source.items() if n.endswith("tid2eid")
        }  # fmt: skip

    def _router(self, name: str) -> str:
        return next(block.router for block in self.geometry.trunk if block.layer == layer_of(name))

    def _kept(self, name: str) -> tuple[int, ...]:
        return self.kept[layer_of(name), "vision_moe" in name]

    def rows(self, name: str) -> list[int]:
        """Indices along the axis that is cut: the kept experts' units, and what lies behind the experts."""
        experts, length = self.geometry.num_experts, self.source[name].shape[self.axis[name]]
        unit = 1 if length < 2 * experts else length // experts
        kept = [e * unit + i for e in self._kept(name) for i in range(unit)]
        return kept + list(range(experts * unit, length))

    def state(self) -> State:
        """The source's state, narrowed."""
        state = dict(self.source)
        for name in self.cut:
            state[name] = state[name].index_select(self.axis[name], torch.tensor(self.rows(name)))
        for name in state:
            if name.endswith("tid2eid"):
                state[name] = self.tables[layer_of(name)].apply_(self._kept(name).index)
        return state

    def routers(self) -> list[str]:
        matrices = [n for n in self.cut if self.source[n].dim() == 2 and self.axis[n] == 0 and n.endswith("weight")]
        return [n for n in matrices if len(self.rows(n)) < 16 and ".experts." not in n]

    def dropped(self, name: str) -> torch.Tensor:
        """(E + tail,) True for the experts that go."""
        mask = torch.ones(self.source[name].shape[self.axis[name]], dtype=torch.bool)
        mask[self.rows(name)] = False
        return mask


def _differing(one: torch.Tensor, other: torch.Tensor) -> int:
    (axis,) = [a for a in range(one.dim()) if one.shape[a] != other.shape[a]]
    return axis


class Masked(TorchFunctionMode):
    """Minus infinity on the dropped experts' logits, wherever a matrix product uses a router's weight."""

    PRODUCTS = {torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm}

    def __init__(self, weights: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.weights, self.used = weights, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self.PRODUCTS and args[1].data_ptr() in self.weights:
            self.used += 1
            return out.masked_fill(self.weights[args[1].data_ptr()], float("-inf"))
        return out


def masked_logits(name: str, source: Any, narrowing: Narrowing) -> torch.Tensor:
    """Logits of the source with its dropped experts masked: logits, correction biases, tables."""
    masked = copy.deepcopy(source)
    state = masked.state_dict(keep_vars=True)
    routers = {state[n].data_ptr(): narrowing.dropped(n) for n in narrowing.routers()}
    assert routers
    with torch.no_grad():
        for n in narrowing.cut:
            if n.endswith(("bias", "biases")) and ".experts." not in n:
                state[n].masked_fill_(narrowing.dropped(n), -1e9)
        for layer, table in narrowing.tables.items():
            next(t for n, t in state.items() if n.endswith("tid2eid") and layer_of(n) == layer).copy_(table)
    with Masked(routers) as mode:
        found = logits(name, masked)
    assert mode.used >= len(routers)
    return found


def test_law_1_identity_plan_keeps_every_byte(model: Model, tmp_path: Path) -> None:
    prune(model.checkpoint, model.geometry, model.plan(range(model.geometry.num_experts)), tmp_path / "out")
    source, found = read_tensors(model.folder), read_tensors(tmp_path / "out")
    assert set(found) == set(source)
    for name, tensor in source.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert (tmp_path / "out" / "config.json").read_text().split() == (model.folder / "config.json").read_text().split()


def test_law_2_what_is_written_is_whole_and_the_sources(model: Model, written: Path) -> None:
    checks = [*verify_structure(written, model.checkpoint), *verify_bytes(written, model.checkpoint)]
    assert [check for check in checks if not check.ok] == []


def test_law_3_pruned_is_the_source_with_its_router_narrowed(
    name: str, model: Model, plan: Plan, written: Path
) -> None:
    source, pruned = load(name, model.folder), load(name, written)
    narrowing = Narrowing(model, plan, source.state_dict(), pruned.state_dict())
    assert {layer_of(n) for n in narrowing.cut} == {block.layer for block in model.geometry.trunk}
    found, base, masked = logits(name, pruned), logits(name, source), masked_logits(name, source, narrowing)
    state = narrowing.state()
    pruned.load_state_dict(state)
    assert torch.equal(logits(name, pruned), found)
    pruned.load_state_dict(state | {n: state[n].flip(narrowing.axis[n]) for n in narrowing.routers()})
    swapped = logits(name, pruned)
    apart, controls = _apart(masked, found), (_apart(base, found), _apart(swapped, found))
    assert float(apart.median()) <= TOLERANCE
    for control in controls:
        assert float(control.max()) > 10 * TOLERANCE > 0


def test_law_3_as_verify_checks_it(name: str, model: Model, plan: Plan, written: Path) -> None:
    """Streamed, with the observing experts and, for some, adapters in place of transformers' own."""
    if name in NOT_STREAMED:
        return  # refused by name: see test_observer_types
    checks = verify_numeric(
        open_checkpoint(written), model.checkpoint, plan, tokens((14, 9), seed=2), device="cpu", notify=silent,
        advance=silent,
    )  # fmt: skip
    assert [check for check in checks if not check.ok] == []
    assert [("control" in check.name) for check in checks] == [False, False, True, True]


ALIKE_ONLY = {
    "dbrx": (ConfigConflictError, "DbrxConfig of dbrx has no moe_num_experts"),
    "diffusion_gemma": (RuntimeLintError, "its layers take no number"),
}
"""Types whose layers cannot differ in transformers, and how that is said."""


def differing(model: Model) -> Plan:
    """Fewer experts and, where its router knows more than one, a smaller top-k in every second layer with experts."""
    plan, second = model.random_plan(seed=3), {block.layer for block in model.geometry.trunk[1::2]}
    everything, less = tuple(range(model.geometry.num_experts)), not model.geometry.family.fixed_top_k
    layers = {
        prefix: LayerPlan(layer=entry.layer, kept=entry.kept, top_k=max(1, model.geometry.top_k - less))
        if entry.layer in second else LayerPlan(layer=entry.layer, kept=everything)
        for prefix, entry in plan.layers.items()
    }  # fmt: skip
    return plan.model_copy(update={"layers": layers, "per_layer": True})


def test_law_3_where_layers_differ(name: str, model: Model, tmp_path: Path) -> None:
    """Loaded by expertcut's own loader, and as verify checks it."""
    if len(model.geometry.trunk) < 2:
        pytest.skip("a single layer with experts cannot differ from others")
    out, plan = tmp_path / "out", differing(model)
    prune(model.checkpoint, model.geometry, plan, out)
    if name in ALIKE_ONLY:
        error, message = ALIKE_ONLY[name]
        with pytest.raises(error, match=message):
            from_pretrained(out)
        return
    assert from_pretrained(out, dtype=torch.float32).dtype == torch.float32
    checks = verify_numeric(
        open_checkpoint(out), model.checkpoint, plan, tokens((14, 9), seed=2), device="cpu", notify=silent,
        advance=silent,
    )  # fmt: skip
    assert [check for check in checks if not check.ok] == []


def _apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Largest difference of every token's logits, in units of their spread."""
    finite = other.isfinite()  # some heads rule out padding tokens
    return torch.where(finite, one - other, 0.0).abs().amax(-1).flatten() / other[finite].std()


def test_law_1_the_identity_plan_links_every_shard(model: Model, tmp_path: Path) -> None:
    """Also where layers route by token id: their tables stay as well."""
    out = tmp_path / "out"
    prune(model.checkpoint, model.geometry, model.plan(range(model.geometry.num_experts)), out, link=True)
    found = open_checkpoint(out)
    for new, old in zip(found.shards, model.checkpoint.shards, strict=True):
        assert (out / new).samefile(model.folder / old)
    assert found.config == model.checkpoint.config
    checks = verify_structure(found, model.checkpoint) + verify_bytes(found, model.checkpoint)
    assert [check for check in checks if not check.ok] == []


def test_law_4_unknown_expert_sized_tensor_stops_the_run(model: Model) -> None:
    experts, block = model.geometry.num_experts, model.geometry.trunk[-1]
    for stranger, shape in ((f"{block.prefix}.mystery", (experts,)), (f"{block.prefix}.later.scale", (3, experts, 2))):
        info = TensorInfo(stranger, "F32", shape, next(iter(model.checkpoint.shards)), 0, 4 * int(np.prod(shape)))
        tensors = {**model.checkpoint.tensors, stranger: info}
        with pytest.raises(UnknownTensorError, match=re.escape(stranger)):
            read_geometry(replace(model.checkpoint, tensors=tensors))


def test_law_7_groups_keep_equal_numbers(model: Model, plan: Plan) -> None:
    size = model.geometry.num_experts // model.geometry.n_group
    for entry in plan.layers.values():
        numbers = [sum(e // size == group for e in entry.kept) for group in range(model.geometry.n_group)]
        assert len(set(numbers)) == 1


def test_roles_of_hash_layers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """DeepSeek-V4's first layers route by token id: the table is neither cut nor whole."""
    geometry = Model(tiny_type("deepseek_v4", tmp_path_factory)).geometry
    tables = {name for name, role in geometry.roles.items() if isinstance(role, Remapped)}
    assert tables == {name for name in geometry.roles if name.endswith("tid2eid")} != set()
