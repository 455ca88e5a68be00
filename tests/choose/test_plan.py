"""The plan file and its checks."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from choose_models import ANYONE, geometry, plan
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from expertcut.choose import LayerPlan, Plan, Source, kept_by_block, validate
from expertcut.errors import DestinationError, PlanError
from expertcut.model import Fingerprint

LAYERS = st.builds(
    LayerPlan,
    layer=st.integers(0, 200),
    kept=st.sets(st.integers(0, 600)).map(lambda ids: tuple(sorted(ids))),
    top_k=st.none() | st.integers(1, 16),
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
PLANS = st.builds(
    Plan,
    source=st.builds(
        Source,
        name=st.text(),
        fingerprint=st.builds(
            Fingerprint,
            geometry=st.text(),
            sketch=st.dictionaries(st.text(), st.lists(st.floats(-9, 9), max_size=8).map(tuple), max_size=3),
        ),
    ),
    layers=st.dictionaries(st.text(), LAYERS, min_size=1, max_size=4),
    provenance=st.dictionaries(st.text(), JSON, max_size=4),
)


@given(PLANS)
def test_a_plan_survives_the_disk(tmp_path_factory: pytest.TempPathFactory, made: Plan) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    made.save(path)
    assert Plan.load(path) == made
    first = path.read_bytes()
    Plan.load(path).save(path)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_the_file_is_readable_and_says_only_what_changes(tmp_path: Path) -> None:
    plan({1: (0, 2, 5), 2: (1, 2, 3)}).save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert list(json.loads(text)) == ["schema", "source", "layers", "groups", "mtp", "provenance"]
    assert json.loads(text)["schema"] == "expertcut.plan/1"
    assert '    "model.layers.1.mlp": {\n      "layer": 1,\n      "kept": [0, 2, 5]\n    },\n' in text
    assert text.endswith("}\n")


def test_save_replaces_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    plan({1: (0,)}).save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DestinationError, match=r"plan\.json: cannot be written: No space left on device"):
        plan({1: (1,)}).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("name", ["", "absent/plan.json", "file/plan.json", "x" * 300])
def test_places_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DestinationError):
        plan({1: (0,)}).save(tmp_path / name)


def without(*path: str) -> Callable[[dict[str, Any]], Any]:
    def edit(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return edit


def change(value: Any, *path: str) -> Callable[[dict[str, Any]], Any]:
    def edit(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return edit


ONE = "model.layers.1.mlp"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("expertcut.plan/2", "schema"), "$.schema is 'expertcut.plan/2', expected 'expertcut.plan/1'"),
        (without("schema"), "$.schema is None, expected"),
        (without("source"), "$.source: Field required"),
        (without("source", "fingerprint", "sketch"), "$.source.fingerprint.sketch: Field required"),
        (without("layers", ONE, "kept"), f'$.layers["{ONE}"].kept: Field required'),
        (
            change([0, "1"], "layers", ONE, "kept"),
            f'$.layers["{ONE}"].kept[1]: Input should be a valid integer, found "1"',
        ),
        (change([0, True], "layers", ONE, "kept"), f'$.layers["{ONE}"].kept[1]: Input should be a valid integer'),
        (change([0, 1.0], "layers", ONE, "kept"), f'$.layers["{ONE}"].kept[1]: Input should be a valid integer'),
        (change([-1, 1], "layers", ONE, "kept"), f'$.layers["{ONE}"].kept[0]: Input should be greater than or equal'),
        (change("x" * 99, "layers", ONE, "kept"), f'$.layers["{ONE}"].kept: Input should be a valid tuple, found "xxx'),
        (change(0, "layers", ONE, "top_k"), f'$.layers["{ONE}"].top_k: Input should be greater than or equal to 1'),
        (change(1.5, "layers", ONE, "gian"), f'$.layers["{ONE}"].gian: Extra inputs are not permitted, found 1.5'),
        (change({}, "layers"), "$.layers: Dictionary should have at least 1 item"),
        (change("split", "groups"), "$.groups: Input should be 'keep', found \"split\""),
        (change("keep", "mtp"), "$.mtp: Input should be 'lockstep' or 'drop'"),
        (change(None, "provenance"), "$.provenance: Input should be a valid dictionary, found null"),
        (change(1, "a\nb"), '$["a\\nb"]: Extra inputs are not permitted, found 1'),
    ],
)
def test_files_of_another_shape(tmp_path: Path, edit: Callable[[Any], Any], message: str) -> None:
    path = tmp_path / "plan.json"
    plan({1: (0, 1), 2: (0, 1)}).save(path)
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=re.escape(f"{path}: {message}")) as caught:
        Plan.load(path)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < len(str(path)) + 160
    assert caught.value.hint


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "invalid JSON"),
        (b"{", "invalid JSON"),
        (b"[]", "$.schema is 'list', expected"),
        (b"\xff\xfe", "invalid UTF-8"),
        (b'{"layers": 1, "layers": 2}', "duplicate JSON key layers"),
        (b"[" * 100_000, "invalid JSON"),
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(raw)
    with pytest.raises(PlanError, match=re.escape(f"{path}: {message}")):
        Plan.load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"absent\.json: no such file"):
        Plan.load(tmp_path / "absent.json")


@given(st.binary(max_size=40), st.integers(0, 2000))
def test_damage_is_a_plan_error_or_another_plan(
    tmp_path_factory: pytest.TempPathFactory, patch: bytes, offset: int
) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan({1: (0, 1), 2: (0, 1)}).save(path)
    raw = path.read_bytes()
    offset %= len(raw)
    path.write_bytes(raw[:offset] + patch + raw[offset + len(patch) :])
    try:
        assert isinstance(Plan.load(path), Plan)
    except PlanError as error:
        assert str(path) in error.message
        assert "\n" not in error.message


def test_plans_are_frozen() -> None:
    made = plan({1: (0,)})
    with pytest.raises(ValidationError):
        made.groups = "keep"


IDENTITY = tuple(range(8))


@pytest.mark.parametrize(
    "model",
    [geometry(), geometry(n_group=4, topk_group=2), geometry(mtp=True), geometry(n_group=8, topk_group=4)],
    ids=["plain", "grouped", "mtp", "one expert per group"],
)
def test_the_identity_is_valid(model: Any) -> None:
    validate(plan({1: IDENTITY, 2: IDENTITY, 3: IDENTITY}), model)


def check(kept: dict[int, tuple[int, ...]], top_k: int | None = None, **model: Any) -> None:
    validate(plan(kept, top_k), geometry(**model))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((), "layer 2 keeps no experts"),
        ((0, 8), "layer 2: expert 8 is kept, but ids go from 0 to 7"),
        ((3, 1), "layer 2: kept ids must be ascending and distinct, but 1 follows 3"),
        ((3, 3), "layer 2: kept ids must be ascending and distinct, but 3 follows 3"),
        ((0, 1, 2), "layer 2: experts is 3, expected 2 as in layer 1"),
    ],
)
def test_ids(ids: tuple[int, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check({1: (0, 1), 2: ids, 3: (0, 1)})


def test_blocks_are_matched_by_prefix() -> None:
    with pytest.raises(PlanError, match=r"the plan lacks model\.layers\.3\.mlp \(layer 3\)"):
        check({1: (0, 1), 2: (0, 1)})
    with pytest.raises(PlanError, match=r"the plan names model\.layers\.0\.mlp \(layer 0\), which the model lacks"):
        check({0: (0, 1), 1: (0, 1), 2: (0, 1), 3: (0, 1)})
    moved = Plan(source=ANYONE, layers={"model.layers.1.mlp": LayerPlan(layer=2, kept=(0, 1))})
    with pytest.raises(PlanError, match=r"model\.layers\.1\.mlp: the plan says layer 2, the model layer 1"):
        validate(moved, geometry(moe_layers=(1,)))


def test_prediction_layers_follow_the_last_layer_unless_listed() -> None:
    trunk = {1: (0, 1), 2: (2, 3), 3: (4, 5)}
    blocks = [f"model.layers.{n}.mlp" for n in (1, 2, 3, 4)]
    with_mtp, plain = geometry(mtp=True), geometry()
    assert kept_by_block(plan(trunk), with_mtp) == dict(zip(blocks, [(0, 1), (2, 3), (4, 5), (4, 5)], strict=True))
    assert kept_by_block(plan(trunk | {4: (6, 7)}), with_mtp)[blocks[3]] == (6, 7)
    assert list(kept_by_block(plan(trunk | {4: (6, 7)}), plain)) == blocks[:3], "a sibling without the layer"
    validate(plan(trunk | {4: (6, 7)}), with_mtp)
    with pytest.raises(PlanError, match="layer 4: experts is 3, expected 2"):
        validate(plan(trunk | {4: (5, 6, 7)}), with_mtp)


def test_groups_keep_equal_numbers() -> None:
    with pytest.raises(PlanError, match=r"layer 2: the groups keep \[3, 1\] experts, expected equal numbers in all 2"):
        check({1: (0, 1, 4, 5), 2: (0, 1, 2, 4), 3: (0, 1, 4, 5)}, n_group=2)


def test_groups_keep_what_the_router_ranks_them_by() -> None:
    with pytest.raises(PlanError, match="layer 1: 1 expert kept per group, but the router ranks .* 2 best") as caught:
        check({1: (0, 4), 2: (0, 4), 3: (0, 4)}, top_k=1, n_group=2)
    assert caught.value.hint == "keep at least 4 experts"


@pytest.mark.parametrize(
    ("count", "top_k", "model", "hint"),
    [
        (3, None, {"top_k": 4}, "keep at least 4 or pass --top-k 3"),
        (3, 4, {"top_k": 2}, "keep at least 4 or pass --top-k 3"),
        (3, 9, {}, "pass --top-k 3"),
        (8, None, {"experts": 16, "top_k": 5, "n_group": 4, "topk_group": 2}, "keep at least 12 or pass --top-k 4"),
    ],
)
def test_top_k_within_reach(count: int, top_k: int | None, model: dict[str, Any], hint: str) -> None:
    size = model.get("experts", 8) // model.get("n_group", 1)
    each = count // model.get("n_group", 1)
    ids = tuple(g * size + i for g in range(model.get("n_group", 1)) for i in range(each))
    with pytest.raises(PlanError, match=r"top_k=\d exceeds the \d experts kept in layer 1") as caught:
        validate(plan(dict.fromkeys((1, 2, 3), ids), top_k), geometry(**model))
    assert caught.value.hint == hint


def test_a_smaller_top_k_fits() -> None:
    validate(plan(dict.fromkeys((1, 2, 3), (0, 1, 2)), 3), geometry(top_k=4))


def test_top_k_is_one_for_all_layers() -> None:
    layers = {f"model.layers.{n}.mlp": LayerPlan(layer=n, kept=(0, 1), top_k=k) for n, k in ((1, 2), (2, None), (3, 1))}
    made = Plan(source=ANYONE, layers=layers)
    with pytest.raises(PlanError, match="layer 3: top_k is 1, expected 2 as in layer 1"):
        validate(made, geometry(top_k=2))
    assert made.top_k(geometry(top_k=2)) == 2


@given(st.sampled_from([1, 2, 4]), st.integers(2, 6), st.data())
def test_group_equal_plans_are_valid_exactly_if_top_k_is_in_reach(n_group: int, size: int, data: st.DataObject) -> None:
    topk_group = data.draw(st.integers(1, n_group))
    quota = data.draw(st.integers(min(2, size), size))
    top_k = data.draw(st.integers(1, 16))
    model = geometry(n_group * size, n_group=n_group, topk_group=topk_group)
    draw = st.lists(st.integers(0, size - 1), min_size=quota, max_size=quota, unique=True).map(sorted)
    kept = {n: tuple(g * size + i for g in range(n_group) for i in data.draw(draw)) for n in (1, 2, 3)}
    if top_k <= topk_group * quota:
        validate(plan(kept, top_k), model)
    else:
        with pytest.raises(PlanError, match=f"top_k={top_k} exceeds the {topk_group * quota} experts"):
            validate(plan(kept, top_k), model)
