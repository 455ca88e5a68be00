"""Arguments and options that several commands share, each defined once; those that go together as one dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

BUDGET, CHOICE, RUN = "Budget: exactly one of", "Choice", "Forward pass"
GATE, MEASURED, SERVICE = "Gate", "Measured while it is made", "Speed: hardware and load"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint: a directory, or ORG/NAME on the Hub.", show_default=False)
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a model on the Hub.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]

Tokens = Annotated[
    int | None, typer.Option("--tokens", metavar="N", help="Tokens in all. Default: all there are.")
]  # fmt: skip
SeqLen = Annotated[
    int | None,
    typer.Option("--seq-len", metavar="N", help="Tokens of a sequence. Default: 2048, or the model's limit if lower."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Decides every random choice.")]

Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.", rich_help_panel=RUN)
]


@dataclass(frozen=True)
class Forward:
    """The options that say how a model is run, as typed."""

    device: Device = "auto"
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="NAME",
            rich_help_panel=RUN,
            help="auto, float32, bfloat16 or float16. auto: float32 on a CPU, else the checkpoint's.",
        ),
    ] = "auto"
    resident: Annotated[
        bool, typer.Option("--resident", help="Keep all layers loaded instead of one at a time.", rich_help_panel=RUN)
    ] = False
    micro_tokens: Annotated[
        int, typer.Option("--micro-tokens", metavar="N", min=1, help="Tokens run at a time.", rich_help_panel=RUN)
    ] = 2048  # fmt: skip


Shards = Annotated[
    int | None,
    typer.Option(
        "--tp", metavar="N", min=1, help="Devices that share attention. Default: all.", rich_help_panel=SERVICE
    ),
]


@dataclass(frozen=True)
class Service:
    """The hardware and the load that speed is predicted for, as typed."""

    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            metavar="NAMExN|FILE",
            rich_help_panel=SERVICE,
            show_default=False,
            help="N of a100, a800, h100, h200, b200, mi300x, rtx4090 or cpu, or a file with numbers of one's own.",
        ),
    ] = None
    concurrency: Annotated[
        str | None,
        typer.Option("--concurrency", metavar="N", help="Requests at a time.", rich_help_panel=SERVICE),
    ] = None
    input_len: Annotated[
        int | None,
        typer.Option(
            "--input-len", metavar="N", min=1, help="Tokens of a prompt. Default: 1024.", rich_help_panel=SERVICE
        ),
    ] = None
    output_len: Annotated[
        int | None,
        typer.Option(
            "--output-len", metavar="N", min=1, help="Tokens of an answer. Default: 1024.", rich_help_panel=SERVICE
        ),
    ] = None
    ep: Annotated[
        int | None,
        typer.Option(
            "--ep",
            metavar="N",
            min=1,
            help="Devices that whole experts are spread over. Default: sliced.",
            rich_help_panel=SERVICE,
        ),
    ] = None  # fmt: skip


@dataclass(frozen=True)
class Services(Service):
    """The same for several loads."""

    concurrency: Annotated[
        str | None,
        typer.Option("--concurrency", metavar="N,…", help="Requests at a time.", rich_help_panel=SERVICE),
    ] = "1,8,32,128"


@dataclass(frozen=True)
class Heldout:
    """Limits on what a plan may cost, and the text to judge it by, as typed."""

    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            metavar="LIMIT",
            rich_help_panel=GATE,
            show_default=False,
            help="Write only if it holds: nll<=1%, ppl<=5%, kl<=0.05, agreement>=0.9, acceptance>=0.9; with @DOMAIN in "
            "one domain, with @each in every one. Repeatable.",
        ),
    ] = None
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="TEXT",
            rich_help_panel=GATE,
            show_default=False,
            help="Held-out text for --gate: a .txt, .jsonl or .parquet file or a recipe. Repeatable.",
        ),
    ] = None
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", metavar="N", rich_help_panel=GATE, help="Tokens in all. Default: all there are."),
    ] = None
    seq_len: Annotated[
        int | None,
        typer.Option("--seq-len", metavar="N", rich_help_panel=GATE, help="Tokens of a sequence. Default: 2048."),
    ] = None  # fmt: skip


@dataclass(frozen=True)
class Recorded(Forward):
    """The options of a forward pass that makes a profile, as typed."""

    pair_domains: Annotated[
        bool, typer.Option("--pair-domains", help="Store pair statistics per domain, not pooled.", rich_help_panel=RUN)
    ] = False
    moments: Annotated[
        bool, typer.Option("--moments", help="Store mean and variance of every expert's output.", rich_help_panel=RUN)
    ] = False


@dataclass(frozen=True)
class Choice:
    """The options that a plan is made from, as typed."""

    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            metavar="NAME",
            rich_help_panel=CHOICE,
            show_default=False,
            help="auto, the best of all on --data. With a profile: "
            "frequency, soft, gate-mean, ean-sum, ean-mean, reap, gated-norm-sum, man, msan, "
            "energy, easy-ep, mone, hope, gram, unified:A,B[,sum]. "
            "Without: random, odd, even, first, last, router-norm, aimer. With --calibration: naee.",
        ),
    ] = None
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile", metavar="DIR", help="Profile of the model.", rich_help_panel=CHOICE, show_default=False
        ),
    ] = None
    top_k: Annotated[
        str | None,
        typer.Option(
            "--top-k",
            metavar="K",
            rich_help_panel=CHOICE,
            show_default=False,
            help="Experts activated per token, or auto: the fewest that keep --max-loss. Default: unchanged.",
        ),
    ] = None
    top_k_schedule: Annotated[
        str | None,
        typer.Option(
            "--top-k-schedule",
            metavar="B,H,E,P",
            rich_help_panel=CHOICE,
            show_default=False,
            help="Top-k of the first layer, of layer P (from 1) and of the last, linear between.",
        ),
    ] = None
    mean_top_k: Annotated[
        float | None,
        typer.Option(
            "--mean-top-k",
            metavar="K",
            rich_help_panel=CHOICE,
            show_default=False,
            help="Top-k on average over the layers, each by what it loses (needs --profile).",
        ),
    ] = None
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer/--uniform",
            rich_help_panel=CHOICE,
            help="Let layers differ: served by expertcut's plug-ins only, and refused by all others.",
        ),
    ] = False
    domain_weights: Annotated[
        str | None,
        typer.Option(
            "--domain-weights",
            metavar="D=W,…",
            rich_help_panel=CHOICE,
            help="Weights of the profile's domains, such as code=2,math=1; others count 0.",
        ),
    ] = None
    protect: Annotated[
        list[str] | None,
        typer.Option(
            "--protect",
            metavar="IDS",
            rich_help_panel=CHOICE,
            show_default=False,
            help="Experts to keep whatever their score: LAYER:ID,… or ID,… for all layers. Repeatable.",
        ),
    ] = None
    protect_super: Annotated[
        bool, typer.Option("--protect-super", help="Keep super experts (needs --profile).", rich_help_panel=CHOICE)
    ] = False
    experts: Annotated[
        int | None, typer.Option("--experts", metavar="N", help="Experts to keep per layer.", rich_help_panel=BUDGET)
    ] = None
    keep: Annotated[
        str | None, typer.Option("--keep", metavar="R", help="Share to keep: 0.75 or 75%.", rich_help_panel=BUDGET)
    ] = None
    drop: Annotated[
        int | None, typer.Option("--drop", metavar="N", help="Experts to drop per layer.", rich_help_panel=BUDGET)
    ] = None
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SIZE",
            rich_help_panel=BUDGET,
            help="The most experts, of those that vLLM serves fast, whose weights fit per device, such as 48GiB.",
        ),
    ] = None
    tp: Annotated[
        int | None,
        typer.Option(
            "--tp",
            metavar="N",
            min=1,
            rich_help_panel=BUDGET,
            help="With --fit: devices that share the weights, default 1. With --goal: those that share attention.",
        ),
    ] = None
    drop_mtp: Annotated[
        bool,
        typer.Option(
            "--drop-mtp", help="Drop multi-token-prediction layers, do not prune them.", rich_help_panel=CHOICE
        ),
    ] = False
    seed: Seed = 0  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """The options by which a plan is measured while it is made, and the text for it, as typed."""

    max_loss: Annotated[
        list[str] | None,
        typer.Option(
            "--max-loss",
            metavar="LIMIT",
            rich_help_panel=MEASURED,
            show_default=False,
            help="For --top-k auto and --goal: nll<=1%, ppl<=5%, kl<=0.05, agreement>=0.9, acceptance>=0.9; with "
            "@DOMAIN in one domain, with @each in every one. Repeatable.",
        ),
    ] = None
    by: Annotated[
        str,
        typer.Option(
            "--by",
            metavar="NAME",
            rich_help_panel=MEASURED,
            help="For --strategy auto, --evolve and --budget global, what is made small: nll, kl, or worst (domain).",
        ),
    ] = "nll"
    evolve: Annotated[
        int | None,
        typer.Option(
            "--evolve",
            metavar="N",
            min=0,
            rich_help_panel=MEASURED,
            show_default=False,
            help="Let the choice evolve over so many generations, judged on --data. Default: 5 with auto, else 0.",
        ),
    ] = None
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            metavar="NAME",
            rich_help_panel=MEASURED,
            help="uniform: as many experts in every layer; global: by what each loses on --data; needs --per-layer.",
        ),
    ] = "uniform"
    floor: Annotated[
        int | None,
        typer.Option(
            "--floor",
            metavar="N",
            rich_help_panel=MEASURED,
            help="With --budget global, the fewest experts of a layer. Default: half of the average.",
        ),
    ] = None
    ceiling: Annotated[
        int | None,
        typer.Option(
            "--ceiling", metavar="N", rich_help_panel=MEASURED, help="And the most. Default: all that there are."
        ),
    ] = None
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            rich_help_panel=MEASURED,
            help="Run --calibration while choosing, every layer behind the pruned ones before it; no --profile.",
        ),
    ] = False
    gain: Annotated[
        bool,
        typer.Option(
            "--gain",
            rich_help_panel=MEASURED,
            help="Fit a factor on the routed experts' output that makes up for what is left out; kept if it helps.",
        ),
    ] = False
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            metavar="TEXT",
            rich_help_panel=MEASURED,
            show_default=False,
            help="Text for --sequential, --strategy naee and --gain: a recipe or a file. Repeatable.",
        ),
    ] = None
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="TEXT",
            rich_help_panel=MEASURED,
            show_default=False,
            help="Held-out text that all of this is judged on. Repeatable.",
        ),
    ] = None
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", metavar="N", rich_help_panel=MEASURED, help="Tokens of each. Default: all there are."),
    ] = None
    seq_len: Annotated[
        int | None,
        typer.Option("--seq-len", metavar="N", rich_help_panel=MEASURED, help="Tokens of a sequence. Default: 2048."),
    ] = None  # fmt: skip


AS_IT_COMES, POOLED, NO_CHOICE = Forward(), Recorded(), Choice()
NO_GATE, UNMEASURED, UNSERVED, LOADS = Heldout(), Measured(), Service(), Services()


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, in place of each parameter that is one of the dataclasses above, an option per field of it."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation
        if isinstance(kind, type) and is_dataclass(kind):
            groups[parameter.name] = kind
            hints = get_type_hints(kind, include_extras=True)
            parameters += [parameter.replace(name=f.name, annotation=hints[f.name], default=f.default)
                           for f in fields(kind)]  # fmt: skip
        else:
            parameters.append(parameter)

    @wraps(command)
    def run(**given: Any) -> None:
        made = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        command(**given, **made)

    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run
