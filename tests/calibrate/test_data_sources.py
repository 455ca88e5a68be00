"""Where text comes from: files, arithmetic, `datasets`, the model itself; and how malformed input is reported."""

import json
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from expertcut.calibrate.arithmetic import LINES, arithmetic, part_of
from expertcut.calibrate.data import load_calibration
from expertcut.calibrate.hub import SHARDS, hub_texts, shuffled
from expertcut.calibrate.recipes import HubSource
from expertcut.calibrate.selfsample import sample_self
from expertcut.calibrate.sources import read_file
from expertcut.calibrate.tokenizer import Tokenizer, load_tokenizer
from expertcut.errors import DataError, ExpertcutError, HubError


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return load_tokenizer(demo_model)


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., HubSource]:
    """A folder that `datasets` loads, and a source that reads it."""

    def make(rows: list[dict[str, Any]], **source: Any) -> HubSource:
        folder = tmp_path / "dataset"
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
        return HubSource(kind="hub", dataset=str(folder), domain="d", **source)

    return make


def _texts(source: HubSource, tokenizer: Tokenizer, seed: int = 0) -> list[str]:
    return [text for text, _ in hub_texts(source, tokenizer, seed, [])]


def test_files_keep_their_domains(tmp_path: Path) -> None:
    rows = [{"text": "eins", "domain": "german"}, {"text": "one", "domain": None}, {"text": ""}]
    jsonl, parquet, txt = tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "c.txt"
    jsonl.write_text("\n\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows[:2]), parquet)
    txt.write_text("first line\nsecond line\n")
    assert list(read_file(jsonl)) == list(read_file(parquet)) == [("eins", "german"), ("one", None)]
    assert list(read_file(txt)) == [("first line\nsecond line\n", None)]


def test_domain_defaults_to_the_stem(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "letters.jsonl"
    path.write_text('{"text": "Dear Anna"}\n{"text": "Liebe Anna", "domain": "german"}\n')
    assert load_calibration([path], tokenizer, tokens=None, seq_len=8).domains == ("german", "letters")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text" "y"}\n', r"a\.jsonl:2: not JSON: .* at column 9"),
        ("a.jsonl", b'{"text": "x"}\n\n["x"]\n', r"a\.jsonl:3: found list, expected an object"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1: found fields body, expected a string in field text"),
        ("a.jsonl", b'{"text": 7}\n', r"a\.jsonl:1: found int, expected a string in field text"),
        ("a.jsonl", b'{"text": "x", "domain": 7}\n', r"a\.jsonl:1: found domain 7"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8: byte 0xff"),
        ("a.txt", b"fine\nfine\n\xe4h\n", r"a\.txt:3: not UTF-8: byte 0xe4"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a parquet file"),
        ("a.csv", b"text\n", r"unknown calibration source .*a\.csv"),
    ],
)
def test_malformed_files_are_named(
    tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_calibration([tmp_path / name], tokenizer, tokens=100, seq_len=16)
    assert "\n" not in caught.value.message


def test_missing_and_wrong_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with pytest.raises(DataError, match="cannot read: .*No such file"):
        list(read_file(path))
    pq.write_table(pa.table({"body": ["x"]}), path)
    with pytest.raises(DataError, match="found columns body, expected a column text"):
        list(read_file(path))
    pq.write_table(pa.table({"text": ["x", None]}), path)
    with pytest.raises(DataError, match="row 2: found NoneType"):
        list(read_file(path))


def test_arithmetic_is_right_and_in_one_part() -> None:
    seen: dict[str, set[tuple[str, int, int]]] = {"calibration": set(), "heldout": set()}
    for part in ("calibration", "heldout"):
        for text in islice(arithmetic(part, 3), 200):
            lines = text.splitlines()
            assert len(lines) == LINES and text.endswith("\n")
            for line in lines:
                match = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", line)
                assert match, line
                a, operator, b, result = int(match[1]), match[2], int(match[3]), int(match[4])
                assert {"+": a + b, "-": a - b, "*": a * b}[operator] == result
                assert part_of(operator, a, b) == part
                seen[part].add((operator, min(a, b), max(a, b)))
    assert not seen["calibration"] & seen["heldout"]
    assert all({operator for operator, _, _ in problems} == set("+-*") for problems in seen.values())


def test_arithmetic_depends_on_the_seed_alone() -> None:
    first, again, other = (list(islice(arithmetic("heldout", seed), 3)) for seed in (1, 1, 2))
    assert first == again != other


def test_datasets_field_and_order(dataset: Callable[..., HubSource], tokenizer: Tokenizer) -> None:
    source = dataset([{"body": f"text {i}"} for i in range(40)] + [{"body": ""}], field="body")
    once, again, other = (_texts(source, tokenizer, seed) for seed in (0, 0, 1))
    assert sorted(once) == sorted(f"text {i}" for i in range(40))
    assert once == again != other


def test_datasets_of_many_files_are_read_whole_and_mixed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for part in range(7):
        rows = [{"text": f"{part} {i}"} for i in range(100)]
        (tmp_path / f"train-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = _texts(HubSource(kind="hub", dataset=str(tmp_path), domain="d", field="text"), tokenizer)
    assert sorted(texts) == sorted(f"{part} {i}" for part in range(7) for i in range(100))
    assert len({text.split()[0] for text in texts[:40]}) == SHARDS


def test_shuffled_draws_from_the_buffer() -> None:
    drawn = list(shuffled(range(100), seed=0, buffer=10))
    assert sorted(drawn) == list(range(100)) != drawn
    assert all(value < position + 10 for position, value in enumerate(drawn))


def test_datasets_template(dataset: Callable[..., HubSource], tokenizer: Tokenizer) -> None:
    source = dataset([{"q": "why?", "a": "because"}], template="Q: {{ q }}\nA: {{ a | upper }}")
    assert _texts(source, tokenizer) == ["Q: why?\nA: BECAUSE"]
    unknown = source.model_copy(update={"template": "{{ nothing }}"})
    with pytest.raises(DataError, match="the template fails: 'nothing' is undefined"):
        _texts(unknown, tokenizer)
    broken = source.model_copy(update={"template": "{{ q "})
    with pytest.raises(DataError, match="not jinja2"):
        _texts(broken, tokenizer)


_CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"chat": _CHAT}, "chat"),
        ({"chat": json.dumps(_CHAT)}, "chat"),
        ({"chat": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]}, "chat"),
        ({"chat": json.dumps([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}, _CHAT[1]])}, "chat"),
        ({"q": "Hello", "a": "Good day"}, {"user": "q", "assistant": "a"}),
    ],
)
def test_datasets_messages(
    dataset: Callable[..., HubSource], demo_model: Path, tmp_path: Path, row: dict[str, Any], messages: Any
) -> None:
    source = dataset([row], messages=messages)
    templated = _with_chat_template(demo_model, tmp_path)
    assert list(hub_texts(source, templated, 0, [])) == [("[user]Hello[assistant]Good day", True)]
    plain = source.model_copy(update={"chat_template": False})
    assert list(hub_texts(plain, templated, 0, [])) == [("Hello\n\nGood day", False)]


