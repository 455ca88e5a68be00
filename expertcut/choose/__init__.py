"""Criteria, budgets, protection and the plan: which experts are kept. numpy only."""

from expertcut.choose.budget import Budget, format_size, parse_keep, parse_size, resolve_budget
from expertcut.choose.criteria import CRITERIA, Criterion, criterion, get_criterion
from expertcut.choose.make import make_plan, parse_domain_weights
from expertcut.choose.plan import LayerPlan, Plan, Source, kept_by_block, validate
from expertcut.choose.protect import parse_protect, super_experts
from expertcut.choose.select import select_experts

__all__ = [
    "CRITERIA", "Budget", "Criterion", "LayerPlan", "Plan", "Source", "criterion", "format_size", "get_criterion",
    "kept_by_block", "make_plan", "parse_domain_weights", "parse_keep", "parse_protect", "parse_size",
    "resolve_budget", "select_experts", "super_experts", "validate",
]  # fmt: skip
