"""A checkpoint with its record, and what was measured of it, in; the model card out. Jinja holds the words.

Invariant: the card says nothing that the record, the plan, the profile, the headers and the results do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expertcut.checkpoint import Checkpoint
from expertcut.checkpoint.hub import is_hub_name
from expertcut.choose.budget import format_size
from expertcut.choose.criteria import get_criterion
from expertcut.choose.plan import LayerPlan, Plan
from expertcut.errors import ProfileError, UsageError
from expertcut.measure.heal_record import HealRecord
from expertcut.model import Geometry
from expertcut.model.summary import by_layer, summarise
from expertcut.rewrite.record import Record
from expertcut.runtimes.lint import LintFinding, lint, lint_subject
from expertcut.share.metadata import head, metadata, source_metadata
from expertcut.share.numbers import Numbers, after, before
from expertcut.share.results import Table, cell

if TYPE_CHECKING:
    from expertcut.calibrate.profile import Profile

TEMPLATE = "card.md.jinja"


@dataclass(frozen=True)
class Card:
    """What a card is made of besides the checkpoint."""

    repo: str
    base: str | None
    """Hub name of the source; None if it is not known to have one."""
    licence: str | None
    profile: Profile | None
    results: Sequence[Table]
    source: Numbers | None = None
    """Of the source itself, where it was opened; otherwise its numbers follow from the record by arithmetic."""

    def text(self, checkpoint: Checkpoint, geometry: Geometry, record: Record) -> str:
        """Return the README.md of a checkpoint.

        Raises:
            UsageError: a licence that contradicts the source's card.
            ProfileError: the profile is not the one that the plan was made from.
        """
        import jinja2

        if self.profile is not None:
            _check_profile(self.profile, record.plan)
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("expertcut.share", "."), undefined=jinja2.StrictUndefined, trim_blocks=True,
            lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
        )  # fmt: skip
        healing = HealRecord.of_healed(record.plan)
        findings = lint(lint_subject(geometry, checkpoint.config))
        fields = self._fields(checkpoint, record)
        return environment.get_template(TEMPLATE).render(
            head=head(fields), repo=self.repo, title=self.repo.partition("/")[2], base=self.base, fields=fields,
            record=record, rows=_sizes(record, self.source or before(checkpoint, geometry, record),
                                       after(summarise(checkpoint, geometry)), geometry),
            layers=_layers(record, geometry), chosen=_chosen(record.plan), uneven=geometry.uneven, findings=findings,
            profile=_profile(self.profile) if self.profile else None, results=self.results,
            fits={f.runtime for f in findings} - {f.runtime for f in findings if f.status in ("wrong", "refuses")},
            notes=_notes(findings), commands=_commands(record.plan, healing),
            gained=any(entry.gain is not None for entry in record.plan.layers.values()), cut=_cuts(record),
            changed=len(record.plan.deltas.tensors) if record.plan.deltas else 0, healing=healing,
            healed=_healed(healing) if healing else "", cell=cell,
            remote=" --trust-remote-code" if checkpoint.config.get("auto_map") else "",
        )  # fmt: skip

    def _fields(self, checkpoint: Checkpoint, record: Record) -> dict[str, Any]:
        criterion = record.plan.provenance.get("criterion")
        tags = ["moe", *(["pruned"] if _cuts(record) else []), "expertcut"]
        tags += [criterion.partition(":")[0]] if isinstance(criterion, str) else []
        sources = [s for data in (self.profile.meta.data if self.profile else ()) for s in data.sources]
        text = any(str(name).endswith("ForCausalLM") for name in checkpoint.config.get("architectures") or ())
        return metadata(
            source_metadata(checkpoint.path), base=self.base, licence=self.licence, tags=tags, text=text,
            datasets=[s["dataset"] for s in sources if s.get("kind") == "hub"],
        )  # fmt: skip


def base_model(record: Record, asked: str | None) -> str | None:
    """Return the Hub name of the source: as asked for, else as recorded.

    Raises:
        UsageError: what was asked for is no Hub name.
    """
    if asked is not None and not is_hub_name(asked):
        raise UsageError(f"--base-model {asked}: expected ORG/NAME")
    return asked or (record.source if is_hub_name(record.source) else None)


def _cuts(record: Record) -> bool:
    """True if experts are gone, and not only the top-k changed."""
    return any(len(entry.kept) < record.before.experts for entry in record.plan.layers.values())


def _check_profile(profile: Profile, plan: Plan) -> None:
    made_from = plan.provenance.get("profile")
    if made_from != (found := profile.digest()):
        expected = f"its plan was made from {made_from}" if made_from else "its plan was made without a profile"
        raise ProfileError(f"--profile is {found}, but {expected}", "give that profile, or none")


def _sizes(record: Record, old: Numbers, new: Numbers, geometry: Geometry) -> list[tuple[str, str, str]]:
    experts = [block.experts for block in geometry.trunk]
    top_k = [block.top_k for block in geometry.trunk]
    rows = [
        ("routed experts per MoE layer", str(record.before.experts), by_layer(experts)),
        ("of these, per token (top-k)", str(record.before.top_k), by_layer(top_k)),
        ("weights", f"{format_size(old.nbytes)}", f"{format_size(new.nbytes)} ({_share(new.nbytes, old.nbytes)})"),
    ]
    for what, was, now in (
        ("parameters", old.parameters, new.parameters), ("activated per token", old.activated, new.activated)
    ):  # fmt: skip
        if now is not None:
            share = f" ({_share(now, was)})" if was else ""
            rows.append((what, f"{was:,}" if was else "not recorded", f"{now:,}{share}"))
    return rows


def _layers(record: Record, geometry: Geometry) -> list[tuple[int, int, int, str]]:
    """Every layer's experts, top-k and gain, where they differ."""
    entries = list(record.plan.layers.values())
    if len({(len(e.kept), e.top_k, e.gain) for e in entries}) == 1:
        return []
    return [(e.layer, len(e.kept), e.top_k or record.before.top_k, _gain(e)) for e in entries]