def test_chat_without_a_template_is_said(dataset: Callable[..., HubSource], tokenizer: Tokenizer) -> None:
    warnings: list[str] = []
    assert list(hub_texts(dataset([{"m": _CHAT}], messages="m"), tokenizer, 0, warnings)) == [
        ("Hello\n\nGood day", False)
    ]
    assert len(warnings) == 1 and "no chat template" in warnings[0]


def test_refused_chats_are_counted(dataset: Callable[..., HubSource], demo_model: Path, tmp_path: Path) -> None:
    rows = [{"m": _CHAT}, {"m": [{"role": "ghost", "content": "boo"}]}, {"m": [{"role": "ghost", "content": "hoo"}]}]
    warnings: list[str] = []
    texts = list(hub_texts(dataset(rows, messages="m"), _with_chat_template(demo_model, tmp_path), 0, warnings))
    assert texts == [("[user]Hello[assistant]Good day", True)]
    assert len(warnings) == 1 and "2 chats left out" in warnings[0]


def _with_chat_template(demo_model: Path, folder: Path) -> Tokenizer:
    template = (
        "{% for m in messages %}{% if m.role == 'ghost' %}{{ raise_exception('no ghosts') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo_model / name).read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"field": "nope"}, DataError, "found fields body, expected nope"),
        ({"split": "nope"}, DataError, "nope"),
        ({"dataset": "nobody-here/nothing"}, HubError, "dataset nobody-here/nothing/train"),
        ({"field": None, "messages": "body"}, DataError, "not JSON"),
    ],
)
def test_datasets_errors_are_one_line(
    dataset: Callable[..., HubSource],
    tokenizer: Tokenizer,
    change: dict[str, Any],
    error: type[ExpertcutError],
    message: str,
) -> None:
    source = dataset([{"body": "text"}], field="body").model_copy(update=change)
    with pytest.raises(error, match=message) as caught:
        _texts(source, tokenizer)
    assert "\n" not in caught.value.message


def test_unreachable_hub_names_the_way_out(tokenizer: Tokenizer) -> None:
    with pytest.raises(HubError) as caught:
        load_calibration(["general"], tokenizer, tokens=1000, seq_len=64)
    assert "fineweb-edu" in caught.value.message and "--calibration builtin" in str(caught.value.hint)


def test_a_recipe_over_datasets(dataset: Callable[..., HubSource], tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = dataset([{"body": f"a text with the number {i} " * 5} for i in range(50)], field="body")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps({"sources": [source.model_dump()]}))
    data = load_calibration([recipe], tokenizer, tokens=640, seq_len=64)
    assert data.tokens == 640 and data.domains == ("d",)
    assert data.sources[0]["dataset"] == source.dataset and data.sources[0]["tokens"] == 640


def test_self_samples_repeat_with_the_seed(tokenizer: Tokenizer, demo_model: Path) -> None:
    first, again, other = (
        sample_self(demo_model, tokenizer, tokens=90, seq_len=40, seed=seed, device="cpu") for seed in (5, 5, 6)
    )
    assert [len(ids) for ids in first] == [40, 40, 10]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert all(ids[0] == tokenizer.eos_id and ids.dtype == np.int64 for ids in first)
    assert len({ids.tobytes() for ids in first}) == 3


def test_self_is_a_source(tokenizer: Tokenizer, demo_model: Path) -> None:
    data = load_calibration(["builtin", "self"], tokenizer, tokens=240, seq_len=60, model_dir=demo_model, device="cpu")
    assert data.tokens_by_domain["self"] == 120 and len(data.domains) == 7


def test_self_needs_a_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot sample from the model"):
        sample_self(tmp_path, tokenizer, tokens=10, seq_len=10, seed=0)
