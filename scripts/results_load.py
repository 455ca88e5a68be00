"""More throughput for next to no quality, on one model: the table of docs/results.md; see the script beside it.

Plans are chosen and judged on the trained model, and put on its widened twin (scripts/widen), which computes the same
and spends its time on experts as a large model does. vLLM serves the twin and what the plans leave of it. What is made
stays in a folder: quality is not measured again, nor are checkpoints written again, while model and settings are the
same; speed always is. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path

from bench_serving import expertcut
from bench_watch import ROOT
from load_plans import NLL, POINTS, Quality, Study, study
from results_common import OPTIONS, Subject, arguments, out, say, silent, subjects, table
from widen import read_share, routed_share, widen

from expertcut.calibrate.data import CalibrationSet
from expertcut.checkpoint import open_checkpoint
from expertcut.choose import Plan, format_size
from expertcut.choose.plan import Source
from expertcut.measure.bench import Bench, Row, load_bench
from expertcut.measure.cost_model import model_cost
from expertcut.measure.whatif import evaluate
from expertcut.model import fingerprint, read_geometry

CLIENTS, FASTER = (8, 32), 1.10
LANES = 64
"""Widths are a multiple of this, which the engine's kernels like."""
SAME = 500
"""Tokens on which the twin is compared with its model, plan by plan."""
PROMPT = 32
"""Tokens of held-out text that a request begins with."""
ENGINE = """--dtype bfloat16 --enforce-eager --compilation-config '{"custom_ops": ["-rotary_embedding"]}'"""
"""vLLM's own rotary kernel for CPUs turns only the first head of queries shaped as DeepSeek's (0.32)."""


def settings(subject: Subject, given: argparse.Namespace) -> dict[str, str | int]:
    """All that the plans and what they cost depend on."""
    text = subject.text(subject.heldout, given.heldout_tokens, 0)
    data = subject.text(subject.calibration, given.tokens, 0)
    return {
        "model": subject.title, "tokens": given.tokens, "heldout tokens": given.heldout_tokens, "items": given.items,
        "calibration": data.fingerprint, "heldout": text.fingerprint,
    }  # fmt: skip


def studied(subject: Subject, given: argparse.Namespace, folder: Path) -> Study:
    """Choose plans and measure what they cost, or read what was found before."""
    wanted, file = settings(subject, given), folder / "quality.json"
    if file.exists():
        found = Study.model_validate_json(file.read_text())
        if found.settings == wanted:
            return found
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        found = study(subject, wanted, Path(scratch) / "profile")
    file.write_text(found.model_dump_json(indent=2, by_alias=True))
    return found


def factor(subject: Subject, nbytes: float) -> int:
    """Return by how much to widen for experts of about so many bytes, their width a multiple of `LANES`."""
    width = subject.geometry.expert_width
    step = LANES // math.gcd(LANES, width)
    experts = model_cost(subject.checkpoint, subject.geometry).expert_nbytes
    return max(1, round(nbytes / experts / step)) * step


def checkpoints(subject: Subject, found: Study, folder: Path, nbytes: float) -> dict[str, Path]:
    """The twin, under `base`, and what every plan leaves of it, by way; those that are there stay."""
    times = factor(subject, nbytes)
    folder = folder / f"x{times}"
    made = {"base": folder / "base"}
    if not made["base"].exists():
        widen(subject.checkpoint, subject.geometry, made["base"], times)
    for row in found.rows:
        made[row.way] = folder / row.way.replace(" ", "-")
        if not made[row.way].exists():
            file = made[row.way].with_suffix(".json")
            moved(row.plan, made["base"]).save(file)
            expertcut("prune", made["base"], made[row.way], "--plan", file)
    return made


def moved(plan: Plan, twin: Path) -> Plan:
    """Return the plan for the twin, whose fingerprint knows its width."""
    checkpoint = open_checkpoint(twin)
    source = Source(name=checkpoint.public_name, fingerprint=fingerprint(checkpoint, read_geometry(checkpoint)))
    return plan.model_copy(update={"source": source})


def apart(subject: Subject, found: Study, twin: Path, text: CalibrationSet) -> float:
    """Return the largest difference between twin and model in a sequence's mean loss, over base and all plans; nats."""
    checkpoint = open_checkpoint(twin)
    plans = {row.way: row.plan for row in found.rows}
    wide = evaluate(
        checkpoint, read_geometry(checkpoint), text, {way: moved(plan, twin) for way, plan in plans.items()}, OPTIONS,
        notify=say, advance=silent,
    )  # fmt: skip
    return float((abs(wide.nll - subject.whatif(text, plans).nll) / wide.tokens).max())


def prompts(subject: Subject, text: CalibrationSet, file: Path) -> Path:
    """Write the beginnings of held-out sequences: tokens that are used together, as random ones are not."""
    begun = (subject.tokenizer.decode(sequence.ids[:PROMPT]) for sequence in text.sequences)
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in begun))
    return file


