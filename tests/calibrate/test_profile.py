"""The profile file: pooling, merging, and what is said when it is damaged or does not fit."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertcut.calibrate.profile import (
    ARRAYS,
    CONTRIBUTION,
    JSON,
    LACKING,
    MAXIMA_E,
    MIXED_E,
    MOMENTS,
    PAIRS,
    SUMS_E,
    SUMS_K,
    BlockRecord,
    DataRecord,
    Profile,
    ProfileMeta,
    merge,
)
from expertcut.errors import ProfileError, UsageError
from expertcut.model import Fingerprint

E, K, H = 5, 3, 4
BLOCKS = ("model.layers.1.mlp", "model.layers.3.mlp")
POOLED = ("count", *SUMS_E, *MIXED_E, CONTRIBUTION, "rank_count", "rank_mass", *SUMS_K)


def made(
    domains: Sequence[str] = ("prose", "code"), *, seed: int = 0, pair_domains: bool = False, moments: bool = False,
    **meta: Any,
) -> Profile:  # fmt: skip
    """A profile of whole numbers, so that sums are exact in any order."""
    random = np.random.default_rng(seed)
    d, p = len(domains), len(domains) if pair_domains else 1
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("tokens", "out_sq", "entropy"), (d,))
    shapes |= dict.fromkeys(("count", *SUMS_E, *MIXED_E, CONTRIBUTION, *MAXIMA_E), (d, E))
    shapes |= dict.fromkeys(("rank_count", "rank_mass"), (d, E, K))
    shapes |= dict.fromkeys(SUMS_K, (d, K)) | dict.fromkeys(PAIRS, (p, E * (E + 1) // 2))
    shapes |= dict.fromkeys(MOMENTS if moments else (), (d, E, H))
    integers = ("tokens", "count", "rank_count", "coact")
    arrays = {
        f"{block}/{stat}": random.integers(0, 1000, shape).astype(np.int64 if stat in integers else np.float64)
        for block in BLOCKS
        for stat, shape in shapes.items()
    }
    record = DataRecord(
        fingerprint=f"data-{seed}", tokens=dict.fromkeys(domains, 10 + seed), seq_len=16, packed=True, seed=seed,
        sources=[{"name": f"source-{seed}"}],
    )  # fmt: skip
    sketch = {block: tuple(0.25 * i for i in range(8)) for block in BLOCKS}
    facts: dict[str, Any] = {
        "source": "model", "fingerprint": Fingerprint(geometry="g", sketch=sketch), "tokenizer": "t", "data": [record],
        "domains": list(domains), "experts": E, "top_k": K, "pair_domains": pair_domains, "moments": moments,
        "blocks": [BlockRecord(prefix=block, layer=int(block.split(".")[2])) for block in BLOCKS],
        "dtype": "float32", "versions": {"torch": "2"},
    }  # fmt: skip
    return Profile(ProfileMeta(**facts | meta), arrays)


def totals(profile: Profile, prefix: str) -> dict[str, Any]:
    stats = profile.layer(prefix)
    named = {name: getattr(stats, name) for name in (*POOLED, *MAXIMA_E, "tokens", "out_sq", "entropy", *PAIRS)}
    return named


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    made().save(tmp_path / "p")
    return tmp_path / "p"


@pytest.mark.parametrize("pair_domains", [False, True])
def test_round_trip(tmp_path: Path, pair_domains: bool) -> None:
    profile = made(pair_domains=pair_domains, moments=True)
    profile.save(tmp_path)
    found = Profile.load(tmp_path)
    assert found.meta == profile.meta
    assert set(found.arrays) == set(profile.arrays)
    for name, values in profile.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], values)
        assert found.arrays[name].dtype == values.dtype
    assert found.digest() == profile.digest()
    assert sorted(p.name for p in tmp_path.iterdir()) == [JSON, ARRAYS]


def test_no_pickle_and_a_schema(saved: Path) -> None:
    assert json.loads((saved / JSON).read_text())["schema"] == "expertcut.profile/1"
    assert (saved / ARRAYS).read_bytes()[8:9] == b"{"


def test_arrays_are_read_when_used(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening reads the header; a block's matrices are read when asked for."""
    found = Profile.load(saved)
    read: list[str] = []
    lazy = type(found.arrays)
    get = lazy.__getitem__

    def noted(self: Any, name: str) -> np.ndarray:
        read.append(name)
        return get(self, name)

    monkeypatch.setattr(lazy, "__getitem__", noted)
    stats = found.layer(BLOCKS[1])
    assert read and all(name.startswith(BLOCKS[1]) for name in read)
    assert not {name.rpartition("/")[2] for name in read} & {*PAIRS, *LACKING}
    read.clear()
    assert stats.gram.shape == (E, E)
    assert read == [f"{BLOCKS[1]}/gram"]


