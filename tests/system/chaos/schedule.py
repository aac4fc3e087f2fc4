"""Which faults are injected, and when: the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final, Literal

import msgspec

Kind = Literal["owner", "guard", "postmaster", "nats", "worker", "backend", "terminate", "pause"]

WEIGHTS: Final[dict[Kind, int]] = {
    "owner": 2,
    "guard": 2,
    "postmaster": 2,
    "worker": 4,
    "backend": 11,
    "terminate": 3,
    "pause": 5,
}
"""`backend` is a SIGKILL of one process of PostgreSQL, `terminate` asks PostgreSQL to end one connection or all of a
service, `pause` is SIGSTOP, and SIGCONT some seconds later. The owner and a worker
end the shop, which is started again; a server that dies is started again by the owner, three times within a minute."""

SPLIT_WEIGHTS: Final[dict[Kind, int]] = {**WEIGHTS, "owner": 1, "guard": 1, "postmaster": 1, "nats": 2, "worker": 12}
"""Of a shop whose services are processes of their own, here its workers: each is started again by itself."""

MEAN_GAP_SECONDS: Final = 1.2
"""With the restarts between them, a fault is injected every three seconds or so."""
DOUBLES: Final = 0.2
DOUBLE_WITHIN_SECONDS: Final = 0.3
EARLY: Final = 0.15
"""So many do not wait until the shop is ready again: they are injected while it starts and recovers."""
PAUSE_SECONDS: Final = (1.0, 8.0)


class ProcessFault(msgspec.Struct, frozen=True):
    """Injected `gap_s` after the one before, or after the shop is ready again when that is later."""

    number: int
    kind: Kind
    gap_s: float
    early: bool
    """Injected `gap_s` after the one before in any case."""
    choice: float
    """0 to 1: which of several processes it is."""
    pause_s: float


def schedule(seed: int, *, split: bool) -> Iterator[ProcessFault]:
    """Endless. The times are gaps, not instants: how long a restart takes depends on the machine."""
    rng = random.Random(f"{seed}:schedule")
    double = False
    number = 0
    while True:
        number += 1
        gap_s = rng.uniform(0, DOUBLE_WITHIN_SECONDS) if double else rng.expovariate(1 / MEAN_GAP_SECONDS)
        weights = SPLIT_WEIGHTS if split else WEIGHTS
        [kind] = rng.choices(list(weights), list(weights.values()))
        early, choice, pause_s = rng.random() < EARLY, rng.random(), rng.uniform(*PAUSE_SECONDS)
        yield ProcessFault(number, kind, gap_s, double or early, choice, pause_s)
        double = not double and rng.random() < DOUBLES
