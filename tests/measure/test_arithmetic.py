"""Held-out arithmetic: exact, distinct, unseen; and what is called right is what greedy decoding writes."""

import itertools
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from reference import load
from tiny_models import silent
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from expertcut.calibrate.arithmetic import arithmetic
from expertcut.calibrate.run import ProfileOptions
from expertcut.checkpoint import Checkpoint, open_checkpoint
from expertcut.choose import Plan, make_plan
from expertcut.errors import CheckpointError
from expertcut.measure.arithmetic import ASKED, SOLVED, Answers, Item, arithmetic_accuracy, arithmetic_items
from expertcut.measure.quality import BASE
from expertcut.model import read_geometry
from expertcut.rewrite import prune

ITEMS = arithmetic_items()
OPTIONS = ProfileOptions(device="cpu")


def answers(checkpoint: Checkpoint, items: list[Item], plans: dict[str, Plan] | None = None) -> Answers:
    return arithmetic_accuracy(
        checkpoint, read_geometry(checkpoint), plans or {}, items, OPTIONS, notify=silent, advance=silent
    )  # fmt: skip


def problems(text: str) -> list[tuple[str, frozenset[int]]]:
    """Every problem in a text, whatever the order of its operands."""
    return [(op, frozenset((int(a), int(b)))) for a, op, b in re.findall(r"(\d+)([-+*])(\d+)=", text)]


def test_two_thousand_distinct_items_whose_answers_are_exact() -> None:
    assert len(ITEMS) == len(set(ITEMS)) == 2000
    for item in ITEMS:
        problem = item.prompt.splitlines()[-1]
        assert item.answer == str(eval(problem.removesuffix("="))) and item.operator in problem
    assert all(600 < count < 730 for count in Counter(item.operator for item in ITEMS).values())


def test_a_prompt_shows_solved_problems_but_never_its_own() -> None:
    for item in ITEMS:
        *shown, asked = problems(item.prompt)
        assert SOLVED <= len(shown) < SOLVED + ASKED and asked not in shown
        assert all(eval(line.replace("=", "==")) for line in item.prompt.splitlines()[:-1])


def test_prompts_of_one_list_begin_alike() -> None:
    """So that a pass runs a list once."""
    for one, next_one in itertools.pairwise(ITEMS[:ASKED]):
        assert next_one.prompt.startswith(f"{one.prompt}{one.answer}\n")


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_no_problem_of_an_item_is_in_calibration_text(seed: int) -> None:
    asked = {problem for item in arithmetic_items(2000, seed) for problem in problems(item.prompt)}
    seen = {p for text in itertools.islice(arithmetic("calibration", seed), 500) for p in problems(text)}
    assert len(asked) > 1000 and len(seen) > 4000 and not asked & seen


def test_a_seed_decides_the_items_and_more_begin_with_fewer() -> None:
    assert arithmetic_items(30) == ITEMS[:30]
    assert not {item.prompt for item in arithmetic_items(2000, 1)} & {item.prompt for item in ITEMS}


def greedy(folder: Path, items: list[Item]) -> list[bool]:
    """Whether transformers' own greedy generation writes the answer as the rest of the line."""
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    right = []
    for item in items:
        prompt = tokenizer(item.prompt, return_tensors="pt")
        out = model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
        written: Any = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
        right.append(written.partition("\n")[0] == item.answer and "\n" in written)
    return right


def test_right_is_what_greedy_decoding_writes(demo_model: Path, tmp_path: Path) -> None:
    """The built-in model and a plan for it, which differ, against transformers' generation with the written one."""
    checkpoint, items = open_checkpoint(demo_model), ITEMS[:40]
    geometry = read_geometry(checkpoint)
    plan = make_plan(checkpoint, geometry, strategy="router-norm", experts=24)
    found = answers(checkpoint, items, {"24": plan})
    assert found.names == (BASE, "24") and found.correct.shape == (2, 40)
    prune(checkpoint, geometry, plan, tmp_path / "out")
    for row, folder in enumerate((demo_model, tmp_path / "out")):
        assert found.correct[row].tolist() == greedy(folder, items)
    assert 0 < found.correct[1].sum() < found.correct[0].sum() < 40


def test_the_built_in_model_has_learnt_some_of_it(demo_model: Path) -> None:
    """Far above what always the same answer gives (0 is right for a thirteenth of the items), far below all."""
    checkpoint = open_checkpoint(demo_model)
    half = make_plan(checkpoint, read_geometry(checkpoint), strategy="random", experts=16)
    found = answers(checkpoint, ITEMS[:1000], {"half": half})
    right = found.accuracy(BASE)
    assert right.low is not None and right.high is not None and 0.33 < right.low < right.high < 0.47
    assert max(Counter(item.answer for item in ITEMS).values()) < 0.1 * len(ITEMS)
    lost = found.difference("half")
    assert lost.high is not None and lost.high < -0.2
    assert lost.value == pytest.approx(found.correct[1].mean() - right.value)


def test_a_tokenizer_that_joins_question_and_answer_is_refused(demo_model: Path, tmp_path: Path) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    backend.train_from_iterator(["1+2=3\n"] * 9, trainers.BpeTrainer(vocab_size=64, show_progress=False))
    folder = Path(shutil.copytree(demo_model, tmp_path / "model"))
    joins: Any = PreTrainedTokenizerFast
    joins(tokenizer_object=backend).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="joins '='"):
        answers(open_checkpoint(folder), [Item("1+2=", "3", "+")])


def test_items_fit_into_what_small_models_were_trained_on(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    assert max(len(tokenizer(item.prompt + item.answer)["input_ids"]) for item in ITEMS) < 256
