"""New values of tensors: their file is whole or not there, and the rewriter takes these bytes and no others."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_server import TOKEN
from rewrite_models import Model, deepseek, half, kept_of, listing, opened, plan_for, qwen3_vl
from test_rewrite_crash import killed_at_every_call
from test_rewrite_hub import NAME, Case, Counting, fused, wide
from test_rewrite_verify import edit_bytes, failed

from expertcut.checkpoint import Checkpoint, build_header, open_checkpoint
from expertcut.checkpoint.header import read_header
from expertcut.choose import Plan
from expertcut.cli import run
from expertcut.errors import DestinationError, PlanError, UsageError
from expertcut.model import Geometry
from expertcut.rewrite import prune, require, verify_bytes, verify_structure
from expertcut.rewrite.deltas import DeltaFile, copied, new_shape, new_tensors, read_new

pytest_plugins = ("sharing",)

FILE = "new.safetensors"
DEMO_WEIGHTS = build_header([("a", "U8", (3,), 3)], {"format": "pt"}) + b"abc"
"""Weights of a model, which are no new values."""
Values = dict[str, bytes]


def down_projections(ckpt: Checkpoint, geometry: Geometry, plan: Plan) -> list[str]:
    """Those of the kept experts and of shared ones, in layers that a plan speaks of."""
    found = []
    for prefix, entry in plan.layers.items():
        for name in ckpt.tensors:
            number = re.search(r"\.experts\.(\d+)\.", name)
            if name.startswith(prefix) and re.search(r"down_proj(\.weight)?$", name):
                found += [name] * (number is None or int(number[1]) in entry.kept)
    return found


def write_values(
    path: Path, ckpt: Checkpoint, geometry: Geometry, plan: Plan, names: list[str], seed: int = 5
) -> tuple[Plan, Values]:
    """A file of random new values beside a plan, and the values."""
    random, values = np.random.default_rng(seed), Values()
    shapes = [(name, ckpt.tensors[name].dtype, new_shape(ckpt, geometry, plan, name)) for name in names]
    with DeltaFile(path, shapes) as file:
        for name, nbytes in list(file._left.items()):
            values[name] = random.bytes(nbytes)
            file.add(name, np.frombuffer(values[name], np.uint8))
        return plan.beside(path.parent, file.finish()), values


class Healed:
    """A checkpoint, half of it by a plan, and new values for every down projection of that half."""

    def __init__(self, folder: Path, model: Model) -> None:
        self.folder, self.model = folder, model
        self.ckpt, self.geometry = opened(model.write(folder / "in"))
        bare = half(self.ckpt, self.geometry)
        names = down_projections(self.ckpt, self.geometry, bare)
        self.file, self.path = folder / FILE, folder / "plan.json"
        made, self.values = write_values(self.file, self.ckpt, self.geometry, bare, names)
        made.save(self.path)
        self.plan = Plan.load(self.path)

    def expected(self) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        """What must be written, by plain numpy."""
        kept = kept_of(self.plan, self.geometry)
        left = self.model.pruned(kept)
        for name, data in self.values.items():
            if found := re.fullmatch(r"(.*)\.experts\.(\d+)\.(.*)", name):
                name = f"{found[1]}.experts.{kept[found[1]].index(int(found[2]))}.{found[3]}"
            dtype, shape, old = left[name]
            assert len(old) == len(data) and old != data
            left[name] = (dtype, shape, data)
        return left

    def prune(self, out: str = "out", size: int | None = 2000) -> Path:
        prune(self.ckpt, self.geometry, self.plan, self.folder / out, max_shard_size=size)
        return self.folder / out


MODELS = {"per expert": deepseek, "fused": qwen3_vl}


@pytest.fixture(params=MODELS)
def healed(request: pytest.FixtureRequest, tmp_path: Path) -> Healed:
    return Healed(tmp_path, MODELS[request.param]())


@pytest.fixture
def one(tmp_path: Path) -> Healed:
    return Healed(tmp_path, deepseek())


def contents(out: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    ckpt = open_checkpoint(out)
    return {name: (t.dtype, t.shape, (out / t.shard).read_bytes()[t.start : t.end]) for name, t in ckpt.tensors.items()}


def test_healed_tensors_have_the_files_bytes_and_all_others_the_sources(healed: Healed) -> None:
    assert contents(healed.prune()) == healed.expected() == contents(healed.prune("single", None))
    assert len(healed.values) >= 2
    assert len(open_checkpoint(healed.folder / "out").shards) > 1


def test_verify_needs_no_file_of_new_values(healed: Healed) -> None:
    out = healed.prune()
    healed.file.unlink()
    healed.path.unlink()
    checks = [*verify_structure(out, healed.ckpt), *verify_bytes(out, healed.ckpt)]
    require(checks)
    said = next(check.detail for check in checks if check.name == "tensor bytes")
    size = sum(map(len, healed.values.values()))
    assert said.startswith(
        f"{open_checkpoint(out).nbytes - size} bytes equal the source's; {len(healed.values)} tensors"
    )


def test_a_flipped_bit_is_found_in_healed_tensors_and_in_others(healed: Healed) -> None:
    out, changed = healed.prune(), 0
    source = {name: (truth.dtype, truth.shape, truth.data) for name, truth in healed.model.tensors.items()}
    for name, truth in healed.expected().items():
        shard = edit_bytes(out, name, len(truth[2]) - 1)
        found = failed(verify_bytes(out, healed.ckpt))
        assert found.keys() == {"tensor bytes"} and f"{out / shard}: tensor {name} " in found["tensor bytes"]
        assert ";" not in found["tensor bytes"]
        edit_bytes(out, name, len(truth[2]) - 1)
        changed += truth not in source.values()
    assert changed >= len(healed.values)
    require(verify_bytes(out, healed.ckpt))


def test_the_sources_own_values_in_a_healed_tensor_are_found(one: Healed) -> None:
    """A checkpoint of the same plan without its new values is not taken for the healed one."""
    prune(one.ckpt, one.geometry, one.plan.beside(one.folder, None), one.folder / "plain", max_shard_size=2000)
    out = one.prune()
    for shard in out.glob("*.safetensors"):
        shutil.copy(one.folder / "plain" / shard.name, shard)
    assert failed(verify_bytes(out, one.ckpt)).keys() == {"tensor bytes"}


def test_killed_at_every_call_and_resumed(memory: Path) -> None:
    case = Healed(memory, deepseek())
    assert len(killed_at_every_call(case.ckpt.path, case.plan, memory, "parts")) > 80


def test_other_new_values_are_another_run(one: Healed) -> None:
    """What was begun with other values is not carried on."""

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(one.ckpt, one.geometry, one.plan, one.folder / "out", max_shard_size=1500, progress=stop)
    bare = one.plan.beside(one.folder, None)
    other, _ = write_values(one.folder / "other", one.ckpt, one.geometry, bare, list(one.values), seed=6)
    with pytest.raises(DestinationError, match="plan"):
        prune(one.ckpt, one.geometry, other, one.folder / "out", max_shard_size=1500)
    result = prune(one.ckpt, one.geometry, one.plan, one.folder / "out", max_shard_size=1500)
    assert result.resumed and contents(one.folder / "out") == one.expected()


def test_links_are_refused(tmp_path: Path) -> None:
    ckpt, geometry = opened(deepseek().write(tmp_path / "in", fit=True))
    whole = plan_for(ckpt, geometry, [range(8)] * 2, top_k=2)
    prune(ckpt, geometry, whole, tmp_path / "linked", link=True)
    name = down_projections(ckpt, geometry, whole)[0]
    plan, _ = write_values(tmp_path / FILE, ckpt, geometry, whole, [name])
    with pytest.raises(UsageError, match=f"--link needs a plan that changes no tensor: 1 of .*, as {name}"):
        prune(ckpt, geometry, plan, tmp_path / "out", link=True)
    assert not (tmp_path / "out").exists()
    prune(ckpt, geometry, plan, tmp_path / "out")
    require(verify_structure(tmp_path / "out", ckpt) + verify_bytes(tmp_path / "out", ckpt))


@pytest.fixture
def hub() -> Iterator[Counting]:
    server = Counting()
    with server:
        yield server


@pytest.mark.parametrize("make", [wide, fused, deepseek])
def test_pruned_from_the_hub_it_is_the_same_and_healed_tensors_are_not_fetched(
    make: Callable[[], Model], hub: Counting, tmp_path: Path
) -> None:
    case = Case(hub, tmp_path, make())
    ckpt, geometry = opened(case.local)
    bare = Plan.load(case.plan)
    plan, values = write_values(tmp_path / FILE, ckpt, geometry, bare, down_projections(ckpt, geometry, bare))
    plan.save(case.plan)
    ran = case.prune("remote", "--max-shard-size", "100kB")
    assert ran.code == 0 and TOKEN not in ran.err, ran.err
    hashes = {name: blob.sha256 for name, blob in hub.repositories[NAME].commits[case.commit].items() if blob.lfs}
    if make is not deepseek:  # whose tensors are shorter than what another request costs
        for name in values:
            info = ckpt.tensors[name]
            asked = [(a, b) for s, a, b in hub.ranges() if s == hashes[info.shard]]
            assert not any(a < info.end and b > info.start for a, b in asked), name
        assert hub.sent < open_checkpoint(tmp_path / "remote").nbytes + case.headers() - 0.9 * sum(
            map(len, values.values())
        )
    assert case.written() == case.expected("--max-shard-size", "100kB")


def test_a_file_that_goes_while_it_is_pruned_from_the_hub(hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, wide())
    ckpt, geometry = opened(case.local)
    bare = Plan.load(case.plan)
    plan, _ = write_values(tmp_path / FILE, ckpt, geometry, bare, down_projections(ckpt, geometry, bare))
    plan.save(case.plan)
    hub.countdown = 12
    process = case.start("prune", NAME, tmp_path / "remote", "--plan", case.plan)
    assert hub.stalled.wait(60)
    (tmp_path / FILE).unlink()
    hub.released.set()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 3 and FILE in told and "Traceback" not in told, told
    assert not (tmp_path / "remote").exists()


def rewrite_header(path: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


TENSOR = "model.layers.1.mlp.experts.2.down_proj.weight"
LAST = "model.layers.2.mlp.experts.6.down_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (Path.unlink, "no such file"),
    "a folder": (into_folder, "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
    "no safetensors": (lambda path: path.write_bytes(b"x" * 1000), "header"),
    "another schema": (
        lambda path: rewrite_header(path, lambda h: h["__metadata__"].update(schema="expertcut.deltas/2")),
        "schema is 'expertcut.deltas/2', expected 'expertcut.deltas/1'",
    ),
    "no schema": (lambda path: rewrite_header(path, lambda h: h.pop("__metadata__")), "schema is None, expected"),
    "a tensor is missing": (
        lambda path: rewrite_header(path, lambda h: h.update(other=h.pop(TENSOR))), f"holds no {TENSOR}",
    ),
    "another dtype": (
        lambda path: rewrite_header(path, lambda h: h[TENSOR].update(dtype="F16")),
        rf"{TENSOR} is F16 \[6, 10\], expected BF16 \[6, 10\]",
    ),
    "another shape": (
        lambda path: rewrite_header(path, lambda h: h[TENSOR].update(shape=[10, 6])),
        rf"{TENSOR} is BF16 \[10, 6\], expected BF16 \[6, 10\]",
    ),
    "other bytes": (flip, f"{LAST} does not have the sha256 that the plan gives"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_before_anything_is_written(
    damage: str, one: Healed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {TENSOR, LAST} <= one.values.keys() and list(one.values)[-1] == LAST
    change, said = DAMAGES[damage]
    change(one.file)
    before = listing(one.folder)
    with pytest.raises(PlanError, match=said) as caught:
        one.prune()
    assert str(one.file) in caught.value.message and caught.value.hint
    capsys.readouterr()
    assert run(["prune", str(one.ckpt.path), str(one.folder / "out"), "--plan", str(one.path)]) == 4
    shown = capsys.readouterr()
    assert FILE in shown.err and re.search(said, shown.err) and not shown.out
    assert listing(one.folder) == before


def test_other_bytes_are_refused_where_they_are_read(one: Healed) -> None:
    flip(one.file)
    infos = new_tensors(one.ckpt, one.geometry, one.plan)
    assert one.plan.deltas is not None
    digests = one.plan.deltas.tensors
    assert read_new(infos[TENSOR], digests[TENSOR]).tobytes() == one.values[TENSOR]
    with pytest.raises(PlanError, match=f"{FILE}: {LAST} does not have the sha256"):
        read_new(infos[LAST], digests[LAST])
    with pytest.raises(PlanError, match=LAST):
        copied(infos, one.folder / "part", infos, digests)
    one.file.unlink()
    with pytest.raises(PlanError, match="cannot be read: No such file"):
        read_new(infos[TENSOR], digests[TENSOR])
    assert listing(one.folder) == ["in", "plan.json"]


def test_some_of_a_file_in_its_own_place(one: Healed) -> None:
    infos = new_tensors(one.ckpt, one.geometry, one.plan)
    assert one.plan.deltas is not None
    deltas = copied(infos, one.file, [LAST, TENSOR], one.plan.deltas.tensors)
    assert list(deltas.tensors) == [LAST, TENSOR] and deltas.file == FILE
    assert deltas.tensors.items() <= one.plan.deltas.tensors.items()
    fewer = one.plan.beside(one.folder, deltas)
    found = new_tensors(one.ckpt, one.geometry, fewer)
    for name in (LAST, TENSOR):
        assert read_new(found[name], deltas.tensors[name]).tobytes() == one.values[name]
    with pytest.raises(PlanError, match="holds no "):
        new_tensors(one.ckpt, one.geometry, one.plan)


WRONG = {
    "model.embed_tokens.weight": "model.embed_tokens.weight, which is in no MoE layer",
    "model.layers.1.self_attn.q_proj.weight": "q_proj.weight, which is in no MoE layer",
    "model.layers.3.mlp.experts.0.down_proj.weight": "model.layers.3.* which is in no MoE layer",
    "model.layers.1.mlp.experts.1.down_proj.weight": "experts.1.down_proj.weight, an expert that it drops",
    "model.layers.1.mlp.experts.99.down_proj.weight": "experts.99.down_proj.weight, which the model lacks",
    "nothing": "nothing, which is in no MoE layer",
}
"""Tensors that a plan can have no new values for, and what is said."""


@pytest.mark.parametrize("name", WRONG)
def test_a_plan_with_new_values_of_other_tensors_is_refused(name: str, one: Healed) -> None:
    document = json.loads(one.path.read_text())
    document["deltas"]["tensors"][name] = document["deltas"]["tensors"][TENSOR]
    one.path.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=WRONG[name]):
        prune(one.ckpt, one.geometry, Plan.load(one.path), one.folder / "out")
    assert listing(one.folder) == ["in", FILE, "plan.json"]


@pytest.mark.parametrize("file", ["../new.safetensors", "/new.safetensors", "a/b", "a\\b", ""])
def test_a_plan_names_a_file_of_its_own_folder(file: str, one: Healed) -> None:
    document = json.loads(one.path.read_text())
    document["deltas"]["file"] = file
    one.path.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=r"\$\.deltas\.file: "):
        Plan.load(one.path)


@pytest.mark.parametrize("file", ["..", ".", "x" * 300, "\0", "new.safetensors\n"])
def test_odd_names_are_files_that_are_not_there(file: str, one: Healed) -> None:
    document = json.loads(one.path.read_text())
    document["deltas"]["file"] = file
    one.path.write_text(json.dumps(document))
    with pytest.raises(PlanError, match="no such file"):
        prune(one.ckpt, one.geometry, Plan.load(one.path), one.folder / "out")


@pytest.mark.parametrize("change", [{"tensors": {}}, {"tensors": {TENSOR: "0" * 63}}, {"tensors": {TENSOR: "G" * 64}}])
def test_a_plan_with_no_tensors_or_no_sum_is_refused(change: dict[str, object], one: Healed) -> None:
    document = json.loads(one.path.read_text())
    document["deltas"] |= change
    one.path.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=r"\$\.deltas\.tensors"):
        Plan.load(one.path)


def test_a_plan_that_was_not_read_from_a_file_does_not_know_where_the_values_are(one: Healed) -> None:
    plan = Plan.model_validate(json.loads(one.path.read_text()))
    with pytest.raises(PlanError, match="not beside this plan"):
        prune(one.ckpt, one.geometry, plan, one.folder / "out")


def test_a_plan_beside_other_values_is_another_plan(one: Healed) -> None:
    bare = one.plan.beside(one.folder, None)
    assert one.plan.deltas_path == one.file and bare.deltas is None and bare != one.plan
    assert '"deltas"' not in bare.to_text()
    with pytest.raises(PlanError, match="not beside this plan"):
        bare.deltas_path  # noqa: B018


Announced = list[tuple[str, str, tuple[int, ...]]]
TWO: Announced = [("a", "F32", (2, 3)), ("b", "BF16", (5,))]


def test_a_finished_file_is_as_it_was_announced(tmp_path: Path) -> None:
    with DeltaFile(tmp_path / FILE, TWO) as file:
        file.add("a", np.arange(24, dtype=np.uint8))
        file.add("b", np.arange(10, dtype=np.uint8))
        assert not (tmp_path / FILE).exists()
        deltas = file.finish()
    tensors, metadata = read_header(tmp_path / FILE, FILE)
    assert [(t.name, t.dtype, t.shape) for t in tensors] == TWO and metadata["schema"] == "expertcut.deltas/1"
    assert deltas.file == FILE and list(deltas.tensors) == ["a", "b"] and listing(tmp_path) == [FILE]


@pytest.mark.parametrize("added", [0, 1, 2])
@pytest.mark.parametrize("before", [False, True])
def test_an_error_on_the_way_leaves_what_was_there(added: int, before: bool, tmp_path: Path) -> None:
    if before:
        with DeltaFile(tmp_path / FILE, [("a", "U8", (3,))]) as file:
            file.add("a", np.zeros(3, np.uint8))
            file.finish()
    mine = (tmp_path / FILE).read_bytes() if before else b""
    with pytest.raises(KeyboardInterrupt), DeltaFile(tmp_path / FILE, TWO) as file:
        for name, size in (("a", 24), ("b", 10))[:added]:
            file.add(name, np.zeros(size, np.uint8))
        raise KeyboardInterrupt
    assert listing(tmp_path) == [FILE] * before
    assert not before or (tmp_path / FILE).read_bytes() == mine


@pytest.mark.parametrize("content", [b"mine", DEMO_WEIGHTS])
def test_what_is_no_file_of_new_values_is_not_replaced(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(DestinationError, match=FILE):
        DeltaFile(tmp_path / FILE, TWO)
    assert listing(tmp_path) == [FILE] and (tmp_path / FILE).read_bytes() == content


def test_leaving_without_finishing_leaves_no_file(tmp_path: Path) -> None:
    with DeltaFile(tmp_path / FILE, TWO):
        pass
    assert listing(tmp_path) == []


@pytest.mark.parametrize("left", [0, 200_000])
def test_a_full_disk_leaves_nothing_and_is_said(left: int, disk: Path) -> None:
    """The disk is full at the header already, or in the values."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - left))
    with (
        pytest.raises(DestinationError, match=f"{FILE}: cannot be written: No space left on device"),
        DeltaFile(disk / FILE, [("a", "U8", (300_000,))]) as file,
    ):
        file.add("a", np.zeros(300_000, np.uint8))
    assert listing(disk) == ["filler"]


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match=f"none/{FILE}: cannot be written: No such file"):
        DeltaFile(tmp_path / "none" / FILE, TWO)
    (tmp_path / FILE).mkdir()
    with pytest.raises(DestinationError, match="not a regular file"):
        DeltaFile(tmp_path / FILE, [])
    assert listing(tmp_path) == [FILE]
