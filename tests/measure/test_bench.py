"""The statistics of a benchmark on known times, its file, and whose turn it is."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from expertcut.errors import DataError
from expertcut.measure.bench import Bench, Cell, Machine, Sample, Variant, cells, load_bench, save_csv, summarise
from expertcut.measure.bench_plot import save_plot
from expertcut.measure.completions import Reply
from expertcut.measure.intervals import geometric
from expertcut.measure.prompts import LEAST, Prompts, read_prompts
from expertcut.measure.rounds import Outcome, groups, take_turns

A, B, C, D = (
    Variant(variant=name, model="m", experts=8, top_k=k) for name, k in zip("abcd", (4, 3, 2, 1), strict=True)
)
ONE, TWO = (Cell(concurrency=n, input_len=10, output_len=5) for n in (1, 2))
RANDOM = Prompts((), 1600, 0, 1)


def sample(variant: Variant, cell: Cell, number: int, seconds: float, **members: int) -> Sample:
    """All clients send at 100; the first token comes after a fifth of the time, the others evenly."""
    replies = [Reply(100.0, 100 + seconds / 5, 100 + seconds, 10, 5)] * cell.concurrency
    return Sample(variant, cell, number, tuple(replies), 0.1, members.get("memory"), members.get("gpu_memory"))


def test_figures_of_known_times() -> None:
    base = [sample(A, TWO, number, seconds, memory=number) for number, seconds in ((1, 1.0), (2, 2.0), (3, 4.0))]
    faster = [sample(B, TWO, number, seconds / 2) for number, seconds in ((1, 1.0), (2, 2.0), (3, 4.0))]
    first, second = summarise([*base, *faster])
    assert first.tokens_per_s_values == (10, 5, 2.5)
    assert (first.tokens_per_s, first.total_tokens_per_s, first.requests, first.rounds) == (5, 15, 6, (1, 2, 3))
    assert first.ttft == pytest.approx(0.4) and first.tpot == pytest.approx(0.4)
    assert first.ttft < first.ttft_p95 <= 0.8 + 1e-9 and first.tpot_p95 is not None and first.tpot_p95 > 0.7
    assert (first.ratio, first.memory, first.gpu_memory) == (None, 3, None)
    between = [second.ratio, second.ratio_low, second.ratio_high]
    assert between == pytest.approx([2, 2, 2]), "each round by itself"
    assert (second.variant, second.top_k, second.concurrency, second.memory) == ("b", 3, 2, None)


def test_ratios_are_of_the_same_rounds_and_loads() -> None:
    """B meets A in rounds 1 and 2, C in 3 and 4, when the machine is ten times slower."""
    samples = [sample(A, cell, n, s) for n, s in ((1, 1.0), (2, 1.1), (3, 10.0), (4, 11.0)) for cell in (ONE, TWO)]
    samples += [sample(B, ONE, n, s / 2) for n, s in ((1, 1.0), (2, 1.1))]
    samples += [sample(C, ONE, n, s / 4) for n, s in ((3, 10.0), (4, 11.0))]
    rows = {(row.variant, row.concurrency): row for row in summarise(samples)}
    assert rows["b", 1].ratio == pytest.approx(2) and rows["c", 1].ratio == pytest.approx(4)
    assert rows["c", 1].tokens_per_s < rows["b", 1].tokens_per_s
    alone = summarise([sample(A, ONE, 1, 1.0), sample(B, ONE, 1, 0.5)])[1]
    assert alone.ratio == pytest.approx(2) and alone.ratio_low is None is alone.ratio_high


@pytest.mark.parametrize("count", [2, 3, 4, 5, 9])
def test_intervals_of_few_ratios_hold_the_true_one_as_often_as_they_say(count: int) -> None:
    random = np.random.default_rng(count)
    found = [geometric(np.exp(0.3 + 0.1 * random.standard_normal(count))) for _ in range(2000)]
    held = np.mean([e.low is not None and e.high is not None and e.low <= np.exp(0.3) <= e.high for e in found])
    assert 0.935 <= held <= 0.965


def test_the_interval_of_two_ratios() -> None:
    """Student's t with one degree of freedom is tan(0.475 pi)."""
    found = geometric(np.exp([0.1, 0.3]))
    half = np.tan(0.475 * np.pi) * 0.1
    ends = np.asarray([found.low, found.value, found.high], np.float64)
    assert np.log(ends) == pytest.approx([0.2 - half, 0.2, 0.2 + half], rel=1e-4)


