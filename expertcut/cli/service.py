"""The options that say on what hardware and under what load: as typed in, a machine and loads out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertcut.cli.common import Output, numbers
from expertcut.cli.options import UNSERVED, Service
from expertcut.errors import UsageError

if TYPE_CHECKING:
    from expertcut.calibrate.profile import Profile
    from expertcut.checkpoint import Checkpoint
    from expertcut.choose.plan import Plan
    from expertcut.measure.cost_hardware import Machine
    from expertcut.measure.cost_model import ModelCost
    from expertcut.measure.cost_traffic import Load
    from expertcut.measure.pareto import Speed
    from expertcut.measure.sweep import Cell
    from expertcut.model import Geometry

LENGTH = 1024
"""Tokens of a prompt, and of an answer, where none are given."""


def machine_of(service: Service, tp: int | None) -> Machine:
    """Return the machine.

    Raises:
        UsageError: none is given, or it is not known or not possible.
    """
    from expertcut.measure.cost_hardware import read_machine

    if service.hardware is None:
        raise UsageError("found no --hardware", "for example --hardware h200x8; or a file as in docs/estimate.md")
    return read_machine(service.hardware, tp=tp, ep=service.ep)


def loads_of(service: Service) -> list[Load]:
    """Return the loads, one a number of requests at a time.

    Raises:
        UsageError: the numbers are none.
    """
    from expertcut.measure.cost_traffic import Load

    lengths = service.input_len or LENGTH, service.output_len or LENGTH
    return [Load(clients, *lengths) for clients in numbers("--concurrency", service.concurrency)]


def load_of(service: Service) -> Load:
    """Return the one load.

    Raises:
        UsageError: there are none or several.
    """
    loads = loads_of(service)
    if len(loads) != 1:
        raise UsageError(f"--concurrency {service.concurrency}: expected one load to compare by", "--concurrency 32")
    return loads[0]


def refuse_unused(service: Service, tp: int | None, needs: str) -> None:
    """Refuse options of a prediction that is not asked for; `needs` is the option that asks for it.

    Raises:
        UsageError: there are some.
    """
    if service != UNSERVED or tp is not None:
        raise UsageError(f"--hardware, --concurrency, --input-len, --output-len, --tp and --ep need {needs}")


def say_assumptions(out: Output, work: ModelCost, machine: Machine) -> None:
    """Note what a prediction takes for granted."""
    for note in work.notes:
        out.note(note)
    if not machine.fitted:
        out.note(f"the constants of {machine.name} are guessed, fitted to no measurement: see expertcut estimate --fit")


@dataclass(frozen=True)
class Speeds:
    """How fast the plans of a sweep are."""

    by_cell: dict[Cell, Speed]
    facts: dict[str, Any]
    """What they were predicted for or measured in, for the document."""


def check_speeds(service: Service, tp: int | None, bench: Path | None) -> None:
    """Check that the options of a throughput go together, before anything is opened.

    Raises:
        UsageError: they do not.
    """
    if service.concurrency is None:
        refuse_unused(service, tp, "--concurrency")
        if bench is not None:
            raise UsageError("--bench needs --concurrency", "for example --concurrency 32")
        return
    load_of(service)
    if bench is None:
        machine_of(service, tp)
    elif service.hardware is not None or tp is not None or service.ep is not None:
        raise UsageError("--bench is measured, --hardware, --tp and --ep are for a prediction: one or the other")


def speeds_of(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, plans: dict[Cell, Plan], profile: Profile | None,
    service: Service, tp: int | None, bench: Path | None,
) -> Speeds | None:  # fmt: skip
    """Return how fast plans are, None if that is not asked for; cells that were not measured have no speed."""
    from expertcut.measure.cost import predict_plans
    from expertcut.measure.cost_fit import read_rows
    from expertcut.measure.cost_model import model_cost
    from expertcut.measure.pareto import Speed, measured_speeds

    if service.concurrency is None:
        return None
    load = load_of(service)
    if bench is not None:
        measured = read_rows(bench)
        rates = measured_speeds(
            measured, geometry, list(plans), load.concurrency, service.input_len, service.output_len
        )  # fmt: skip
        for cell in (cell for cell in plans if cell not in rates):
            out.note(f"{cell}: no throughput, {measured.source} has no row of it")
        return Speeds(rates, {"concurrency": load.concurrency, "measured": measured.source})
    machine, work = machine_of(service, tp), model_cost(checkpoint, geometry, profile)
    say_assumptions(out, work, machine)
    found = predict_plans(work, geometry, {str(cell): plan for cell, plan in plans.items()}, machine, load)
    made = {cell: found[str(cell)] for cell in plans}
    return Speeds(
        {cell: Speed(one.tokens_per_second, one.gain) for cell, one in made.items()},
        {"concurrency": load.concurrency, "input_len": load.input_len, "output_len": load.output_len,
         "hardware": machine.model_dump()},
    )  # fmt: skip
