"""Files that `eval --json` and `bench` wrote in, tables for a model card out; figures keep their intervals.

Names of plans and models are cut to their last part: a card tells nothing of the machine that it was made on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from expertcut.checkpoint import load_json
from expertcut.checkpoint.local import SINGLE
from expertcut.errors import CheckpointError, DataError
from expertcut.measure.bench import SCHEMA, Bench, load_bench

_NEXT = "--results takes what `expertcut eval … --json` prints, and the bench.json of `expertcut bench`"


@dataclass(frozen=True)
class Table:
    """One table of a card."""

    title: str
    note: str
    """What was measured, on what, and what the interval is."""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def read_results(paths: Sequence[Path]) -> list[Table]:
    """Read measurements, each file one or several tables.

    Raises:
        DataError: a file cannot be read, or holds no measurement.
    """
    return [table for path in paths for table in _tables(path)]


def _tables(path: Path) -> list[Table]:
    try:
        document = load_json(path)
    except (CheckpointError, OSError) as error:
        raise DataError(f"{path}: cannot be read as JSON", _NEXT) from error
    try:
        if isinstance(document, dict) and document.get("schema") == SCHEMA:
            return [_speed(load_bench(path))]
        found = [_text(document)] if "results" in document else []
        found += _tasks(document["tasks"]) if "tasks" in document else []
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: holds no measurement of this form ({type(error).__name__}: {error})", _NEXT) from None
    if not found:
        raise DataError(f"{path}: holds no measurement", _NEXT)
    return found


def _text(document: Mapping[str, Any]) -> Table:
    rows = []
    for result in document["results"]:
        domains = result["domains"] if len(result["domains"]) > 1 else {}
        for domain, found in {"all": result["overall"], **domains}.items():
            base = result["name"] == "base"
            beside = ("", "", "") if base else (
                _signed(found["change"]), _number(found["kl"], ".4f"), _number(found["agreement"], ".1%")
            )  # fmt: skip
            name = _plain(document["model"] if base else result["name"])
            rows.append((name, cell(domain), f"{found['tokens']:,}", _form(found["nll"], ".4f"), *beside))
    note = (
        f"Next-token prediction on {document['tokens']:,} tokens of held-out text, sequences of {document['seq_len']}. "
        "Loss in nats per token; change of the loss, KL(base‖plan) and top-1 agreement with their 95 % intervals over "
        "sequences."
    )
    return Table("Held-out text", note, ("model", "text", "tokens", "loss", "change", "KL", "top-1"), tuple(rows))


def _tasks(tasks: Mapping[str, Any]) -> list[Table]:
    gaps = {(gap["name"], gap["task"], gap["metric"]): gap["change"] for gap in tasks["comparisons"]}
    rows = []
    for run in tasks["runs"]:
        for metric in run["metrics"]:
            change = gaps.get((run["model"], metric["task"], metric["metric"]))
            documents = f"{len(run['documents'][metric['task']]):,}"
            value = _form(metric["value"], ".4f")
            row = (_plain(run["model"]), metric["task"], metric["metric"], documents, value)
            rows.append((*map(cell, row), _signed(change) if change else ""))
    engines = sorted({run["engine"] for run in tasks["runs"]})
    limit = f", the first {tasks['limit']} documents of each" if tasks["limit"] else ""
    note = f"lm-eval, run with {', '.join(map(cell, engines))}{limit}. Change with its 95 % interval over documents."
    return [Table("Tasks", note, ("model", "task", "metric", "documents", "value", "change"), tuple(rows))]


def _speed(bench: Bench) -> Table:
    rows = tuple(
        (_plain(row.variant), str(row.concurrency), str(row.input_len), str(row.output_len),
         f"{row.tokens_per_s:.1f}", _number({"value": row.ratio, "low": row.ratio_low, "high": row.ratio_high}, ".3f"))
        for row in bench.rows
    )  # fmt: skip
    machine = bench.machine
    where = f" on {machine}" if machine else ""
    cut = "" if bench.complete else " The run was cut short."
    note = (
        f"Tokens written per second in {bench.engine}{where}, median over rounds; ratio to the first variant in the "
        f"same rounds with its 95 % interval.{cut}"
    )
    return Table("Speed under load", note, ("variant", "clients", "in", "out", "tokens/s", "ratio"), rows)


def _plain(name: str) -> str:
    """A Hub name as it is, of a path its last part."""
    path = PurePath(name)
    hub = len(path.parts) == 2 and not path.suffix and not Path(name).exists()
    return cell(name if hub else path.name if path.name != SINGLE else path.parent.name)


def _number(found: Mapping[str, Any], form: str) -> str:
    if found["value"] is None:
        return ""
    between = "" if found["low"] is None else f" [{found['low']:{form}}, {found['high']:{form}}]"
    return f"{found['value']:{form}}{between}"


def _signed(found: Mapping[str, Any]) -> str:
    return _number(found, "+.4f")


def _form(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def cell(text: str) -> str:
    """Return a text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
