"""The model card: what it says of an ordinary, a grouped and an uneven checkpoint; the Hub's client reads it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import ModelCard
from tiny_models import TINY, tiny_model
from tiny_types import tiny_type

from expertcut.checkpoint import open_checkpoint
from expertcut.measure.bench import load_bench
from expertcut.model import read_geometry
from expertcut.model.summary import summarise
from expertcut.rewrite.record import Record
from expertcut.share.numbers import after, before

if TYPE_CHECKING:
    from command_line import Cli

pytest_plugins = ("command_line",)


def carded(cli: Cli, out: Path, *args: object) -> tuple[dict[str, Any], str]:
    """The card's metadata, as the Hub's client reads them, and its text."""
    text = cli("push", out, "org/half", "--dry-run", "--json", *args).document["card"]
    card = ModelCard(text, ignore_metadata_errors=False)
    found: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    return found, card.text


def test_the_built_in_model(cli: Cli, pruned: Path, profiled: Path, planned: Path, demo_model: Path) -> None:
    data, text = carded(cli, pruned, "--base-model", "org/demo", "--profile", profiled)
    assert data["base_model"] == "org/demo" and data["base_model_relation"] == "finetune"
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "apache-2.0", "transformers", "text-generation"
    )  # fmt: skip
    assert data["tags"] == ["moe", "pruned", "expertcut", "reap", "qwen3_moe", "toy"] and "datasets" not in data
    whole, left = (summarise(c, read_geometry(c)) for c in map(open_checkpoint, (demo_model, pruned)))
    assert "| routed experts per MoE layer | 32 | 16 |" in text
    assert f"| parameters | {whole.parameters:,} | {left.parameters:,} (59.3%) |" in text
    assert "https://arxiv.org/abs/2510.13999" in text and "tokens in sequences of 128" in text
    assert "Nothing was measured of this model" in text and "| builtin | german |" in text
    assert "vllm serve org/half" in text and "convert_hf_to_gguf.py" in text
    assert "expertcut prune org/demo OUT --plan plan.json" in text
    assert not re.search(r"/tmp|/home", text), "nothing of this machine"


def test_a_grouped_model(cli: Cli, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source, out = tiny_model("deepseek_v3", tmp_path_factory), tmp_path / "out"
    assert cli("prune", source, out, "--strategy", "router-norm", "--keep", "0.5").code == 0
    data, text = carded(cli, out, "--license", "mit")
    assert data["license"] == "mit" and "base_model" not in data and "base_model_relation" not in data
    record, geometry = Record.load(out), read_geometry(open_checkpoint(out))
    assert f"| routed experts per MoE layer | {record.before.experts} | {geometry.num_experts} |" in text
    assert "router-norm" in data["tags"] and "Benchmark figures of the base model do not hold" in text


def test_uneven_layers(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    cli("plan", demo_model, "--top-k-schedule", "4,2,3,3", "--per-layer", "-o", plan)
    cli("prune", demo_model, out, "--plan", plan)
    data, text = carded(cli, out)
    assert "pruned" not in data["tags"] and "expertcut" in data["tags"]
    assert "| 2 | 32 | 2 | – |" in text and "2 to 4 by layer, 3.00 on average" in text
    assert "from expertcut.runtimes.transformers import from_pretrained" in text
    assert "AutoModelForCausalLM" not in text and "convert_hf_to_gguf" not in text and "sglang" not in text


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral", "qwen2_moe", "ernie4_5_vl_moe"])
def test_the_source_s_numbers_follow_from_what_is_left(
    family: str, cli: Cli, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    make = tiny_model if family in TINY else tiny_type
    source, out = make(family, tmp_path_factory), tmp_path / "out"
    assert cli("prune", source, out, "--strategy", "first", "--keep", "0.5", "--top-k", 1).code == 0
    whole, left = open_checkpoint(source), open_checkpoint(out)
    found = before(left, read_geometry(left), Record.load(out))
    assert found == after(summarise(whole, read_geometry(whole)))


def test_the_source_s_card_lends_what_still_holds(cli: Cli, pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(pruned, out)
    head = "license: other\nlicense_name: l\nlicense_link: LICENSE\nlanguage: no\ndatasets: [a/b]\ntags: [chat]\n"
    index = "model-index:\n- name: x\n  results: []\nthumbnail: x.png\n"
    (out / "README.md").write_text(f"---\n{head}{index}---\n# MMLU 99.9\n")
    data, text = carded(cli, out)
    kept = {"license": "other", "license_name": "l", "license_link": "LICENSE", "language": "no", "datasets": ["a/b"]}
    assert data.items() >= kept.items() and data["tags"] == ["moe", "pruned", "expertcut", "reap", "chat"]
    assert "model-index" not in data and "thumbnail" not in data and "99.9" not in text
    ran = cli("push", out, "org/half", "--dry-run", "--license", "mit")
    assert ran.code == 2 and "the source's card says other" in ran.err


def test_results_keep_their_intervals(cli: Cli, pruned: Path, planned: Path, demo_model: Path, tmp_path: Path) -> None:
    args = ("--data", "builtin-heldout", "--tokens", 600, "--seq-len", 64, "--json")
    found = cli("eval", demo_model, "--plan", planned, *args)
    (tmp_path / "eval.json").write_text(found.out)
    _, text = carded(cli, pruned, "--results", tmp_path / "eval.json")
    change = found.document["results"][1]["overall"]["change"]
    assert f"{change['value']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]" in text
    assert "| half.json | all |" in text and str(tmp_path) not in text and "Nothing was measured" not in text
    for name, content in {"empty": {}, "torn": {"results": [{}]}, "list": [1]}.items():
        (tmp_path / name).write_text(json.dumps(content))
        ran = cli("push", pruned, "org/half", "--dry-run", "--results", tmp_path / name)
        assert ran.code == 4 and name in ran.err and "bench.json" in ran.err


def test_tasks_and_speed_stand_beside_the_text(
    cli: Cli, pruned: Path, planned: Path, demo_model: Path, tmp_path: Path
) -> None:
    tasks, load = tmp_path / "tasks.json", tmp_path / "load"
    tasks.write_text(cli("eval", pruned, "--source", demo_model, "--tasks", "expertcut_arithmetic", "--limit", 20,
                         "--json").out)  # fmt: skip
    sizes = ("--concurrency", "1", "--input-len", 4, "--output-len", 3, "--rounds", 2)
    assert cli("bench", demo_model, pruned, "--engine", "transformers", *sizes, "-o", load).code == 0
    _, text = carded(cli, pruned, "--results", tasks, "--results", load / "bench.json")

    base, half = json.loads(tasks.read_text())["tasks"]["runs"]
    (gap,) = json.loads(tasks.read_text())["tasks"]["comparisons"]
    change = gap["change"]
    between = f"{change['value']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]"
    for name, run, beside in (("_demo_model", base, ""), ("pruned", half, between)):
        assert f"| {name} | expertcut_arithmetic | acc | 20 | {run['metrics'][0]['value']:.4f} | {beside} |" in text
    assert "### Tasks" in text and "the first 20 documents of each" in text and str(tmp_path) not in text

    whole, cut = load_bench(load).rows
    assert f"| _demo_model | 1 | 4 | 3 | {whole.tokens_per_s:.1f} |  |" in text and cut.ratio is not None
    assert f"| pruned | 1 | 4 | 3 | {cut.tokens_per_s:.1f} | {cut.ratio:.3f}" in text
    assert "### Speed under load" in text and "Nothing was measured" not in text


def test_another_profile_is_refused(cli: Cli, demo_model: Path, pruned: Path, tmp_path: Path) -> None:
    args = ("--calibration", "builtin", "--tokens", 300, "--seq-len", 64)
    assert cli("profile", demo_model, *args, "-o", tmp_path / "p").code == 0
    ran = cli("push", pruned, "org/half", "--dry-run", "--profile", tmp_path / "p")
    assert ran.code == 4 and "its plan was made from" in ran.err
