"""From named sources to sequences: budgets, packing, padding, determinism."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from expertcut.calibrate.data import MIN_TAIL, load_calibration
from expertcut.calibrate.overlap import Sketch, sequence_hashes
from expertcut.calibrate.tokenizer import Tokenizer, load_tokenizer, tokenizer_fingerprint
from expertcut.errors import CheckpointError, DataError, UsageError


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return load_tokenizer(demo_model)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Three domains; the word of each document tells domain and document."""
    rows = [
        {"text": f"{domain} {number} " * 30, "domain": domain}
        for domain in ("ant", "bee", "cat")
        for number in range(20)
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_same_seed_same_data(tokenizer: Tokenizer, mixed: Path) -> None:
    first, again, other = (
        load_calibration([mixed], tokenizer, tokens=1500, seq_len=64, seed=seed) for seed in (1, 1, 2)
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(first.sequences, again.sequences, strict=True))


def test_fingerprint_depends_on_domain_and_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prints = set()
    for stem, seq_len in (("one", 64), ("two", 64), ("one", 32)):
        path = tmp_path / f"{stem}.txt"
        path.write_text("The same words in every file. " * 40)
        prints.add(load_calibration([path], tokenizer, tokens=None, seq_len=seq_len).fingerprint)
    assert len(prints) == 3


@pytest.mark.parametrize("packed", [True, False])
def test_no_sequence_mixes_domains(tokenizer: Tokenizer, mixed: Path, packed: bool) -> None:
    data = load_calibration([mixed], tokenizer, tokens=None, seq_len=100, packed=packed)
    assert data.domains == ("ant", "bee", "cat")
    for sequence in data.sequences:
        text = tokenizer.decode(sequence.ids)
        assert [name for name in data.domains if name in text] == [sequence.domain]


def test_packed_windows_are_full_and_documents_end_with_eos(tokenizer: Tokenizer, mixed: Path) -> None:
    data = load_calibration([mixed], tokenizer, tokens=None, seq_len=50)
    for domain in data.domains:
        windows = [sequence.ids for sequence in data.sequences if sequence.domain == domain]
        assert all(len(ids) == 50 for ids in windows[:-1])
        assert MIN_TAIL <= len(windows[-1]) <= 50
        joined = np.concatenate(windows)
        assert np.count_nonzero(joined == tokenizer.eos_id) in (19, 20)  # a short tail may take the last one away


def test_padded_sequences_are_whole_or_cut_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    texts = ["short", "a text of middling length", "long " * 200]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = load_calibration([path], tokenizer, tokens=None, seq_len=32, packed=False)
    expected = sorted(tokenizer.encode(text)[:32].tolist() for text in texts)
    assert sorted(sequence.ids.tolist() for sequence in data.sequences) == expected
    assert len({len(ids) for ids in expected}) == 3  # true lengths: nothing was padded
    assert data.tokens == sum(map(len, expected))


def test_a_lone_short_window_is_kept_and_a_short_tail_dropped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("four words are here")
    size = len(tokenizer.encode(path.read_text()))
    assert load_calibration([path], tokenizer, tokens=None, seq_len=64).tokens == size
    assert load_calibration([path], tokenizer, tokens=None, seq_len=size - 1).tokens == size - 1


def test_budget_is_split_by_weight(tokenizer: Tokenizer, mixed: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(
        "sources:\n"
        "  - {kind: file, path: mixed.jsonl, domain: zoo, weight: 3}\n"
        "  - {kind: arithmetic, documents: 20, weight: 1}\n"
    )
    data = load_calibration([recipe], tokenizer, tokens=1001, seq_len=77)
    counts = [source["tokens"] for source in data.sources]
    assert counts == [751, 250]
    assert data.tokens_by_domain == {"zoo": 751 - 751 % 77 + 58, "arithmetic": 250}
    assert data.warnings == ()


def test_sources_get_equal_shares_whatever_their_weights(tokenizer: Tokenizer, mixed: Path) -> None:
    both = load_calibration([f"{mixed},builtin"], tokenizer, tokens=1800, seq_len=64)
    shares = {name: sum(s["tokens"] for s in both.sources if s["name"] == name) for name in (str(mixed), "builtin")}
    assert shares == {str(mixed): 900, "builtin": 900}
    assert len(both.domains) == 3 + 6


def test_too_little_text_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "little.txt"
    path.write_text("only a few words")
    data = load_calibration([path], tokenizer, tokens=500, seq_len=64)
    size = len(tokenizer.encode(path.read_text()))
    assert data.tokens == size
    assert data.warnings == (f"{path}: little: only {size} of 500 tokens to be had",)


def test_no_text_and_no_numbers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": "  "}\n\n')
    with pytest.raises(DataError, match=r"empty\.jsonl: no text"):
        load_calibration([empty], tokenizer, tokens=100, seq_len=64)
    with pytest.raises(UsageError, match="found 5 tokens for 6 sources"):
        load_calibration(["builtin"], tokenizer, tokens=5, seq_len=64)
    with pytest.raises(UsageError, match="sequences of 1"):
        load_calibration(["builtin"], tokenizer, tokens=100, seq_len=1)
    with pytest.raises(UsageError, match="pass --tokens|no end"):
        load_calibration(["self"], tokenizer, tokens=None, seq_len=64)
    with pytest.raises(DataError, match="the model itself"):
        load_calibration(["self"], tokenizer, tokens=100, seq_len=64)
    with pytest.raises(UsageError, match="no calibration source"):
        load_calibration([""], tokenizer, tokens=100, seq_len=64)


def test_builtin_text_is_large_enough_and_disjoint(tokenizer: Tokenizer) -> None:
    calibration, heldout = (
        load_calibration([name], tokenizer, tokens=None, seq_len=256) for name in ("builtin", "builtin-heldout")
    )
    assert calibration.domains == heldout.domains and len(heldout.domains) == 6
    assert heldout.tokens >= 10_000 and calibration.tokens >= heldout.tokens
    assert min(heldout.tokens_by_domain.values()) >= 1500 and min(calibration.tokens_by_domain.values()) >= 1500
    every = Sketch("", 1, sequence_hashes((s.ids for s in calibration.sequences), every=1))
    shared, count = every.shared(s.ids for s in heldout.sequences)
    assert shared == 0 and count > 9_000


def test_tokenizer_contract(tokenizer: Tokenizer, demo_model: Path, tmp_path: Path) -> None:
    ids = tokenizer.encode("Ein Satz.")
    assert ids.dtype == np.int64 and ids[-1] == tokenizer.eos_id == 0
    assert tokenizer.decode(ids[:-1]) == "Ein Satz."
    assert tokenizer.encode("over<|endoftext|>")[-2:].tolist().count(0) == 1  # no second EOS
    assert tokenizer.fingerprint == tokenizer_fingerprint(demo_model)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not load"):
        load_tokenizer(tmp_path)


def test_importing_data_does_not_import_torch() -> None:
    heavy = ("torch", "transformers", "datasets", "pyarrow")
    code = f"import sys, expertcut.calibrate.data; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
