"""`expertcut push`: a written checkpoint, its card and its plan to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertcut.cli.common import Output, output
from expertcut.cli.options import Json
from expertcut.errors import UsageError

if TYPE_CHECKING:
    from expertcut.share.parcel import Parcel
    from expertcut.share.push import Target


def push(
    ctx: typer.Context,
    out_dir: Annotated[
        Path, typer.Argument(metavar="OUT", help="A checkpoint that expertcut wrote.", show_default=False)
    ],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where to, on the Hub.", show_default=False)],
    source: Annotated[
        str | None,
        typer.Option("--source", metavar="MODEL", help="What it was made from: compare every byte before sending."),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            "--results", metavar="FILE", show_default=False,
            help="For the card: what `eval --json` printed, or bench.json of `bench`. Repeatable.",
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="DIR", help="The profile of its plan, for the card.", show_default=False),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", metavar="ORG/NAME", help="The source on the Hub, if it was a local directory."),
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="If the source's card names none: apache-2.0, mit, …")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Branch to push to, made if it is missing.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Remove what another model left there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent; asks the Hub nothing.")] = False,
    card: Annotated[
        Path | None, typer.Option("--card", metavar="FILE", help="Write the card here, too.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Send a checkpoint to the Hub, with a model card that says what was cut and how, its plan, and what was measured.

    It is checked first, and nothing is sent of one that fails. If it is interrupted, the same command resumes.

    Example:
      expertcut push OUT ORG/NAME --source MODEL --profile model.profile --results eval.json --dry-run
    """
    from expertcut.checkpoint.hub import is_hub_name
    from expertcut.share.push import Target

    out = output(ctx, as_json)
    if not is_hub_name(repo):
        raise UsageError(f"{repo}: expected ORG/NAME")
    parcel, text = _packed(out, out_dir, repo, source, results or [], profile, base_model, licence)
    if card is not None:
        from expertcut.share.parcel import save_card

        save_card(card, text)
    if dry_run:
        _preview(out, parcel, repo, text, shown=card is None)
    else:
        _push(out, parcel, Target(repo, revision, private, force))


def _packed(
    out: Output, out_dir: Path, repo: str, source: str | None, results: list[Path], profile: Path | None,
    base_model: str | None, licence: str | None,
) -> tuple[Parcel, str]:  # fmt: skip
    from expertcut.calibrate.profile import Profile
    from expertcut.checkpoint import open_checkpoint
    from expertcut.model import read_geometry
    from expertcut.model.summary import summarise
    from expertcut.share.card import Card
    from expertcut.share.card import base_model as base_of
    from expertcut.share.metadata import source_metadata
    from expertcut.share.numbers import after
    from expertcut.share.parcel import open_written, pack
    from expertcut.share.results import read_results

    tables = read_results(results)
    found = Profile.load(profile) if profile is not None else None
    original = open_checkpoint(source) if source is not None else None
    with out.busy("checking structure and bytes"):
        checkpoint, record = open_written(out_dir, original)
    base = base_of(record, base_model)
    if base is None:
        out.warn(f"the card has no link to {record.source}, which is no name on the Hub: pass --base-model ORG/NAME")
    if not (licence or source_metadata(checkpoint.path).get("license")):
        out.warn("the card names no licence, as the source's does not: pass --license ID")
    numbers = after(summarise(original, read_geometry(original))) if original is not None else None
    text = Card(repo, base, licence, found, tables, numbers).text(checkpoint, read_geometry(checkpoint), record)
    return pack(checkpoint, record, text, found), text


def _preview(out: Output, parcel: Parcel, repo: str, card: str, shown: bool) -> None:
    from expertcut.cli.tables import facts, size, table

    sizes = parcel.sizes()
    document = {"dry_run": True, "repo": repo, "files": sizes, "nbytes": sum(sizes.values()), "card": card}
    rows: list[tuple[str, object]] = [("would send", f"{size(sum(sizes.values()))} in {len(sizes)} files to {repo}")]
    listing = table(("file", ">bytes"), [(name, f"{nbytes:,}") for name, nbytes in sizes.items()])
    out.finish(document, facts(rows), "", listing, *(["", card] if shown else []))


def _push(out: Output, parcel: Parcel, target: Target) -> None:
    from expertcut.cli.tables import facts, size
    from expertcut.share.push import push as send

    out.resumable = True
    with out.quiet():
        done = send(parcel, target, out.note)
    out.resumable = False
    sent, held = sum(done.sent.values()), sum(done.held.values())
    document: dict[str, Any] = {
        "repo": target.repo, "revision": target.revision or "main", "url": done.url, "commit": done.commit,
        "sent": done.sent, "held": done.held,
    }  # fmt: skip
    rows: list[tuple[str, object]] = [
        ("sent", f"{size(sent)} in {len(done.sent)} files"),
        ("there before", f"{size(held)} in {len(done.held)} files"),
        ("commit", done.commit), ("page", done.url),
    ]  # fmt: skip
    out.finish(document, facts(rows))
