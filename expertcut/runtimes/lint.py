"""Facts about a checkpoint's routing in; per runtime, whether it loads and stays on its fast path out.

Invariant: every runtime gets at least one finding, and `fast` only if all of its rules hold.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from expertcut.model.geometry import Geometry
from expertcut.runtimes.rules import RULES, RUNTIMES, LintSubject, Rule, Status


@dataclass(frozen=True, slots=True)
class LintFinding:
    """What one runtime makes of a checkpoint, by one rule; rule `all` stands for every rule holding."""

    runtime: str
    status: Status
    rule: str
    reason: str


def lint_subject(geometry: Geometry, config: Mapping[str, Any]) -> LintSubject:
    """Gather what the rules look at from a checkpoint's geometry and raw config."""
    family, scope = geometry.family, config
    for key in family.root:
        scope = scope[key]
    quantization = config.get("quantization_config") or scope.get("quantization_config") or {}
    return LintSubject(
        family.model_type, geometry.num_experts, geometry.top_k, geometry.n_group, geometry.topk_group,
        group_best=family.group_best, grouped=bool(scope.get("n_group")),
        correction_bias=family.correction_bias is not None, quant_method=quantization.get("quant_method"),
        tied_head=bool(scope.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        expert_key=None if scope.get(family.experts[0]) is not None else family.experts[0],
    )  # fmt: skip


def broken_rules(subject: LintSubject, runtime: str) -> list[Rule]:
    """Return the rules of a runtime that the subject does not keep, in table order."""
    return [r for r in RULES if runtime in r.runtimes and r.concerns(subject) and not r.holds(subject)]


def lint(subject: LintSubject) -> list[LintFinding]:
    """Judge a checkpoint for every runtime, in the order of `RUNTIMES`: one finding per broken rule, or one `fast`."""
    findings = []
    for runtime in RUNTIMES:
        broken = broken_rules(subject, runtime)
        findings += [LintFinding(runtime, rule.status, rule.name, rule.reason.format(s=subject)) for rule in broken]
        if not broken:
            concerned = sum(runtime in rule.runtimes and rule.concerns(subject) for rule in RULES)
            findings.append(LintFinding(runtime, "fast", "all", f"{concerned} of {concerned} rules hold"))
    return findings


def fast_expert_counts(subject: LintSubject, maximum: int, runtimes: Collection[str] = ("vLLM",)) -> list[int]:
    """Return the expert counts up to `maximum`, ascending, that load and are fast in all of `runtimes`.

    Other facts, top-k and groups among them, stay as they are. A kernel that only wants a tuning run counts as fast.
    """

    def fast(experts: int) -> bool:
        candidate = replace(subject, experts=experts)
        return all(rule.tunable for runtime in runtimes for rule in broken_rules(candidate, runtime))

    return [experts for experts in range(1, maximum + 1) if fast(experts)]


def nearest_fast_counts(subject: LintSubject, maximum: int) -> tuple[int | None, int | None]:
    """Return the fast expert counts next to the subject's, from below and from above up to `maximum`; None: no such."""
    counts = fast_expert_counts(subject, maximum)
    below = [count for count in counts if count <= subject.experts]
    above = [count for count in counts if count >= subject.experts]
    return max(below, default=None), min(above, default=None)


def tp_sizes(experts: int, maximum: int = 64) -> list[int]:
    """Return the tensor-parallel sizes, powers of two up to `maximum` ranks, that a count of experts allows."""
    return [size for size in (2**i for i in range(maximum.bit_length())) if size <= min(experts, maximum)]


def ep_sizes(experts: int, redundant: int = 0, maximum: int = 64) -> list[int]:
    """Return the expert-parallel sizes up to `maximum` ranks over which the experts split equally."""
    return [size for size in range(1, maximum + 1) if (experts + redundant) % size == 0]