def document(**members: object) -> Bench:
    machine = Machine(cpu="abacus", cores=2, memory=1 << 30, gpus=(), settings={})
    rows = summarise(
        [sample(v, cell, n, 1.0 + v.top_k, memory=5) for n in (1, 2) for v in (A, B) for cell in (ONE, TWO)]
    )
    given: dict[str, object] = dict(
        complete=True, command="expertcut bench", engine="e", machine=machine, prompts="random", seed=0, rows=rows
    )
    return Bench.model_validate(given | members)


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    found = document()
    found.save(tmp_path / "bench.json")
    assert load_bench(tmp_path) == load_bench(tmp_path / "bench.json") == found
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    save_csv(tmp_path / "bench.csv", found.rows)
    rows = list(csv.DictReader((tmp_path / "bench.csv").read_text().splitlines()))
    assert [float(row["tokens_per_s"]) for row in rows] == [row.tokens_per_s for row in found.rows]
    assert rows[0]["rounds"] == "1 2" and rows[0]["ratio"] == ""
    save_plot(tmp_path / "bench.png", found.rows, "a title")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"schema": "expertcut.bench/9"}, r"\$\.schema: .*expertcut.bench/1"),
        ({"rows": [{"variant": "a"}]}, r"\$\.rows\.0\.\w+: Field required"),
        ({"extra": 1}, r"\$\.extra: Extra inputs"),
        (None, "invalid JSON"),
    ],
)
def test_files_that_are_none(change: dict[str, object] | None, what: str, tmp_path: Path) -> None:
    whole = document().model_dump(mode="json", by_alias=True)
    (tmp_path / "bench.json").write_text(json.dumps(whole | change) if change else "{")
    with pytest.raises(DataError, match=what):
        load_bench(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        load_bench(tmp_path / "absent.json")


class Log:
    """Engines that only note what becomes of them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.up: set[str] = set()
        self.most = 0
        self.prompts: dict[str, list[object]] = {}

    @contextmanager
    def start(self, variant: Variant) -> Iterator[Running]:
        self.up.add(variant.variant)
        self.most = max(self.most, len(self.up))
        self.lines.append(f"+{variant.variant}")
        try:
            yield Running(self, variant.variant)
        finally:
            self.lines.append(f"-{variant.variant}")
            self.up.remove(variant.variant)


class Running:
    def __init__(self, log: Log, name: str) -> None:
        self.log, self.name = log, name

    def run(self, prompts: Sequence[Sequence[int]], output_len: int, clients: int) -> Outcome:
        assert self.name in self.log.up
        self.log.lines.append(f"{self.name}{clients}:{output_len}")
        self.log.prompts.setdefault(self.name, []).append(prompts)
        return Outcome([Reply(0, 1, 2, 10, output_len)] * len(prompts))


def turns(variants: Sequence[Variant], loads: Sequence[Cell], rounds: int, at_once: int) -> tuple[Log, list[Sample]]:
    log, samples, told = Log(), list[Sample](), list[tuple[int, int]]()
    take_turns(
        variants, loads, rounds, log.start, RANDOM, samples.append, at_once=at_once,
        advance=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told[-1] == (len(samples), len(samples)) and not log.up and log.most <= at_once
    return log, samples


def test_one_at_a_time_is_started_anew_for_every_turn() -> None:
    log, samples = turns([A, B], [ONE], 2, 1)
    turn = ["+a", "a1:5", "a1:5", "-a", "+b", "b1:5", "b1:5", "-b"]
    assert log.lines == turn * 2, "the first run of a load warms up"
    assert [(s.variant.variant, s.round) for s in samples] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_a_single_variant_stays_up() -> None:
    log, samples = turns([A], [ONE], 2, 1)
    assert log.lines == ["+a", "a1:5", "a1:5", "a1:5", "-a"] and len(samples) == 2


def test_several_stay_up_and_the_first_meets_all_others() -> None:
    log, samples = turns([A, B, C, D], [ONE, TWO], 2, 3)
    assert [line for line in log.lines if line[0] in "+-"] == ["+a", "+b", "+c", "-c", "-b", "+d", "-d", "-a"]
    met = [(s.variant.variant, s.round) for s in samples if s.cell == ONE]
    assert met == [("a", 1), ("b", 1), ("c", 1), ("a", 2), ("b", 2), ("c", 2), ("a", 3), ("d", 3), ("a", 4), ("d", 4)]


@pytest.mark.parametrize("at_once", [1, 2, 3, 9])
@pytest.mark.parametrize("variants", [[A], [A, B], [A, B, C, D]])
def test_groups_hold_everyone_and_start_with_the_first(variants: list[Variant], at_once: int) -> None:
    found = groups(variants, at_once)
    assert all(some[0] == variants[0] and (at_once == 1 or len(some) <= at_once) for some in found)
    assert [v for some in found for v in some[1:]] == variants[1:]


def test_an_error_ends_what_is_up_and_keeps_what_was_measured() -> None:
    log, samples = Log(), list[Sample]()

    def record(one: Sample) -> None:
        samples.append(one)
        if len(samples) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_turns([A, B], [ONE], 5, log.start, RANDOM, record, at_once=2, advance=lambda done, total: None)
    assert not log.up and len(samples) == 3


def test_variants_get_the_same_prompts_and_rounds_get_others() -> None:
    log, _ = turns([A, B], [TWO], 3, 2)
    assert log.prompts["a"] == log.prompts["b"]
    seen = [tuple(prompt) for prompts in log.prompts["a"] for prompt in prompts]  # type: ignore[attr-defined]
    assert len(set(seen)) == len(seen) == LEAST * (1 + 3)


def test_random_prompts_are_seeded_and_keep_off_the_ends_of_the_vocabulary() -> None:
    long = Cell(concurrency=20, input_len=500, output_len=1)
    drawn = np.asarray(RANDOM.draw(long, 1))
    assert drawn.shape == (20, 500) and drawn.min() == 100 and drawn.max() == 1499
    assert RANDOM.draw(long, 1) == drawn.tolist() != Prompts((), 1600, 1, 1).draw(long, 1)
    assert len(Prompts((), 1600, 0, 3).draw(long, 1)) == 60


def test_given_prompts_take_turns() -> None:
    given = Prompts([[1], [2], [3]], 1600, 0, 1)
    turns = [[prompt[0] for prompt in given.draw(TWO, number)] for number in range(3)]
    assert turns == [[1, 2, 3, 1], [2, 3, 1, 2], [3, 1, 2, 3]]


def test_prompts_of_files(tmp_path: Path, demo_model: Path) -> None:
    from expertcut.calibrate.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(demo_model)
    (tmp_path / "p.txt").write_text("12 + 35 =\n\nThe city\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "12 + 35 ="}\n\n{"text": "The city", "domain": "x"}\n')
    found = read_prompts(tmp_path / "p.txt", tokenizer)
    assert found == read_prompts(tmp_path / "p.jsonl", tokenizer) and len(found) == 2
    assert tokenizer.decode(np.asarray(found[1])) == "The city"
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n[]\n')
    (tmp_path / "empty.txt").write_text("\n")
    for name, what in (
        ("bad.jsonl", "line 2: expected"),
        ("empty.txt", "no prompts"),
        ("absent.txt", "cannot be read"),
    ):
        with pytest.raises(DataError, match=what):
            read_prompts(tmp_path / name, tokenizer)


def test_the_grid_of_loads() -> None:
    found = [(c.concurrency, c.input_len, c.output_len) for c in cells([1, 8], [16, 32], [4])]
    assert found == [(1, 16, 4), (8, 16, 4), (1, 32, 4), (8, 32, 4)]
