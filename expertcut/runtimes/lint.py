"""Facts about a checkpoint's routing in; per runtime, whether it loads and stays on its fast path out.

Invariant: every runtime gets at least one finding, and `fast` only if all of its rules hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from expertcut.choose.plan import min_experts
from expertcut.model import Geometry
from expertcut.model.families import dig
from expertcut.runtimes.rules import READ, RULES, RUNTIMES, LintSubject, Rule, Status
from expertcut.runtimes.schemes import misread_layer

RANKS = 64
"""The most ranks that `fits` looks at."""
_MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
"""Those that llama.cpp reads."""


@dataclass(frozen=True, slots=True)
class LintFinding:
    """What one runtime makes of a checkpoint, by one rule; rule `all` stands for every rule holding."""

    runtime: str
    status: Status
    rule: str
    reason: str
    source: str
    """Where in the runtime's source the rule was read; empty for `all`."""
    version: str
    """The version, or month, of the runtime that was read."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What a runtime can serve fast, and how it can be split over ranks; ascending, None: there is no rule."""

    runtime: str
    fast_experts: tuple[int, ...]
    """Expert counts, up to the present one, that load and stay on the fast path."""
    tp: tuple[int, ...] | None
    """Tensor-parallel sizes, powers of two, for the present expert count."""
    ep: tuple[int, ...] | None
    """Expert-parallel sizes over which the present experts split equally."""


@dataclass(frozen=True, slots=True)
class Advice:
    """Why an expert count is off a runtime's fast path, and the nearest ones that are on it."""

    runtime: str
    reason: str
    below: int | None
    above: int | None


def lint_subject(geometry: Geometry, config: Mapping[str, Any]) -> LintSubject:
    """Gather what the rules look at from a checkpoint's geometry and raw config."""
    family = geometry.family
    scope = dig(config, family.root) or config
    quantization = config.get("quantization_config") or scope.get("quantization_config") or {}
    trunk = {block.experts for block in geometry.trunk}
    heads = scope.get("num_attention_heads")
    announced = any(edit.path[-1] in _MTP_KEYS for edit in geometry.mtp_edits(config))
    return LintSubject(
        family.model_type, geometry.num_experts, geometry.top_k, geometry.n_group, geometry.topk_group,
        group_best=min_experts(geometry) // geometry.n_group, grouped=bool(scope.get("n_group")),
        correction_bias=family.correction_bias is not None, quant_method=quantization.get("quant_method"),
        tied_head=bool(scope.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        expert_key=None if scope.get(family.experts[0]) is not None else family.experts[0],
        width=geometry.expert_width, heads=heads if isinstance(heads, int) else None,
        block=max(quantization.get("weight_block_size") or (), default=None),
        uneven=geometry.uneven,
        layers=tuple((block.experts, block.top_k) for block in geometry.trunk) if geometry.uneven else (),
        mtp_uneven=not {block.experts for block in geometry.mtp} <= trunk,
        mtp_missing=announced and not (geometry.mtp or geometry.mtp_tensors),
        misread=misread_layer(quantization, geometry),
    )  # fmt: skip


def broken_rules(subject: LintSubject, runtime: str) -> list[Rule]:
    """Return the rules of a runtime that the subject does not keep, in table order."""
    return [rule for rule in RULES if runtime in rule.runtimes and _breaking(rule, subject) is not None]


def lint(subject: LintSubject) -> list[LintFinding]:
    """Judge a checkpoint for every runtime, in the order of `RUNTIMES`: one finding per broken rule, or one `fast`."""
    findings = []
    for runtime in RUNTIMES:
        version, broken = READ[runtime], broken_rules(subject, runtime)
        findings += [
            LintFinding(runtime, rule.status, rule.name, _reason(rule, subject), rule.source, version)
            for rule in broken
        ]
        if not broken:
            concerned = sum(runtime in rule.runtimes and rule.concerns(subject) for rule in RULES)
            findings.append(LintFinding(runtime, "fast", "all", f"{concerned} of {concerned} rules hold", "", version))
    return findings


def fast_expert_counts(subject: LintSubject, maximum: int, runtime: str = "vLLM") -> list[int]:
    """Return the expert counts up to `maximum`, ascending, that load and are fast in a runtime.

    Other facts, top-k and groups among them, stay as they are. A kernel that only wants a tuning run counts as fast.
    """
    alike = replace(subject, layers=())
    return [experts for experts in range(1, maximum + 1) if not _slow(replace(alike, experts=experts), runtime)]


def advise(subject: LintSubject, maximum: int) -> list[Advice]:
    """Return, for every runtime whose fast path the subject's count leaves, the nearest counts up to `maximum` on it.

    Runtimes that no count up to `maximum` would please are left out.
    """
    advice = []
    for runtime in RUNTIMES:
        counts = fast_expert_counts(subject, maximum, runtime)
        broken = _slow(subject, runtime)
        if broken and counts:
            below = max((count for count in counts if count < subject.experts), default=None)
            above = min((count for count in counts if count > subject.experts), default=None)
            advice.append(Advice(runtime, _reason(broken[0], subject), below, above))
    return advice


def fits(subject: LintSubject) -> list[Fit]:
    """Return, per runtime, the expert counts up to the subject's that stay fast, and the sizes it can be split over."""
    tp = {size: replace(subject, tp=size) for size in (2**i for i in range(RANKS.bit_length()))}
    ep = {size: replace(subject, ep=size) for size in range(1, RANKS + 1)}
    return [
        Fit(
            runtime, tuple(fast_expert_counts(subject, subject.experts, runtime)),
            _sizes(tp, runtime, "tensor-parallel"), _sizes(ep, runtime, "expert-parallel"),
        )
        for runtime in RUNTIMES
    ]  # fmt: skip


def _breaking(rule: Rule, subject: LintSubject) -> LintSubject | None:
    """The subject, or the first of its layers by itself, that does not keep a rule."""
    layers = [replace(subject, experts=experts, top_k=top_k) for experts, top_k in dict.fromkeys(subject.layers)]
    return next((s for s in layers or [subject] if rule.concerns(s) and not rule.holds(s)), None)


def _reason(rule: Rule, subject: LintSubject) -> str:
    return rule.reason.format(s=_breaking(rule, subject))


def _sizes(split: Mapping[int, LintSubject], runtime: str, name: str) -> tuple[int, ...] | None:
    """The sizes whose subject keeps the runtime's rules of a name, None if it has no such rules."""
    rules = [rule for rule in RULES if rule.name == name and runtime in rule.runtimes]
    kept = (size for size, subject in split.items() if all(_breaking(rule, subject) is None for rule in rules))
    return tuple(kept) if rules else None


def _slow(subject: LintSubject, runtime: str) -> list[Rule]:
    """The broken rules that no tuning run mends."""
    return [rule for rule in broken_rules(subject, runtime) if not rule.tunable]
