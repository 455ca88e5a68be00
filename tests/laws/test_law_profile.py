"""Law 6: profiles add up, and neither streaming nor micro-batches nor padding change them."""

from pathlib import Path

import numpy as np
import pytest
from law_models import MODELS, Model, open_model
from reference import profile
from tiny_models import calibration, tokens

from expertcut.calibrate.data import Sequence
from expertcut.calibrate.profile import MAXIMA_E, TEXT, Profile, merge

LENGTHS = (31, 12, 25, 18, 40, 7, 22)
INTEGERS = ("count", "coact", "tokens")


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Model:
    return open_model(request.param, tmp_path_factory, demo_model)


def assert_same_sums(found: Profile, expected: Profile) -> None:
    """Counts exactly, the rest within float32 rounding; domains may be in another order."""
    assert set(found.arrays) == set(expected.arrays)
    assert found.meta.tokens() == expected.meta.tokens()
    order = [expected.meta.domains.index(domain) for domain in found.meta.domains]
    np.testing.assert_array_equal(found.arrays[TEXT], expected.arrays[TEXT])
    for name, values in expected.arrays.items():
        if name == TEXT:
            continue
        values = values[order] if len(values) == len(order) else values
        if name.endswith(INTEGERS):
            np.testing.assert_array_equal(found.arrays[name], values, err_msg=name)
        else:
            scale = float(np.abs(values).max())
            np.testing.assert_allclose(found.arrays[name], values, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


@pytest.fixture(scope="module")
def whole(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Everything in one micro-batch, padded."""
    return profile(model.folder, tokens(LENGTHS), tmp_path_factory.mktemp("whole"), micro_tokens=10**6, moments=True)


def test_law_6_profiles_add_up(model: Model, whole: Profile, tmp_path: Path) -> None:
    """Split across a domain: both parts have prose, only one has code."""
    sequences = tokens(LENGTHS).sequences
    prose = [s for s in sequences if s.domain == "prose"]
    code = [s for s in sequences if s.domain == "code"]
    one = profile(model.folder, calibration(prose[:2], ("prose",)), tmp_path / "a", moments=True)
    other = profile(model.folder, calibration([*code, *prose[2:]], ("code", "prose")), tmp_path / "b", moments=True)
    for both in (merge(one, other), merge(other, one)):
        assert_same_sums(both, whole)
    merge(one, other).save(tmp_path / "c")
    assert_same_sums(Profile.load(tmp_path / "c"), whole)
    for prefix in whole.prefixes:
        for stat in MAXIMA_E:
            largest = np.maximum(*(p.arrays[f"{prefix}/{stat}"].max(axis=0) for p in (one, other)))
            np.testing.assert_allclose(largest, getattr(whole.layer(prefix), stat), rtol=1e-4)


@pytest.mark.parametrize("micro_tokens", [1, 60, 100])
def test_law_6_any_micro_batch_gives_the_same_sums(
    model: Model, whole: Profile, micro_tokens: int, tmp_path: Path
) -> None:
    """One token: every sequence by itself, nothing padded. The others: padded to other lengths."""
    assert_same_sums(profile(model.folder, tokens(LENGTHS), tmp_path, micro_tokens=micro_tokens, moments=True), whole)


def test_law_6_streamed_is_resident(model: Model, whole: Profile, tmp_path: Path) -> None:
    resident = profile(model.folder, tokens(LENGTHS), tmp_path, micro_tokens=10**6, moments=True, resident=True)
    assert resident.meta == whole.meta
    for name, values in whole.arrays.items():
        np.testing.assert_array_equal(resident.arrays[name], values, err_msg=name)


def test_law_6_matrices_by_domain_add_up_to_the_pooled_ones(model: Model, whole: Profile, tmp_path: Path) -> None:
    fine = profile(model.folder, tokens(LENGTHS), tmp_path, micro_tokens=10**6, pair_domains=True)
    for prefix in whole.prefixes:
        for stat in ("coact", "coenergy", "gram"):
            pooled = getattr(whole.layer(prefix), stat)
            np.testing.assert_allclose(getattr(fine.layer(prefix), stat), pooled, rtol=1e-9, err_msg=stat)


def test_law_6_order_of_the_sequences_does_not_matter(model: Model, whole: Profile, tmp_path: Path) -> None:
    shuffled: list[Sequence] = list(reversed(tokens(LENGTHS).sequences))
    found = profile(model.folder, calibration(shuffled, ("code", "prose")), tmp_path, moments=True, micro_tokens=70)
    assert_same_sums(found, whole)