def test_matrices_are_unpacked_from_their_halves() -> None:
    profile = made()
    half = profile.arrays[f"{BLOCKS[0]}/gram"][0]
    gram = profile.layer(BLOCKS[0]).gram
    np.testing.assert_array_equal(gram, gram.T)
    np.testing.assert_array_equal(gram[np.tril_indices(E)], half)


def test_weights_multiply_the_sums_of_a_domain() -> None:
    profile = made(("a", "b", "c"), pair_domains=True)
    stats = profile.layer(BLOCKS[0], {"a": 2, "c": 0.5})
    for name in (*POOLED, "tokens", "out_sq", "entropy"):
        values = profile.arrays[f"{BLOCKS[0]}/{name}"]
        np.testing.assert_allclose(getattr(stats, name), 2 * values[0] + 0.5 * values[2], err_msg=name)
    for name in MAXIMA_E:
        values = profile.arrays[f"{BLOCKS[0]}/{name}"]
        np.testing.assert_array_equal(getattr(stats, name), np.maximum(values[0], values[2]), err_msg=name)
    halves = profile.arrays[f"{BLOCKS[0]}/coact"]
    np.testing.assert_allclose(stats.coact[np.tril_indices(E)], 2 * halves[0] + 0.5 * halves[2])
    unweighted = profile.layer(BLOCKS[0])
    np.testing.assert_array_equal(unweighted.count, profile.arrays[f"{BLOCKS[0]}/count"].sum(axis=0))


@pytest.mark.parametrize("weights", [{"d": 1}, {"prose": -1}, {"prose": float("nan")}, {"prose": 0}, {}])
def test_weights_that_make_no_sense(weights: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="domain"):
        made().layer(BLOCKS[0], weights)


def test_unknown_block() -> None:
    with pytest.raises(ProfileError, match=r"layers\.2.*layers\.1.*layers\.3"):
        made().layer("model.layers.2.mlp")


@pytest.mark.parametrize("first", [("prose", "code"), ("prose",), ("code", "prose")])
@pytest.mark.parametrize("second", [("prose", "code"), ("math",), ("math", "prose")])
@pytest.mark.parametrize("pair_domains", [False, True])
def test_merging_adds(first: tuple[str, ...], second: tuple[str, ...], pair_domains: bool) -> None:
    a, b = made(first, seed=1, pair_domains=pair_domains), made(second, seed=2, pair_domains=pair_domains)
    both = merge(a, b)
    both._check(Path("merged"))
    assert both.meta.domains == [*first, *(d for d in second if d not in first)]
    assert both.meta.tokens() == {d: 11 * (d in first) + 12 * (d in second) for d in both.meta.domains}
    for prefix in BLOCKS:
        for name, value in totals(both, prefix).items():
            parts = totals(a, prefix)[name], totals(b, prefix)[name]
            expected = np.maximum(*parts) if name in MAXIMA_E else parts[0] + parts[1]
            np.testing.assert_array_equal(value, expected, err_msg=name)
        for d, domain in enumerate(both.meta.domains):
            counts = [p.arrays[f"{prefix}/count"][p.meta.domains.index(domain)]
                      for p in (a, b) if domain in p.meta.domains]  # fmt: skip
            np.testing.assert_array_equal(both.arrays[f"{prefix}/count"][d], np.sum(counts, axis=0))


def test_merging_in_any_order() -> None:
    a, b, c = (made((f"only-{i}", "shared"), seed=i) for i in range(3))
    left, right = merge(merge(a, b), c), merge(c, merge(b, a))
    assert left.meta.data == right.meta.data
    for prefix in BLOCKS:
        for name, value in totals(left, prefix).items():
            np.testing.assert_array_equal(value, totals(right, prefix)[name], err_msg=name)
        for domain in left.meta.domains:
            one = [p.layer(prefix, {domain: 1}) for p in (left, right)]
            np.testing.assert_array_equal(one[0].gate_sum, one[1].gate_sum)


def test_merging_keeps_what_both_have() -> None:
    fine, coarse = made(seed=1, pair_domains=True, moments=True), made(seed=2)
    for both in (merge(fine, coarse), merge(coarse, fine)):
        assert not both.meta.pair_domains and not both.meta.moments
        both._check(Path("merged"))
        assert not any(name.endswith(MOMENTS) for name in both.arrays)
        expected = fine.layer(BLOCKS[0]).gram + coarse.layer(BLOCKS[0]).gram
        np.testing.assert_array_equal(both.layer(BLOCKS[0]).gram, expected)
    both = merge(fine, made(seed=3, pair_domains=True, moments=True))
    assert both.meta.pair_domains and both.meta.moments
    assert both.arrays[f"{BLOCKS[0]}/out_sum"].shape == (2, E, H)


