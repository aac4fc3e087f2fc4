"""Sagas: work of several steps over several services that is finished, even if processes die meanwhile.

The parts
    A saga is a row in its service's database while there is work to do: the next step, and the data of the steps
    (`state`, JSON). A finished saga is deleted; data that must outlast it is in the service's own tables.
    A step calls other services, then saves its outcome and the next step in one transaction with its own change.
    Every call carries a key that is derived from stored data: running, retrying and resuming are the same code.
    A `Runner` (`runner.py`) drives the sagas of one process, many at a time: those at the same step are one batch.

Who drives
    The process that starts a saga drives it at once: the row names its `driver`. Each process has one lease for all its
    sagas (`saga_drivers`), renewed while it runs. When the lease has ended, because the process died or was stopped, a
    sweeper of any process takes its sagas over. Each take-over gives the saga a new `epoch` from a sequence, so that no
    epoch is used twice, even if a row is deleted and inserted again. Every save names the epoch of its driver:
    the save of a driver that has lost its saga is refused, and counted (`mercato_saga_fenced_total`).

A saga is in one of these states
    running     `driver` names the process that works on it
    waiting     for a time, or for an event until that time: `wake_at`
    parked      for an event alone: neither, and no sweeper takes it

Guaranteed
    - A step runs at least once; its change is saved once.
    - A step that fails is tried again until it succeeds, with growing pauses.
    - A saga that fails does not block the others of its batch: each is tried again alone.

The tables, in the first migration of a service with sagas: sequence `saga_epochs`, tables `sagas` and `saga_drivers`.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from mercato.chassis.postgres.database import Row, Tx
from mercato.chassis.postgres.leases import holds

Key = tuple[int, str, str]
"""Subject, kind and reference."""


class Saga:
    """A saga in the memory of its driver. `memo` caches what the driver has read; no decision relies on it alone."""

    __slots__ = ("epoch", "key", "live", "memo", "state", "step", "trace", "tries", "version")

    def __init__(
        self,
        key: Key,
        step: str,
        state: str,
        *,
        epoch: int = 0,
        version: int = 1,
        tries: int = 0,
        memo: Any = None,
        trace: str = "",
    ) -> None:
        self.key = key
        self.step = step
        self.state = state
        self.epoch = epoch
        """0 until it is written: the database gives it."""
        self.version = version
        self.tries = tries
        """How often this step has failed."""
        self.memo = memo
        self.trace = trace
        """Where the recorded traces of the request that moved it last go on (`trace_of`); empty: none is recorded."""
        self.live = True
        """Whether its driver is to go on with it."""

    def advance(self, outcome: Next) -> None:
        """Moves on, once the outcome of its step is committed."""
        self.step, self.state, self.tries, self.live = outcome.step, outcome.state, outcome.tries, outcome.running
        self.version += 1

    @property
    def subject_id(self) -> int:
        return self.key[0]

    @property
    def kind(self) -> str:
        return self.key[1]

    @property
    def reference(self) -> str:
        return self.key[2]


class Next(msgspec.Struct, frozen=True):
    """The outcome of a step: which step is next, and when.

    `running`: the same driver continues at once. `wake_s`: any process continues after so many seconds; `wake_at`: from
    that time of the database's clock on. None of them: the saga is parked until a request moves it. `finished`: there
    is no next step, and the row is deleted.
    """

    step: str
    state: str
    running: bool = False
    wake_s: float | None = None
    wake_at: datetime.datetime | None = None
    tries: int = 0
    finished: bool = False


class SagaRow(Row):
    subject_id: int
    kind: str
    reference: str
    step: str
    state: str
    epoch: int
    version: int
    tries: int
    trace: str | None


class KeyRow(Row):
    subject_id: int
    kind: str
    reference: str
    epoch: int


# ------------------------------------------------------------------------------------------------------------- leases


async def renew_lease(tx: Tx, driver: int, lease_seconds: float) -> None:
    """Writes or prolongs the lease of a driver; deletes leases that ended an hour ago."""
    await tx.execute(
        """
        WITH gone AS (
            DELETE FROM saga_drivers WHERE leased_until < now() - interval '1 hour' AND driver <> $1
        )
        INSERT INTO saga_drivers (driver, leased_until, renewed_at)
        VALUES ($1, clock_timestamp() + make_interval(secs => $2), clock_timestamp())
            ON CONFLICT ON CONSTRAINT saga_drivers_pkey DO UPDATE
           SET leased_until = excluded.leased_until, renewed_at = excluded.renewed_at
        """,
        driver,
        lease_seconds,
    )


EXPIRED_DRIVERS: Final = f"""
    WITH RECURSIVE drivers AS (
        (SELECT driver FROM sagas WHERE driver IS NOT NULL ORDER BY driver LIMIT 1)
        UNION ALL
        SELECT (SELECT driver FROM sagas WHERE driver > d.driver ORDER BY driver LIMIT 1)
          FROM drivers d
         WHERE d.driver IS NOT NULL
    )
    SELECT d.driver
      FROM drivers d
     WHERE d.driver IS NOT NULL
       AND NOT EXISTS (SELECT FROM saga_drivers l WHERE l.driver = d.driver AND {holds("l.leased_until", "$1")})
