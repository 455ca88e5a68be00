"""What a healed plan says of its healing in, the figures of a report out: what was tried, and what each layer lacks."""

from __future__ import annotations

from expertcut.measure.heal_record import HealRecord, Tried
from expertcut.share.curves import APART, LOSS
from expertcut.share.figures import Figure, line_figure
from expertcut.share.svg import Axis, Mark, Series


def healing_facts(record: HealRecord) -> list[tuple[str, str]]:
    """Return what came of healing, in words."""
    return [
        ("came of it", record.told), ("refitted", record.refitted or "nothing"),
        ("routers", "distilled" if record.distilled else "the source's"), ("fitted on", f"{record.tokens:,} tokens"),
        *((f"beside the plan as it came, {name}", f"{change.shown} nats per token")
          for name, change in record.domains.items()),
    ]  # fmt: skip


def healing_figures(record: HealRecord) -> list[Figure]:
    """Return the loss of what was tried, and what is left of every layer's residual."""
    refitted = {one.layers: one for one in reversed(record.tried)}  # the first of so many layers has nothing else
    line = Series("new values", [_mark(record, refitted[layers]) for layers in sorted(refitted)])
    others = [one for one in record.tried if one not in refitted.values()]
    series = [line, *(Series(one.name, [_mark(record, one)], line=False) for one in others)]
    columns = ("tried", LOSS.label, "beside the plan as it came", "")
    whiskers = "; whiskers are 95 % intervals over sequences" if record.best.change.low is not None else ""
    caption = (
        f"Change of the loss, by how many of the first layers have new values, on {record.judged_tokens:,} tokens that "
        f"were not fitted{whiskers}: lower is better, 0 is the unchanged model. Kept: {record.kept}."
    )
    tried = line_figure("healed", "What healing wins back", caption, Axis("layers with new values", whole=True), LOSS,
                        series, table=(columns, record.rows), apart=APART)  # fmt: skip
    return [tried, _residual(record)]


def _mark(record: HealRecord, one: Tried) -> Mark:
    note = f"{one.name}, kept" if one.name == record.kept else one.name
    return Mark(one.layers, one.change.value, one.change.low, one.change.high, note)


def _residual(record: HealRecord) -> Figure:
    left = Axis("residual left", ".1%", zero=True)
    marks = [
        Mark(layer.layer, layer.left, note="unchanged" if layer.ridge is None else f"ridge {layer.ridge:g}")
        for layer in record.layers
    ]
    caption = (
        "Of the squared difference between the unchanged model's output of a layer and the plan's, the share that is "
        "left with new values there, on the text that was fitted."
    )
    return line_figure("residual", "What is left of every layer's residual", caption, Axis("layer", whole=True), left,
                       [Series("residual left", marks)],
                       table=(("layer", "ridge", "projections refitted", left.label),
                              [layer.row for layer in record.layers]))  # fmt: skip
