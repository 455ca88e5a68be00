"""What `bench` is asked to measure, and in which engine: the options, their checks, and how variants are started."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertcut.cli.common import numbers
from expertcut.errors import UsageError

if TYPE_CHECKING:
    from expertcut.measure.bench import Cell
    from expertcut.measure.prompts import Prompts
    from expertcut.measure.rounds import Start
    from expertcut.runtimes.entries import Entry

LOAD, ENGINE = "Load", "Engine"
VLLM, TRANSFORMERS = "vllm", "transformers"
INPUT_LEN = 128


@dataclass(frozen=True)
class LoadOptions:
    """What is asked of the engine, and how often, as typed."""

    concurrency: Annotated[
        str,
        typer.Option("--concurrency", metavar="N,…", rich_help_panel=LOAD, help="Requests that are open at a time."),
    ] = "1,8,32"
    input_len: Annotated[
        str | None,
        typer.Option(
            "--input-len", metavar="N,…", rich_help_panel=LOAD, help="Tokens of a random prompt. Default: 128."
        ),
    ] = None
    output_len: Annotated[
        str, typer.Option("--output-len", metavar="N,…", rich_help_panel=LOAD, help="Tokens written for each, exactly.")
    ] = "64"
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            rich_help_panel=LOAD,
            show_default=False,
            help="Prompts instead of random ones: .jsonl with `prompt` or `text`, or else one a line.",
        ),
    ] = None
    requests: Annotated[
        int,
        typer.Option(
            "--requests",
            metavar="N",
            min=1,
            rich_help_panel=LOAD,
            help="Per client and round, in a row; of all clients together 4 at least.",
        ),
    ] = 1
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=1, rich_help_panel=LOAD, help="Turns that every variant gets.")
    ] = 5  # fmt: skip


@dataclass(frozen=True)
class EngineOptions:
    """Where the variants run, as typed."""

    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            metavar="NAME|URL",
            rich_help_panel=ENGINE,
            show_default=False,
            help="vllm (default): started and ended for you. transformers: batches in this process, a floor. A URL "
            "such as http://localhost:8000/v1: a server of OpenAI's completions protocol. One, or one a DIR.",
        ),
    ] = None
    python: Annotated[
        Path | None,
        typer.Option(
            "--python",
            metavar="PATH",
            rich_help_panel=ENGINE,
            show_default=False,
            help="The interpreter of the environment that has vLLM. Default: this one.",
        ),
    ] = None
    engine_args: Annotated[
        str,
        typer.Option(
            "--engine-args",
            metavar="ARGS",
            rich_help_panel=ENGINE,
            show_default=False,
            help="What vLLM's server gets besides, as typed in a shell: '--dtype bfloat16 --enforce-eager'.",
        ),
    ] = ""
    at_once: Annotated[
        int,
        typer.Option(
            "--at-once",
            metavar="N",
            min=1,
            rich_help_panel=ENGINE,
            help="Engines that may be up at a time, if memory allows. 1: each is started anew in every round.",
        ),
    ] = 1
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="S", min=1, rich_help_panel=ENGINE, help="Seconds for one request.")
    ] = 600
    start_timeout: Annotated[
        float,
        typer.Option("--start-timeout", metavar="S", min=1, rich_help_panel=ENGINE, help="Seconds for vLLM to start."),
    ] = 900  # fmt: skip


USUAL_LOAD, USUAL_ENGINE = LoadOptions(), EngineOptions()
VLLM_ONLY = ("python", "engine_args", "start_timeout")
LOG = "vllm.log"


@dataclass(frozen=True)
class Prepared:
    """Everything that is measured, ready to start."""

    entries: Sequence[Entry]
    loads: Sequence[Cell]
    prompts: Prompts
    start: Start
    at_once: int
    facts: dict[str, Any]
    """What the file says of the engine, the machine and the prompts."""


def prepare(
    models: Sequence[Path], top_k: str | None, load: LoadOptions, engine: EngineOptions, seed: int, out_dir: Path
) -> Prepared:  # fmt: skip
    """Check all options and open what they name; nothing is started.

    Raises:
        UsageError: options that do not go together.
        RuntimeLintError: the engine is missing, or a server does not answer.
    """
    from expertcut.measure.bench import cells
    from expertcut.runtimes.entries import check_lengths, open_entries, room

    tops, clients = numbers("--top-k", top_k), numbers("--concurrency", load.concurrency)
    lengths, outputs = numbers("--input-len", load.input_len), numbers("--output-len", load.output_len)
    urls = _check(models, tops, load, engine)
    entries = open_entries(models, tops)
    prompts = _prompts(entries, load, seed)
    if prompts.given:
        lengths = [round(sum(map(len, prompts.given)) / len(prompts.given))]
    loads, longest = cells(clients, lengths or [INPUT_LEN], outputs), max(map(len, prompts.given), default=0)
    check_lengths(entries, loads, longest)
    start, facts = _engine(entries, urls, engine, room(loads, longest), out_dir)
    facts |= {"prompts": load.prompts.name if load.prompts else "random", "seed": seed}
    return Prepared(entries, loads, prompts, start, len(entries) if urls else engine.at_once, facts)


def _check(models: Sequence[Path], tops: Sequence[int], load: LoadOptions, engine: EngineOptions) -> list[str]:
    """The URLs among the engines; all or none are."""
    given = engine.engine or [VLLM]
    urls = [name for name in given if name.startswith(("http://", "https://"))]
    if not urls and (len(given) > 1 or given[0] not in (VLLM, TRANSFORMERS)):
        raise UsageError(f"engine {', '.join(given)}: expected {VLLM}, {TRANSFORMERS} or URLs", f"--engine {VLLM}")
    if urls and (len(urls) < len(given) or len(urls) not in (1, len(models))):
        raise UsageError(f"found {len(given)} engines for {len(models)} DIRs", "one URL, or one for each DIR")
    if given != [VLLM]:
        idle = [name for name in VLLM_ONLY if getattr(engine, name) != getattr(USUAL_ENGINE, name)]
        if idle:
            raise UsageError(f"--{idle[0].replace('_', '-')} has an effect with --engine {VLLM} only")
    if urls and (tops or engine.at_once != 1):
        option = "--top-k" if tops else "--at-once"
        raise UsageError(f"{option} has no effect on a server that runs already", "start it with another top-k")
    if load.prompts and load.input_len:
        raise UsageError("--prompts are as long as they are; --input-len is for random ones")
    return urls


def _prompts(entries: Sequence[Entry], load: LoadOptions, seed: int) -> Prompts:
    from expertcut.measure.prompts import Prompts, read_prompts

    given: list[list[int]] = []
    if load.prompts:
        from expertcut.calibrate.tokenizer import load_tokenizer

        tokenizers = [load_tokenizer(path) for path in dict.fromkeys(entry.checkpoint.path for entry in entries)]
        if len({tokenizer.fingerprint for tokenizer in tokenizers}) > 1:
            raise UsageError("--prompts: the DIRs have different tokenizers", "measure them in runs of their own")
        given = read_prompts(load.prompts, tokenizers[0])
    return Prompts(given, min(entry.vocabulary for entry in entries), seed, load.requests)


def _engine(
    entries: Sequence[Entry], urls: Sequence[str], engine: EngineOptions, positions: int, out_dir: Path
) -> tuple[Start, dict[str, Any]]:  # fmt: skip
    """How the variants are started, and what the file says of it."""
    from expertcut.runtimes.entries import behind, in_transformers, in_vllm
    from expertcut.runtimes.machine import describe
    from expertcut.runtimes.serving import check_arguments, find_vllm

    if urls:
        return behind(entries, urls, engine.timeout), {"engine": ", ".join(urls), "machine": None}
    if engine.engine == [TRANSFORMERS]:
        from transformers import __version__

        return in_transformers(entries), {"engine": f"transformers {__version__}", "machine": describe()}
    arguments = shlex.split(engine.engine_args)
    check_arguments(arguments, any(entry.edits for entry in entries))
    python, version = find_vllm(engine.python)
    start = in_vllm(
        entries, python, arguments, positions, out_dir / LOG, engine.start_timeout, engine.timeout
    )  # fmt: skip
    return start, {"engine": version, "machine": describe()}