"""  # noqa: S608


async def expired_drivers(tx: Tx, lease_seconds: float) -> list[int]:
    """The drivers that have sagas and no valid lease."""
    # The drivers of all sagas, one index lookup for each: there are as many as processes, and far more sagas.
    return await tx.fetch_values(int, EXPIRED_DRIVERS, lease_seconds)


async def take_over(tx: Tx, driver: int, limit: int, expired: Sequence[int]) -> list[Saga]:
    """Takes over up to `limit` sagas that are due, the oldest first, or whose driver is one of `expired`: each gets a
    new epoch, and the driver `driver`. Two processes that take over at once get different sagas."""
    rows = await tx.fetch(
        SagaRow,
        """
        WITH due AS MATERIALIZED (
            SELECT subject_id, kind, reference
              FROM sagas
             WHERE wake_at <= now()
             ORDER BY wake_at
             LIMIT $2
               FOR NO KEY UPDATE SKIP LOCKED
        ), abandoned AS MATERIALIZED (
            SELECT s.subject_id, s.kind, s.reference
              FROM unnest($3::bigint[]) AS e (driver)
             CROSS JOIN LATERAL (
                SELECT subject_id, kind, reference
                  FROM sagas
                 WHERE driver = e.driver
                 LIMIT $2
                   FOR NO KEY UPDATE SKIP LOCKED
             ) s
        )
        UPDATE sagas s
           SET epoch = nextval('saga_epochs'), driver = $1, wake_at = NULL, updated_at = clock_timestamp()
          FROM (SELECT * FROM due UNION ALL SELECT * FROM abandoned LIMIT $2) taken
         WHERE s.subject_id = taken.subject_id AND s.kind = taken.kind AND s.reference = taken.reference
        RETURNING s.subject_id, s.kind, s.reference, s.step, s.state, s.epoch, s.version, s.tries, s.trace
        """,
        driver,
        limit,
        expired,
    )
    return [_saga(row) for row in rows]


async def stale(tx: Tx, driver: int, quiet_seconds: float, limit: int) -> list[tuple[Key, int]]:
    """Key and epoch of up to `limit` sagas of a driver that have not been saved for `quiet_seconds`."""
    rows = await tx.fetch(
        KeyRow,
        """
        SELECT subject_id, kind, reference, epoch
          FROM sagas
         WHERE driver = $1 AND updated_at < now() - make_interval(secs => $2)
         LIMIT $3
        """,
        driver,
        quiet_seconds,
        limit,
    )
    return [((row.subject_id, row.kind, row.reference), row.epoch) for row in rows]


async def reclaim(tx: Tx, driver: int, epochs: Sequence[int]) -> list[Saga]:
    """Gives new epochs to those sagas of a driver that still have one of these."""
    rows = await tx.fetch(
        SagaRow,
        """
        UPDATE sagas
           SET epoch = nextval('saga_epochs'), updated_at = clock_timestamp()
         WHERE driver = $1 AND epoch = ANY($2::bigint[])
        RETURNING subject_id, kind, reference, step, state, epoch, version, tries, trace
        """,
        driver,
        epochs,
    )
    return [_saga(row) for row in rows]


# -------------------------------------------------------------------------------------------------------------- sagas


async def start(tx: Tx, sagas: Sequence[Saga], driver: int) -> None:
    """Inserts new sagas that `driver` will drive, in the transaction of their subject, and sets their epochs."""
    rows = await tx.fetch(
        KeyRow,
        """
        INSERT INTO sagas (subject_id, kind, reference, step, state, trace, driver)
        SELECT s.subject_id, s.kind, s.reference, s.step, s.state, s.trace, $7
          FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
               AS s (subject_id, kind, reference, step, state, trace)
        RETURNING subject_id, kind, reference, epoch
        """,
        [s.subject_id for s in sagas],
        [s.kind for s in sagas],
        [s.reference for s in sagas],
        [s.step for s in sagas],
        [s.state for s in sagas],
        [s.trace or None for s in sagas],
        driver,
    )
    epochs = {(row.subject_id, row.kind, row.reference): row.epoch for row in rows}
    for saga in sagas:
        saga.epoch = epochs[saga.key]


async def fence(tx: Tx, key: Key, driver: int) -> Saga | None:
    """Fences off the driver of a saga, whose saves are refused from now on. None: there is no such saga."""
    row = await tx.fetch_one(
        SagaRow,
        """
        UPDATE sagas
           SET epoch = nextval('saga_epochs'), driver = $4, wake_at = NULL, updated_at = clock_timestamp()
         WHERE subject_id = $1 AND kind = $2 AND reference = $3
        RETURNING subject_id, kind, reference, step, state, epoch, version, tries, trace
        """,
        *key,
        driver,
    )
    return None if row is None else _saga(row)


async def lock(tx: Tx, key: Key) -> Saga | None:
    """Locks a saga for the rest of this transaction: its driver saves before or after it. None: there is no saga."""
    row = await tx.fetch_one(
        SagaRow,
        """
        SELECT subject_id, kind, reference, step, state, epoch, version, tries, trace
          FROM sagas
         WHERE subject_id = $1 AND kind = $2 AND reference = $3
           FOR NO KEY UPDATE
        """,
        *key,
    )
    return None if row is None else _saga(row)


async def find(tx: Tx, key: Key) -> Saga | None:
    """A saga as it is committed, whichever process drives it."""
    row = await tx.fetch_one(
        SagaRow,
        """
        SELECT subject_id, kind, reference, step, state, epoch, version, tries, trace
          FROM sagas
         WHERE subject_id = $1 AND kind = $2 AND reference = $3
        """,
        *key,
    )
    return None if row is None else _saga(row)


async def wakes_at(tx: Tx, key: Key, step: str) -> datetime.datetime | None:
    """Until when a saga waits at a step; None if it does not wait there."""
    found = await tx.fetch_values(
        datetime.datetime,
        """
        SELECT wake_at
          FROM sagas
         WHERE subject_id = $1 AND kind = $2 AND reference = $3 AND step = $4 AND driver IS NULL
           AND wake_at IS NOT NULL
        """,
        *key,
        step,
    )
    return found[0] if found else None


async def is_running(tx: Tx, key: Key, resting: Sequence[str]) -> bool:
    """Whether a saga is driven, or waits for its next try: there is one, and it is not at a step where it `rests`."""
    return bool(
        await tx.fetch_values(
            str,
            """
            SELECT step
              FROM sagas
             WHERE subject_id = $1 AND kind = $2 AND reference = $3
               AND (driver IS NOT NULL OR (wake_at IS NOT NULL AND step <> ALL ($4::text[])))
            """,
            *key,
            resting,
        )
    )


async def save(tx: Tx, saved: Sequence[tuple[Saga, Next]]) -> set[tuple[Key, int]]:
    """Writes the outcomes of steps; gives key and epoch of those that were written.

    The others have been taken over meanwhile (`epoch`), or were saved by a commit whose answer was lost (`version`):
    their change must not be made. So this is the first statement of the transaction, and the caller makes only the
    changes of sagas that it returns. Rows are locked in key order: two batches that share sagas could deadlock.
    """
    ordered = sorted(saved, key=lambda each: each[0].key)
    ended = [saga for saga, outcome in ordered if outcome.finished]
    going_on = [(saga, outcome) for saga, outcome in ordered if not outcome.finished]
    if ended and going_on:
        await _lock_all(tx, [saga.subject_id for saga, _ in ordered])
    rows = [*(await _delete(tx, ended) if ended else ()), *(await _update(tx, going_on) if going_on else ())]
    return {((row.subject_id, row.kind, row.reference), row.epoch) for row in rows}


async def _lock_all(tx: Tx, subject_ids: Sequence[int]) -> None:
    await tx.execute(
        """
        SELECT FROM sagas WHERE subject_id = ANY($1::bigint[]) ORDER BY subject_id, kind, reference FOR NO KEY UPDATE
        """,
        subject_ids,
    )


# Both statements do one index lookup for each saga (LATERAL): the table is small and often changed, so that a plain
# join may scan all of it, dead rows included, for each batch. A row that another transaction changes meanwhile
# has another ctid and another epoch or version: the guard keeps it from being written.


async def _delete(tx: Tx, ended: Sequence[Saga]) -> list[KeyRow]:
    return await tx.fetch(
        KeyRow,
        """
        DELETE FROM sagas s
         USING (
            SELECT w.epoch, w.version, k.place
              FROM unnest($1::bigint[], $2::text[], $3::text[], $4::bigint[], $5::integer[])
                   AS w (subject_id, kind, reference, epoch, version)
             CROSS JOIN LATERAL (
                SELECT ctid AS place
                  FROM sagas
                 WHERE subject_id = w.subject_id AND kind = w.kind AND reference = w.reference
                 LIMIT 1
             ) k
         ) w
         WHERE s.ctid = w.place AND s.epoch = w.epoch AND s.version = w.version
        RETURNING s.subject_id, s.kind, s.reference, s.epoch
        """,
        [s.subject_id for s in ended],
        [s.kind for s in ended],
        [s.reference for s in ended],
        [s.epoch for s in ended],
        [s.version for s in ended],
    )


async def _update(tx: Tx, going_on: Sequence[tuple[Saga, Next]]) -> list[KeyRow]:
    return await tx.fetch(
        KeyRow,
        """
        UPDATE sagas s
           SET step = w.step,
               state = w.state,
               tries = w.tries,
               version = s.version + 1,
               driver = CASE WHEN w.running THEN s.driver END,
               wake_at = CASE WHEN NOT w.running THEN coalesce(w.wake_at, now() + make_interval(secs => w.wake_s)) END,
               trace = w.trace,
               updated_at = clock_timestamp()
          FROM (
            SELECT w.*, k.place
              FROM unnest($1::bigint[], $2::text[], $3::text[], $4::bigint[], $5::integer[], $6::text[], $7::text[],
                          $8::integer[], $9::boolean[], $10::float8[], $11::timestamptz[], $12::text[])
                   AS w (subject_id, kind, reference, epoch, version, step, state, tries, running, wake_s, wake_at,
                         trace)
             CROSS JOIN LATERAL (
                SELECT ctid AS place
                  FROM sagas
                 WHERE subject_id = w.subject_id AND kind = w.kind AND reference = w.reference
                 LIMIT 1
             ) k
          ) w
         WHERE s.ctid = w.place AND s.epoch = w.epoch AND s.version = w.version
        RETURNING s.subject_id, s.kind, s.reference, s.epoch
        """,
        [s.subject_id for s, _ in going_on],
        [s.kind for s, _ in going_on],
        [s.reference for s, _ in going_on],
        [s.epoch for s, _ in going_on],
        [s.version for s, _ in going_on],
        [n.step for _, n in going_on],
        [n.state for _, n in going_on],
        [n.tries for _, n in going_on],
        [n.running for _, n in going_on],
        [n.wake_s for _, n in going_on],
        [n.wake_at for _, n in going_on],
        [s.trace or None for s, _ in going_on],
    )


def _saga(row: SagaRow) -> Saga:
    key = (row.subject_id, row.kind, row.reference)
    return Saga(key, row.step, row.state, epoch=row.epoch, version=row.version, tries=row.tries, trace=row.trace or "")
