"""Idempotency keys: a request that is sent again gets the answer of the first time, and nothing is done twice.

A service that takes keys has this table in its own database (`TABLE` in its first migration), and uses it inside the
transaction of the change itself:

    recall    before any work: reads the stored answers
    claim     first statement of the transaction: inserts the keys; a concurrent duplicate waits here until the commit
    remember  last statement: stores the answers
    release   instead of `remember`, for single requests that were refused after the claim: deletes their keys

Because claim, change and answer commit together, there is no row "in progress" that a crash could leave behind: a
crash leaves nothing, and the client's retry runs as the first request. Answers are kept for a day; effects that must
never happen twice, even later, have a unique key in the service's own table.

A key belongs to the account that sent it (`principal`) and to one operation: other accounts may use the same key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import msgspec

from mercato.chassis.contract import GUEST_ROLE, Actor, IdempotencyKeyReused
from mercato.chassis.postgres.database import Row, Tx

KEPT_HOURS: Final = 24
PURGED_AT_ONCE: Final = 1_000
PURGE_EVERY_SECONDS: Final = 60.0

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
"""Identifies a key within an operation: its principal, and the key."""


class Keyed(msgspec.Struct, frozen=True):
    """A key with its principal and the fingerprint of its request. Equal fingerprints mean the same request."""

    principal: str
    key: str
    fingerprint: bytes

    @property
    def identity(self) -> Identity:
        return self.principal, self.key

    def check(self, fingerprint: bytes | None, **fields: tuple[object, object]) -> None:
        """Raises `IdempotencyKeyReused` if the key was used for a request with another fingerprint.

        Also if one of `fields` differs, which the error then names. Each is a pair: the value of this request, and the
        stored one.
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
    """A request that may have a key. Equal fingerprints mean the same request."""

    @property
    def idempotency_key(self) -> str | None: ...

    @property
    def fingerprint(self) -> bytes: ...


def keyed(request: KeyedRequest, actor: Actor) -> Keyed | None:
    """The key of a request of `actor`; None without a key."""
    key = request.idempotency_key
    return None if key is None else Keyed(principal_of(actor), key, request.fingerprint)


def principal_of(actor: Actor) -> str:
    """The owner of a key: the account, whatever its current role; without an account, the role.

    For a guest: the object whose access token the guest holds.
    """
    if actor.role == GUEST_ROLE:
        return f"{GUEST_ROLE}:{actor.id}"
    return f"user:{actor.id}" if actor.id else actor.role


async def recall(tx: Tx, operation: str, wanted: Sequence[Keyed]) -> Mapping[Identity, StoredRow]:
    """The stored answers of these keys, by identity; new keys are missing."""
    # One index lookup for each key: a join that was planned when the table was empty would read all of it.
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
    """Inserts keys; gives the identities of those that this transaction claimed. Duplicates have committed the others.

    Raises `LockTimeout` if a duplicate has not committed within the lock timeout.
    """
    await tx.execute("SET LOCAL lock_timeout = '2s'")
    # In key order: two batches that share keys in different orders would deadlock.
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
    """Deletes keys that this transaction has claimed. A duplicate that waits for one claims it after the commit."""
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


async def purge_expired(tx: Tx) -> int:
    """Deletes up to `PURGED_AT_ONCE` expired answers; gives how many."""
    return await tx.execute(
        """
        DELETE FROM idempotency
         WHERE ctid IN (SELECT ctid FROM idempotency WHERE expires_at < now() LIMIT $1 FOR UPDATE SKIP LOCKED)
        """,
        PURGED_AT_ONCE,
    )