def _gain(entry: LayerPlan) -> str:
    return "–" if entry.gain is None else f"{entry.gain:.4f}"


def _chosen(plan: Plan) -> list[tuple[str, str]]:
    """How the plan says that it was made."""
    facts: Mapping[str, Any] = plan.provenance
    rows = [("criterion", _criterion(facts.get("criterion"), facts.get("paper")))]
    budget = facts.get("budget")
    if isinstance(budget, dict) and budget.get("option"):
        rows.append(("budget", f"`{budget['option']}`" + (f"; {budget['note']}" if budget.get("note") else "")))
    if facts.get("top_k"):
        rows.append(("top-k", f"`{facts['top_k']}`"))
    gains = sorted({entry.gain for entry in plan.layers.values() if entry.gain is not None})
    if gains:
        rows.append(("gain on the experts' output", " to ".join(f"{g:.4f}" for g in gains[:1] + gains[1:][-1:])))
    for name in ("protected", "super_experts", "domain_weights"):
        if facts.get(name):
            rows.append((name.replace("_", " "), _members(facts[name])))
    if facts.get("sequential"):
        rows.append(("sequential", "every layer was seen behind the pruned ones before it"))
    if plan.mtp == "drop":
        rows.append(("multi-token prediction", "its layers were dropped"))
    return rows + [("seed", str(facts["seed"]))] * ("seed" in facts)


def _criterion(name: Any, paper: Any) -> str:
    if not isinstance(name, str):
        return "none: all experts are kept"
    try:
        what = (get_criterion(name).score.__doc__ or "").strip().split("\n")[0].partition(".")[0]
    except UsageError:  # such as auto, or one that this version does not know
        what = ""
    number = str(paper).removeprefix("arXiv:") if paper else ""
    link = f" ([{paper}](https://arxiv.org/abs/{number}))" if str(paper).startswith("arXiv:") else ""
    return f"`{name}`{link}" + (f": {what}" if what else "")


def _healed(healing: HealRecord) -> str:
    steps = []
    if healing.refitted:
        steps.append(f"{healing.refitted} were refitted in closed form, so that layers' outputs meet the base model's")
    if healing.distilled:
        steps.append("routers were trained towards the base model's predictions")
    steps = steps or ["new values of weights were tried, and a gain did better"]
    return f"After that, {', and '.join(steps)}."


def _commands(plan: Plan, healing: HealRecord | None) -> list[str]:
    """What made the plan, and healed it."""
    told = [plan.provenance.get("command"), *([healing.command] if healing else [])]
    return list(dict.fromkeys(command for command in told if isinstance(command, str)))


def _members(value: Mapping[str, Any]) -> str:
    return "; ".join(f"{k}: {', '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in value.items())


def _profile(profile: Profile) -> dict[str, Any]:
    from expertcut.calibrate.summary import summarise_layer

    meta = profile.meta
    sources = [
        (str(s.get("dataset") or s["name"]), str(s.get("domain", "")), s.get("tokens", 0))
        for data in meta.data
        for s in data.sources
    ]
    return {
        "tokens": sum(meta.tokens().values()), "domains": meta.tokens(), "sources": sources, "dtype": meta.dtype,
        "seq_len": sorted({data.seq_len for data in meta.data}),
        "layers": [summarise_layer(profile.layer(prefix)) for prefix in profile.prefixes],
    }  # fmt: skip


def _notes(findings: Sequence[LintFinding]) -> list[tuple[str, str, str]]:
    return [(f"{f.runtime} {f.version}", f.status, f.reason.replace("|", "\\|")) for f in findings]


def _share(part: int, whole: int) -> str:
    return f"{part / (whole or 1):.1%}"
