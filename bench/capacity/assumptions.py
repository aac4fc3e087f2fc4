"""What the plan assumes and no benchmark of this repository has measured. Each figure says why it is what it is.

Options of `python -m bench.capacity` change those of a `Question`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

RATES: Final[Sequence[int]] = (100, 10_000, 500_000)
"""Paid orders a second at the peak."""


class Question(msgspec.Struct, frozen=True):
    """What the machines are asked for."""

    orders_per_second: float
    """Paid orders, at the peak."""
    use: float = 0.55
    """Of what a part can carry, at the peak: what is left is for bursts, and for the loss of a process or machine."""
    cores: int = 16
    """Of a machine for gateway, services and NATS."""
    lines: int = 1
    """Of an order. The benchmark's have one."""
    zones: int = 3
    """Any one of them may be lost at the peak."""
    reads: float = 20.0
    """Of the catalogue for each paid order that reach the products service: some hundred pages are looked at for one
    order, and caches in front of the shop answer most of them."""
    commit_ms: float = 1.0
    """Until a commit is on the disk of the primary and of a standby in another zone: NVMe, and a round trip."""
    slower: float = 1.0
    """How many times as long the cores take as those of the benchmark."""


SIGN_INS: Final = 0.1
"""For each paid order: most buyers have a session."""
DATABASE_CORES: Final = 32
"""Of a machine for PostgreSQL."""
NETWORK_MS: Final = 0.25
"""From a machine to another, one way, as between zones of a region."""
FLUSHES: Final = 1.5
"""That a commit takes on average where the log is always being flushed: half of the one under way, and its own."""
FULL_PAGES: Final = 2.0
"""The WAL of a long run by that of the benchmark, which has no full-page images after checkpoints."""
WAL_MB_PER_SECOND: Final = 200.0
"""That a primary writes, sends to its standbys and archives, for hours."""
PEAK_TO_MEAN: Final = 4.0
"""The peak by the mean of a day."""
SESSIONS: Final = 400
"""Of a PostgreSQL server, above which PgBouncer is put before it."""
HTTP_ORDER_KB: Final = 3.0
"""Request and answer of an order with their headers, at the edge."""
HTTP_READ_KB: Final = 6.0
"""The same of a read of the catalogue: a page of 20 products, compressed."""
MESSAGE_KB: Final = 0.6
"""Of an order in a call between processes, there and back."""
STATEMENT_KB: Final = 4.0
"""Of all statements for an order and their answers, between services and PostgreSQL."""
