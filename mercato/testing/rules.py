"""Rules for the tables of one service, which hold at every moment: invariants of the audit, and the order of events.

A rule is a query that finds the rows which violate it.
"""

from __future__ import annotations

import re
from typing import Final

from mercato.operations.audit.invariants import SHOP
from mercato.operations.audit.tables import VIEWS

from .tables import EVENTS

_VIEWS: Final = dict(re.findall(r"CREATE VIEW audit\.(\w+) AS(.*?);", VIEWS, re.DOTALL))

EVENT_VERSIONS_RISE: Final = f"""
    SELECT id
      FROM (SELECT id, version, subject, lag(version) OVER (PARTITION BY subject, subject_id ORDER BY id) AS previous
              FROM {EVENTS}) e
     WHERE version < previous OR (version = previous AND subject <> 'product')
"""
"""A change of a product's stock may emit two events."""


def audit_rules(service: str, *names: str) -> dict[str, str]:
    """Invariants of the audit that read only the tables of `service`, by name, as SQL for its database."""
    rules: dict[str, str] = {}
    for invariant in SHOP:
        if invariant.name in names:
            needed = _views_of(invariant.sql)
            views = ", ".join(f"{view} AS ({sql})" for view, sql in _VIEWS.items() if view in needed)
            sql = f"WITH {views} {invariant.sql}" if views else invariant.sql
            rules[invariant.name] = sql.replace("audit.", "").replace(f"{service}.", "")
    assert set(rules) == set(names), "an invariant was renamed"
    return rules


def _views_of(sql: str) -> set[str]:
    """The views of the audit that a query reads, and those that they read in turn."""
    read = set(re.findall(r"\baudit\.(\w+)", sql))
    return read.union(*(_views_of(_VIEWS[view]) for view in read))
