"""All that `python -m bench.capacity` finds. It plans only where the simulation reproduces what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from bench.throughput.figures import Result

from . import compare, limits
from .assumptions import Question
from .compare import Comparison
from .limits import Limit
from .plan import Plan, plan

CHANGES: Final[Mapping[str, Mapping[str, float]]] = {
    "orders of 5 lines": {"lines": 5},
    "a commit takes 0.2 ms: it waits for no standby": {"commit_ms": 0.2},
    "a commit takes 5 ms": {"commit_ms": 5.0},
    "cores are half as fast": {"slower": 2.0},
    "2 reads for an order: caches answer the others": {"reads": 2.0},
}
"""What else may be, one change at a time."""


class Changed(msgspec.Struct, frozen=True):
    """A plan with one assumption changed."""

    name: str
    plan: Plan


class Report(msgspec.Struct, frozen=True):
    """Without limits and plans where a prediction is beyond its bound."""

    comparison: Comparison
    violations: tuple[str, ...]
    """A sentence each."""
    limits: tuple[Limit, ...] = ()
    plans: tuple[Plan, ...] = ()
    changed: tuple[Changed, ...] = ()
    """The plan in the middle, with changes."""


def report(result: Result, questions: Sequence[Question]) -> Report:
    comparison = compare.compare(result)
    if violations := tuple(comparison.violations()):
        return Report(comparison, violations)
    message_us, middle = comparison.message_us, questions[len(questions) // 2]
    cost = limits.of_paid_orders(result, middle, message_us)
    changes = {name: msgspec.structs.replace(middle, **change) for name, change in CHANGES.items()}
    return Report(
        comparison=comparison,
        violations=(),
        limits=tuple(limits.limits(result, middle, cost)),
        plans=tuple(plan(result, question, message_us) for question in questions),
        changed=tuple(Changed(name, plan(result, question, message_us)) for name, question in changes.items()),
    )