def served(made: dict[str, Path], given: argparse.Namespace, asked: Path, folder: Path) -> Bench:
    expertcut(
        "bench", *made.values(), "--concurrency", ",".join(map(str, CLIENTS)), "--prompts", asked,
        "--output-len", given.output_len, "--rounds", given.rounds, "--at-once", given.at_once,
        "--python", ROOT / ".venv-vllm/bin/python", "--engine-args", ENGINE, "-o", folder,
    )  # fmt: skip
    return load_bench(folder)


def report(subject: Subject, found: Study, made: dict[str, Path], same: float, speed: Bench) -> None:
    assert speed.machine is not None
    twin = open_checkpoint(made["base"])
    work = model_cost(twin, read_geometry(twin))
    read = " and ".join(f"{read_share(work, clients):.1%} at {clients}" for clients in CLIENTS)
    rows = {(row.variant, row.concurrency): row for row in speed.rows}
    out(
        f"\n#### {subject.title}\n",
        f"Base: {found.base}. Twin: {format_size(twin.nbytes)}, experts {read_geometry(twin).expert_width} wide, which "
        f"are {routed_share(work):.1%} of the activated parameters and, of the weights that a step reads, {read} "
        f"requests; losses of model and twin differ by at most {same:.1g} nats, plan by plan. {speed.engine}, "
        f"{speed.machine.cores} cores of {speed.machine.cpu}.\n",
    )
    columns = ["plan", "experts", "top-k", "vLLM", *(f"tokens/s, {n} at a time" for n in CLIENTS),
               "loss, % of the base's", "arithmetic, points", "memory", "worth it"]  # fmt: skip
    base = [rows[made["base"].name, clients] for clients in CLIENTS]
    first = ["base", subject.geometry.num_experts, subject.geometry.top_k, "stock", *map(_speed, base), "–", "–",
             _memory(base), "–"]  # fmt: skip
    own = {row.way: [rows[made[row.way].name, clients] for clients in CLIENTS] for row in found.rows}
    out(table(columns, [first, *(_cells(row, own[row.way]) for row in found.rows)]))


def _cells(row: Quality, measured: list[Row]) -> list[object]:
    return [
        f"{row.way}{', gain' * row.gain}", row.experts, f"{row.top_k:.3g}", "stock" if row.stock else "plug-in",
        *map(_speed, measured), _shown(row.growth), _shown(row.points), _memory(measured),
        "**yes**" if worth(row, measured) else "no",
    ]  # fmt: skip


def worth(row: Quality, measured: list[Row]) -> bool:
    """True if it is fast enough at one of the loads, beyond doubt faster there, and good enough."""
    faster = any((one.ratio or 1) >= FASTER and (one.ratio_low or 0) > 1 for one in measured)
    return faster and row.growth[2] < NLL.value and row.points[1] > POINTS


def _speed(row: Row) -> str:
    ratio = "" if row.ratio is None else f", × {row.ratio:.2f} ({row.ratio_low or 0:.2f} to {row.ratio_high or 0:.2f})"
    return f"{row.tokens_per_s:.0f}{ratio}"


def _shown(found: tuple[float, float, float]) -> str:
    value, low, high = (100 * part for part in found)
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def _memory(measured: list[Row]) -> str:
    return format_size(max(row.memory or 0 for row in measured))


def main() -> None:
    parser = arguments("More throughput for next to no quality.", 16384, 65536)
    parser.add_argument("--items", type=int, default=4000, help="arithmetic problems that are reported on")
    parser.add_argument("--rounds", type=int, default=4, help="turns that every plan gets")
    parser.add_argument("--output-len", type=int, default=32, help="tokens that are written for each request")
    parser.add_argument("--at-once", type=int, default=3, help="servers that are up at a time, about 4 GB each")
    parser.add_argument("--gigabytes", type=float, default=1.6, help="of the twin's experts")
    parser.add_argument("--folder", type=Path, default=ROOT / ".bench" / "load", help="what is made stays here")
    parser.add_argument(
        "--quality-only", action="store_true", help="choose plans and measure their cost, serve nothing"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for subject in subjects(given, Path(scratch)):
            folder = given.folder / subject.folder.name.strip("_")
            found = studied(subject, given, folder)
            say(f"{subject.folder.name}: {found.base}")
            for row in found.rows:
                say(f"  {row.name}: loss {_shown(row.growth)} %, arithmetic {_shown(row.points)} points")
            if given.quality_only:
                continue
            made = checkpoints(subject, found, folder, 1e9 * given.gigabytes)
            _, text = subject.text(subject.heldout, given.heldout_tokens, 0).parted(2)
            same = apart(subject, found, made["base"], subject.text(subject.heldout, SAME, 0))
            speed = served(made, given, prompts(subject, text, folder / "prompts.jsonl"), folder / "speed")
            report(subject, found, made, same, speed)


if __name__ == "__main__":
    main()
