"""Sagas: work of several steps over several services that is finished, whoever dies on the way.

The parts
    A saga is a row in its service's database: which step is next, and what the steps must remember (`state`, JSON).
    A step calls other services, and then saves, in one transaction with its own change, what came of it and what is
    next. Every call carries a key that is derived from the saga: running, retrying and resuming are the same code.
    A `Runner` (`runner.py`) drives the sagas of one process, many at a time: those at the same step are one batch.

Who drives
    Whoever starts a saga drives it at once, under a lease (`wake_at`), renewed while it works. A saga whose lease is
    over, because its process died or stands still, is taken over by the sweeper of whichever process comes first.
    Taking over raises the `epoch`, and every save names the epoch it was taken with: a driver that comes back from the
    dead changes nothing any more. Its save is refused, and counted (`mercato_saga_fenced_total`).

A saga is in one of these states
    running     wake_at is the end of somebody's lease
    waiting     for an event or a time: wake_at is that time, or the next try of a step that could not be finished
    parked      for an event alone, or finished: wake_at is NULL, and no sweeper looks at it

Guaranteed
    - A step runs at least once; what it saves happens once.
    - A step that fails is tried again for ever, with pauses that grow.
    - One saga that fails does not hold up those that share its batch: they are tried again, each alone.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from .db import Row, Tx

# `wake_at`: from when on anybody may take the saga over. It is the only thing that is looked for.
TABLES: Final = (
    """
    CREATE TABLE sagas (
        kind text NOT NULL,
        subject_id bigint NOT NULL,
        reference text NOT NULL,
        step text NOT NULL,
        state text NOT NULL,
        epoch integer NOT NULL DEFAULT 1,
        version integer NOT NULL DEFAULT 1,
        tries integer NOT NULL DEFAULT 0,
        wake_at timestamptz,
        created_at timestamptz NOT NULL DEFAULT now(),
        updated_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT sagas_pkey PRIMARY KEY (subject_id, kind, reference)
    ) WITH (fillfactor = 60)
    """,
    "CREATE INDEX sagas_wake_at_idx ON sagas (wake_at) WHERE wake_at IS NOT NULL",
    """
    CREATE TABLE saga_steps (
        kind text NOT NULL,
        subject_id bigint NOT NULL,
        reference text NOT NULL,
        version integer NOT NULL,
        step text NOT NULL,
        outcome text NOT NULL,
        tries integer NOT NULL,
        epoch integer NOT NULL,
        began_at timestamptz NOT NULL,
        at timestamptz NOT NULL DEFAULT clock_timestamp(),
        CONSTRAINT saga_steps_pkey PRIMARY KEY (subject_id, kind, reference, version)
    )
    """,
)

Key = tuple[int, str, str]
"""Subject, kind and reference."""


class Saga:
    """A saga in the hands of a driver. `memo` is what the driver need not read again; it is never the truth."""

    __slots__ = ("began_at", "epoch", "key", "live", "memo", "state", "step", "tries", "version")

    def __init__(
        self, key: Key, step: str, state: str, *, epoch: int = 1, version: int = 1, tries: int = 0, memo: Any = None
    ) -> None:
        self.key = key
        self.step = step
        self.state = state
        self.epoch = epoch
        self.version = version
        self.tries = tries
        """How often this step has been tried in vain."""
        self.memo = memo
        self.live = True
        """Whether its driver is to go on with it."""
        self.began_at = datetime.datetime.now(datetime.UTC)

    def advance(self, came_to: Next) -> None:
        """Moves on, once what it has come to is committed."""
        self.step, self.state, self.tries, self.live = came_to.step, came_to.state, came_to.tries, came_to.running
        self.version += 1
        self.began_at = datetime.datetime.now(datetime.UTC)

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
    """What a step has come to: what is next, and until when nobody else looks at it.

    `wake_s` None: nobody, until something happens. `running`: the same driver goes on at once.
    """

    step: str
    state: str
    outcome: str
    """For the log of steps: what happened, in a word or two."""
    running: bool = False
    wake_s: float | None = None
    tries: int = 0


class SagaRow(Row):
    subject_id: int
    kind: str
    reference: str
    step: str
    state: str
    epoch: int
    version: int
    tries: int


class SavedRow(Row):
    subject_id: int
    kind: str
    reference: str
    epoch: int


class StepRow(Row):
    """One step of one saga, as the log has it."""

    kind: str
    reference: str
    step: str
    outcome: str
    tries: int
    epoch: int
    began_at: datetime.datetime
    at: datetime.datetime


class StandingRow(Row):
    running: bool


# ----------------------------------------------------------------------------------------------------------- the table


async def start(tx: Tx, sagas: Sequence[Saga], lease_seconds: float) -> None:
    """Writes sagas that the caller will drive, in the transaction of what they are about."""
    await tx.execute(
        """
        INSERT INTO sagas (subject_id, kind, reference, step, state, wake_at)
        SELECT s.subject_id, s.kind, s.reference, s.step, s.state, now() + make_interval(secs => $6)
          FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[])
               AS s (subject_id, kind, reference, step, state)
        """,
        [s.subject_id for s in sagas],
        [s.kind for s in sagas],
        [s.reference for s in sagas],
        [s.step for s in sagas],
        [s.state for s in sagas],
        lease_seconds,
    )


async def seize(tx: Tx, key: Key, lease_seconds: float) -> Saga | None:
    """Takes a saga from whoever drives it, for the rest of this transaction and, after a save, for good.

    From here on, a save of the one who had it is refused. None where there is no such saga.
    """
    row = await tx.fetch_one(
        SagaRow,
        """
        UPDATE sagas
           SET epoch = epoch + 1, wake_at = now() + make_interval(secs => $4)
         WHERE subject_id = $1 AND kind = $2 AND reference = $3
        RETURNING subject_id, kind, reference, step, state, epoch, version, tries
        """,
        *key,
        lease_seconds,
    )
    return None if row is None else _saga(row)


async def lock(tx: Tx, key: Key) -> Saga | None:
    """A saga as it stands, for the rest of this transaction: its driver saves before or after, not meanwhile."""
    row = await tx.fetch_one(
        SagaRow,
        """
        SELECT subject_id, kind, reference, step, state, epoch, version, tries
          FROM sagas
         WHERE subject_id = $1 AND kind = $2 AND reference = $3
           FOR NO KEY UPDATE
        """,
        *key,
    )
    return None if row is None else _saga(row)


async def find(tx: Tx, key: Key) -> Saga | None:
    """A saga as it stands, whoever drives it."""
    row = await tx.fetch_one(
        SagaRow,
        """
        SELECT subject_id, kind, reference, step, state, epoch, version, tries
          FROM sagas
         WHERE subject_id = $1 AND kind = $2 AND reference = $3
        """,
        *key,
    )
    return None if row is None else _saga(row)


async def is_running(tx: Tx, key: Key, resting: Sequence[str]) -> bool:
    """Whether a saga is on its way somewhere: not finished, and at none of the steps where it `rests`."""
    row = await tx.fetch_one(
        StandingRow,
        """
        SELECT wake_at IS NOT NULL AND step <> ALL ($4::text[]) AS running
          FROM sagas
         WHERE subject_id = $1 AND kind = $2 AND reference = $3
        """,
        *key,
        resting,
    )
    return row is not None and row.running


async def save(tx: Tx, saved: Sequence[tuple[Saga, Next]], lease_seconds: float) -> set[tuple[Key, int]]:
    """Writes what steps have come to; gives key and epoch of those that were written.

    The others have been taken over meanwhile (`epoch`), or were saved by a commit whose answer was lost (`version`):
    their change must not be made. So this is the first statement of the transaction, and the caller changes only what
    it has given back. Rows are locked in the order of their keys, or two
    batches that share sagas would wait for each other for ever.
    """
    rows = await tx.fetch(
        SavedRow,
        """
        WITH locked AS MATERIALIZED (
            SELECT w.*
              FROM unnest($1::bigint[], $2::text[], $3::text[], $4::integer[], $5::text[], $6::text[], $7::text[],
                          $8::boolean[], $9::float8[], $10::integer[], $11::timestamptz[], $12::text[], $13::integer[],
                          $14::integer[])
                   AS w (subject_id, kind, reference, epoch, step, state, outcome, running, wake_s, tries, began_at,
                         was_step, had_tries, version)
              JOIN sagas s USING (subject_id, kind, reference)
             WHERE s.epoch = w.epoch AND s.version = w.version
             ORDER BY s.subject_id, s.kind, s.reference
               FOR NO KEY UPDATE OF s
        ), saved AS (
            UPDATE sagas s
               SET step = w.step,
                   state = w.state,
                   tries = w.tries,
                   version = s.version + 1,
                   updated_at = clock_timestamp(),
                   -- A lease that has most of its time left stays as it is: the index need not be changed.
                   wake_at = CASE
                       WHEN NOT w.running THEN now() + make_interval(secs => w.wake_s)
                       WHEN s.wake_at > now() + make_interval(secs => $15 / 2) THEN s.wake_at
                       ELSE now() + make_interval(secs => $15)
                   END
              FROM locked w
             WHERE s.subject_id = w.subject_id AND s.kind = w.kind AND s.reference = w.reference
               AND s.epoch = w.epoch AND s.version = w.version
            RETURNING s.subject_id, s.kind, s.reference, s.version, s.epoch,
                      w.was_step, w.outcome, w.had_tries, w.began_at
        ), noted AS (
            INSERT INTO saga_steps (subject_id, kind, reference, version, step, outcome, tries, epoch, began_at)
            SELECT subject_id, kind, reference, version, was_step, outcome, had_tries + 1, epoch, began_at FROM saved
        )
        SELECT subject_id, kind, reference, epoch FROM saved
        """,
        [s.subject_id for s, _ in saved],
        [s.kind for s, _ in saved],
        [s.reference for s, _ in saved],
        [s.epoch for s, _ in saved],
        [n.step for _, n in saved],
        [n.state for _, n in saved],
        [n.outcome for _, n in saved],
        [n.running for _, n in saved],
        [n.wake_s for _, n in saved],
        [n.tries for _, n in saved],
        [s.began_at for s, _ in saved],
        [s.step for s, _ in saved],
        [s.tries for s, _ in saved],
        [s.version for s, _ in saved],
        lease_seconds,
    )
    return {((row.subject_id, row.kind, row.reference), row.epoch) for row in rows}


async def take_over(tx: Tx, limit: int, lease_seconds: float) -> list[Saga]:
    """Up to `limit` sagas whose time has come, oldest first, with a new epoch and our lease."""
    rows = await tx.fetch(
        SagaRow,
        """
        WITH due AS MATERIALIZED (
            SELECT subject_id, kind, reference
              FROM sagas
             WHERE wake_at <= now()
             ORDER BY wake_at
             LIMIT $1
               FOR NO KEY UPDATE SKIP LOCKED
        )
        UPDATE sagas s
           SET epoch = s.epoch + 1, wake_at = now() + make_interval(secs => $2)
          FROM due
         WHERE s.subject_id = due.subject_id AND s.kind = due.kind AND s.reference = due.reference
        RETURNING s.subject_id, s.kind, s.reference, s.step, s.state, s.epoch, s.version, s.tries
        """,
        limit,
        lease_seconds,
    )
    return [_saga(row) for row in rows]


async def renew(tx: Tx, sagas: Sequence[Saga], lease_seconds: float) -> None:
    """Prolongs the leases of sagas that this process is still busy with; not of those that were taken over.

    Nor of those that were saved since the caller looked (`version`): `wake_at` may be what they wait for.
    """
    await tx.execute(
        """
        UPDATE sagas s
           SET wake_at = now() + make_interval(secs => $6)
          FROM (
            SELECT s.subject_id, s.kind, s.reference
              FROM unnest($1::bigint[], $2::text[], $3::text[], $4::integer[], $5::integer[])
                   AS w (subject_id, kind, reference, epoch, version)
              JOIN sagas s USING (subject_id, kind, reference)
             WHERE s.epoch = w.epoch AND s.version = w.version AND s.wake_at IS NOT NULL
             ORDER BY s.subject_id, s.kind, s.reference
               FOR NO KEY UPDATE OF s SKIP LOCKED
          ) held
         WHERE s.subject_id = held.subject_id AND s.kind = held.kind AND s.reference = held.reference
        """,
        [s.subject_id for s in sagas],
        [s.kind for s in sagas],
        [s.reference for s in sagas],
        [s.epoch for s in sagas],
        [s.version for s in sagas],
        lease_seconds,
    )


async def steps(tx: Tx, subject_id: int) -> list[StepRow]:
    """The log of all sagas of a subject, in order."""
    return await tx.fetch(
        StepRow,
        """
        SELECT kind, reference, step, outcome, tries, epoch, began_at, at
          FROM saga_steps
         WHERE subject_id = $1
         ORDER BY at, kind, reference, version
        """,
        subject_id,
    )


def _saga(row: SagaRow) -> Saga:
    key = (row.subject_id, row.kind, row.reference)
    return Saga(key, row.step, row.state, epoch=row.epoch, version=row.version, tries=row.tries)