def test_merged_files_can_be_loaded(tmp_path: Path) -> None:
    made(seed=1).save(tmp_path / "a")
    made(("math",), seed=2).save(tmp_path / "b")
    merge(Profile.load(tmp_path / "a"), Profile.load(tmp_path / "b")).save(tmp_path / "c")
    assert Profile.load(tmp_path / "c").meta.domains == ["prose", "code", "math"]


OTHER = Fingerprint(geometry="g", sketch={block: (9.0,) * 8 for block in BLOCKS})


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"tokenizer": "other"}, "tokenizer"),
        ({"experts": E + 1}, "experts"),
        ({"top_k": K - 1}, "top_k"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"blocks": [BlockRecord(prefix=BLOCKS[0], layer=1)]}, "blocks"),
        ({"fingerprint": Fingerprint(geometry="h", sketch={})}, "different models"),
        ({"fingerprint": OTHER, "source": "stranger"}, "stranger"),
    ],
)
def test_what_does_not_belong_together_is_not_merged(meta: dict[str, Any], words: str) -> None:
    with pytest.raises(ProfileError, match=words):
        merge(made(seed=1), made(seed=2, **meta))


def test_the_same_data_does_not_count_twice() -> None:
    with pytest.raises(ProfileError, match="count twice"):
        merge(made(seed=1), made(seed=1))
    both = merge(made(seed=1), made(seed=2))
    with pytest.raises(ProfileError, match="data-2"):
        merge(both, made(seed=2))


def test_digest_tells_profiles_apart() -> None:
    assert len({made(seed=seed).digest() for seed in range(3)} | {made().digest()}) == 3


def _edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        meta = json.loads((folder / JSON).read_text())
        change(meta)
        (folder / JSON).write_text(json.dumps(meta))

    return damage


def _resave(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    profile = made()
    arrays = dict(profile.arrays)
    change(arrays)
    Profile(profile.meta, arrays).save(folder)


GATE = f"{BLOCKS[1]}/gate_sum"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no json": (lambda f: (f / JSON).unlink(), JSON),
    "no arrays": (lambda f: (f / ARRAYS).unlink(), ARRAYS),
    "empty json": (lambda f: (f / JSON).write_bytes(b""), JSON),
    "json cut": (lambda f: (f / JSON).write_bytes((f / JSON).read_bytes()[:100]), JSON),
    "json not utf-8": (lambda f: (f / JSON).write_bytes(b'{"schema": "\xff"}'), JSON),
    "json a list": (lambda f: (f / JSON).write_text("[]"), JSON),
    "other schema": (_edit(lambda m: m.update(schema="expertcut.profile/9")), "schema"),
    "unknown field": (_edit(lambda m: m.update(extra=1)), "extra"),
    "field missing": (_edit(lambda m: m.pop("top_k")), "top_k"),
    "wrong type": (_edit(lambda m: m.update(experts="many")), "experts"),
    "more domains": (_edit(lambda m: m["domains"].append("math")), "expected"),
    "more experts": (_edit(lambda m: m.update(experts=E + 1)), "expected"),
    "other block": (_edit(lambda m: m["blocks"].append({"prefix": "x", "layer": 9})), "x/tokens is missing"),
    "arrays empty": (lambda f: (f / ARRAYS).write_bytes(b""), ARRAYS),
    "arrays cut": (lambda f: (f / ARRAYS).write_bytes((f / ARRAYS).read_bytes()[:-9]), ARRAYS),
    "arrays garbage": (lambda f: (f / ARRAYS).write_bytes(b"x" * 500), ARRAYS),
    "array missing": (lambda f: _resave(f, lambda a: a.__delitem__(GATE)), f"{GATE} is missing"),
    "array of another shape": (lambda f: _resave(f, lambda a: a.update({GATE: np.zeros((2, E + 1))})), GATE),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_files(what: str, saved: Path) -> None:
    damage, words = DAMAGES[what]
    damage(saved)
    with pytest.raises(ProfileError) as caught:
        Profile.load(saved)
    assert words in caught.value.message and str(saved) in caught.value.message
    assert "\n" not in caught.value.message


def test_no_profile_at_all(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no profile here") as caught:
        Profile.load(tmp_path / "nowhere")
    assert "expertcut profile" in str(caught.value.hint)
