"""Shared text is found wherever it stands and however it is cut; a licence header is no shared text."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from expertcut.calibrate.data import CalibrationSet, load_calibration
from expertcut.calibrate.data import Sequence as TokenSequence
from expertcut.calibrate.overlap import EVERY, LIMIT, MOST, Sketch, check_overlap, sequence_hashes
from expertcut.calibrate.tokenizer import Ids, Tokenizer, load_tokenizer
from expertcut.errors import DataError

RANDOM = np.random.default_rng()


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts whichever tests run."""
    monkeypatch.setattr(sys.modules[__name__], "RANDOM", np.random.default_rng(0))


def text(tokens: int) -> Ids:
    """Text that no other text shares."""
    return RANDOM.integers(0, 50_000, tokens)


def sketch_of(*sequences: Ids) -> Sketch:
    return Sketch("t", EVERY, sequence_hashes(sequences))


def heldout(**domains: Sequence[Ids]) -> CalibrationSet:
    sequences = tuple(TokenSequence(ids, name) for name, some in domains.items() for ids in some)
    sources = [{"name": f"{name}.jsonl", "domain": name} for name in domains]
    return CalibrationSet(sequences, tuple(domains), 10**6, True, 0, "", sources)


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return load_tokenizer(demo_model)


def test_shared_text_is_found_in_another_packing(tokenizer: Tokenizer) -> None:
    def ids(tokens: int | None, seq_len: int, packed: bool = True) -> list[Ids]:
        data = load_calibration(["builtin"], tokenizer, tokens=tokens, seq_len=seq_len, seed=1, packed=packed)
        return [s.ids for s in data.sequences]

    whole, part = sketch_of(*ids(None, 512)), ids(6000, 200, packed=False)
    hits, count = whole.shared(part)
    assert count > 50 and hits > 0.9 * count
    assert whole.shared([text(2000)])[0] == 0
    assert whole.shared([]) == (0, 0)


def test_hashes_are_thinned_fairly() -> None:
    for ids in (text(20_000), np.arange(20_000)):
        assert 900 < len(sequence_hashes([ids])) < 1600  # a sixteenth of 20,000 is 1,250
    assert len(sequence_hashes([np.arange(31)])) == 0


@pytest.mark.parametrize("tokens", [100, 10_000, 400_000])
def test_a_thinned_sketch_travels_as_text_and_still_compares(tokens: int) -> None:
    ids = text(tokens)
    fine = sketch_of(ids)
    thin = Sketch.parse(str(fine.thinned()))
    assert len(thin.hashes) <= MOST and (thin.every > EVERY) == (len(fine.hashes) > MOST)
    assert len(str(thin)) < 6000
    hits, count = thin.shared([ids])
    assert hits == count == len(thin.hashes)
    half = thin.shared([np.concatenate((ids[: tokens // 2], text(tokens // 2)))])
    assert tokens == 100 or half[0] / half[1] == pytest.approx(0.5, abs=0.06)
    assert thin.shared([text(tokens)])[0] == 0


@pytest.mark.parametrize("damaged", ["", "t:16", "t:16:!!!", "t:x:AAAA", "t:0:AAAAAA==", "t:16:AAA="])
def test_a_damaged_sketch_is_refused(damaged: str) -> None:
    with pytest.raises(ValueError):
        Sketch.parse(damaged)


def test_text_that_was_calibrated_on_is_refused_by_domain() -> None:
    seen, new = text(8000), text(8000)
    assert check_overlap(heldout(new=[new]), "t", {"plan.json": sketch_of(seen)}) == []
    with pytest.raises(DataError) as caught:
        check_overlap(heldout(new=[new, text(9000)], old=[seen[:4000]]), "t", {"plan.json": sketch_of(seen)})
    assert caught.value.message == (
        "100% of the held-out domain old (old.jsonl) is in the calibration text of plan.json, at most 50% may be"
    )
    parts = {f"part{i}": [seen[400 * i : 400 * i + 80]] for i in range(20)}
    with pytest.raises(DataError, match="100% of the held-out text is"):
        check_overlap(heldout(**parts), "t", {"plan.json": sketch_of(seen)})


def test_a_part_is_a_warning() -> None:
    seen = text(8000)
    (warning,) = check_overlap(heldout(mine=[np.concatenate((seen[:1500], text(6500)))]), "t", {"p": sketch_of(seen)})
    found = re.match(r"(\d+)% of the held-out domain mine \(mine.jsonl\) is in the calibration text of p: ", warning)
    assert found is not None and 14 <= int(found[1]) <= 24  # 1500 of 8000, by some 500 hashes


def test_a_licence_at_the_head_of_every_file_is_not_shared_text() -> None:
    """A fifth of all tokens, but the same ones: a 32-gram counts once."""
    licence = text(200)
    files, others = ([np.concatenate((licence, text(800))) for _ in range(30)] for _ in range(2))
    assert check_overlap(heldout(code=others), "t", {"plan": sketch_of(*files)}) == []


def test_what_cannot_be_checked_is_said() -> None:
    seen = text(4000)
    warnings = check_overlap(heldout(a=[seen]), "other", {"early": None, "sibling": sketch_of(seen)})
    assert [warning.partition(":")[0] for warning in warnings] == ["early", "sibling"]
    assert all("overlap cannot be checked" in warning for warning in warnings)


def test_manual_pages_of_one_project_stay_below_the_limit() -> None:
    """Half of a page that all pages of a project end with, in slightly other words each: a third is shared."""
    tails = [text(60) for _ in range(40)]

    def page() -> Ids:
        return np.concatenate([text(600), *(tails[i] for i in RANDOM.permutation(40)[:8])])

    hits, count = sketch_of(*(page() for _ in range(200))).shared([page() for _ in range(40)])
    assert 0 < hits / count < LIMIT
