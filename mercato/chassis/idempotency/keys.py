"""Idempotency keys: a request that comes again gets the answer of the first time, and nothing is done twice.

A service that takes keys has this table in its own database (`TABLE` in its first migration), and uses it inside the
transaction of the change itself:

    recall    before any work: the answers that are there already
    claim     first statement of the transaction: takes the keys; a simultaneous duplicate waits here until the commit
    remember  last statement: stores the answers
    release   instead of it: gives back keys whose requests were refused after all, beside others that were not

Because claim, change and answer commit together, there is no row "in progress" that a crash could leave behind: a
crash leaves nothing, and the client's retry runs as if it were the first. Answers are kept for a day; what must never
happen twice, even later, has a unique key of its own in the service's table.

Keys belong to the account that sent them (`principal`) and to one operation: others may use the same key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import msgspec

from mercato.chassis.contract import GUEST_ROLE, Actor, IdempotencyKeyReused
from mercato.chassis.postgres.database import Row, Tx

KEPT_HOURS: Final = 24
REAPED_AT_ONCE: Final = 1_000
REAP_EVERY_SECONDS: Final = 60.0

# The pattern has no {1,255}: PostgreSQL would unroll it, and matching it would cost more than writing the row.
TABLE: Final = """
    CREATE TABLE idempotency (
        principal text NOT NULL,
        operation text NOT NULL,
        key text NOT NULL,
        fingerprint bytea NOT NULL,
        answer bytea,
        expires_at timestamptz NOT NULL,
        CONSTRAINT idempotency_pkey PRIMARY KEY (principal, operation, key),
        CONSTRAINT idempotency_key_is_printable CHECK (length(key) BETWEEN 1 AND 255 AND key ~ '^[\\x21-\\x7e]+$')
    )
"""
EXPIRY_INDEX: Final = "CREATE INDEX idempotency_expires_at_idx ON idempotency (expires_at)"


Identity = tuple[str, str]
"""Of a key within an operation: whose it is, and the key."""


class Keyed(msgspec.Struct, frozen=True):
    """Whose key, which key, and for which request. Two requests with one fingerprint are the same request."""

    principal: str
    key: str
    fingerprint: bytes

    @property
    def identity(self) -> Identity:
        return self.principal, self.key

    def check(self, fingerprint: bytes | None, **fields: tuple[object, object]) -> None:
        """Raises `IdempotencyKeyReused` where the key was used for a request with another fingerprint.

        Also where one of `fields` differs, which it then names: of each, what the request has and what the key did.
        """
        for name, (asked, done) in fields.items():
            if asked != done:
                raise IdempotencyKeyReused(field=name)
        if self.fingerprint != fingerprint:
            raise IdempotencyKeyReused


class StoredRow(Row):
    principal: str
    key: str
    fingerprint: bytes
    answer: bytes


class ClaimedRow(Row):
    principal: str
    key: str


class KeyedRequest(Protocol):
    """A request that may have a key. Two requests with one fingerprint are the same request."""

    @property
    def idempotency_key(self) -> str | None: ...

    @property
    def fingerprint(self) -> bytes: ...


def keyed(request: KeyedRequest, actor: Actor) -> Keyed | None:
    """The key of a request of `actor`, where it has one."""
    key = request.idempotency_key
    return None if key is None else Keyed(principal_of(actor), key, request.fingerprint)


def principal_of(actor: Actor) -> str:
    """Whose key it is: the account's, whatever its role is by now; the role's where there is no account.

    A guest's is that of the thing whose access token the guest holds.
    """
    if actor.role == GUEST_ROLE:
        return f"{GUEST_ROLE}:{actor.id}"
    return f"user:{actor.id}" if actor.id else actor.role


async def recall(tx: Tx, operation: str, wanted: Sequence[Keyed]) -> Mapping[Identity, StoredRow]:
    """What is stored under these keys, by their identity; those that are new are missing."""
    # One look at the index for each key: a join that was planned when the table was empty would read all of it.
    rows = await tx.fetch(
        StoredRow,
        """
        SELECT i.principal, i.key, i.fingerprint, i.answer
          FROM unnest($2::text[], $3::text[]) AS w (principal, key)
         CROSS JOIN LATERAL (
            SELECT principal, key, fingerprint, answer
              FROM idempotency
             WHERE principal = w.principal AND operation = $1 AND key = w.key AND answer IS NOT NULL
             LIMIT 1
         ) i
        """,
        operation,
        [w.principal for w in wanted],
        [w.key for w in wanted],
    )
    return {(r.principal, r.key): r for r in rows}


async def claim(tx: Tx, operation: str, wanted: Sequence[Keyed]) -> set[Identity]:
    """Takes keys; gives the identities of those that are ours now. The others were taken by a duplicate that committed.

    Raises `LockTimeout` when a duplicate is not done within the time that we are willing to wait.
    """
    await tx.execute("SET LOCAL lock_timeout = '2s'")
    # In key order: two batches that share keys in different orders would wait for each other for ever.
    rows = await tx.fetch(
        ClaimedRow,
        """
        INSERT INTO idempotency (principal, operation, key, fingerprint, expires_at)
        SELECT w.principal, $1, w.key, w.fingerprint, now() + make_interval(hours => $5)
          FROM unnest($2::text[], $3::text[], $4::bytea[]) AS w (principal, key, fingerprint)
         ORDER BY w.principal, w.key
            ON CONFLICT ON CONSTRAINT idempotency_pkey DO NOTHING
        RETURNING principal, key
        """,
        operation,
        [w.principal for w in wanted],
        [w.key for w in wanted],
        [w.fingerprint for w in wanted],
        KEPT_HOURS,
    )
    return {(r.principal, r.key) for r in rows}


async def remember(tx: Tx, operation: str, done: Sequence[Keyed], answers: Sequence[bytes]) -> None:
    """Stores the answers of keys that this transaction has claimed."""
    await tx.execute(
        """
        UPDATE idempotency i
           SET answer = d.answer
          FROM unnest($2::text[], $3::text[], $4::bytea[]) AS d (principal, key, answer)
         CROSS JOIN LATERAL (
            SELECT ctid FROM idempotency WHERE principal = d.principal AND operation = $1 AND key = d.key LIMIT 1
         ) claimed
         WHERE i.ctid = claimed.ctid
        """,
        operation,
        [d.principal for d in done],
        [d.key for d in done],
        list(answers),
    )


async def release(tx: Tx, operation: str, refused: Sequence[Keyed]) -> None:
    """Gives back keys that this transaction has claimed. A duplicate that waits for one takes it after the commit."""
    await tx.execute(
        """
        DELETE FROM idempotency
         WHERE ctid IN (
            SELECT claimed.ctid
              FROM unnest($2::text[], $3::text[]) AS r (principal, key)
             CROSS JOIN LATERAL (
                SELECT ctid FROM idempotency WHERE principal = r.principal AND operation = $1 AND key = r.key LIMIT 1
             ) claimed
         )
        """,
        operation,
        [r.principal for r in refused],
        [r.key for r in refused],
    )


async def reap(tx: Tx) -> int:
    """Deletes up to `REAPED_AT_ONCE` answers that are past their day; gives how many."""
    return await tx.execute(
        """
        DELETE FROM idempotency
         WHERE ctid IN (SELECT ctid FROM idempotency WHERE expires_at < now() LIMIT $1 FOR UPDATE SKIP LOCKED)
        """,
        REAPED_AT_ONCE,
    )
