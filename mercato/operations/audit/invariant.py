"""An invariant, as `invariants.py` explains."""

from __future__ import annotations

from typing import Literal

import msgspec

Group = Literal["money", "stock", "orders", "idempotency", "events", "clients"]


class Invariant(msgspec.Struct, frozen=True):
    """`title` says what must hold; `sql` gives a row for each place where it does not."""

    name: str
    group: Group
    when: Literal["always", "settled"]
    title: str
    sql: str
