"""The keyed batch: every request of a batch is done once for its key.

A batch runs through these steps; each settles some of its requests, and the next gets those that are left:

1. recall    A key that was used before has its answer, or belongs to another request.
2. prepare   Refuses requests without writing anything: by rules, or by the answer of another service.
3. recall    Again for those that were refused: a request with the same key may have been done since the first recall.
4. write     One transaction, which claims the keys, does the work, and stores the answers. A request whose key another
             transaction is using waits for the end of that transaction, and is then recalled.
5. repeat    Duplicates in the batch get the answer of the first request with their key, or the refusal that the key
             belongs to that other request.

Refusals are not stored: nothing was begun, and the same key may be sent again when the reason is gone.

A service implements `recall`, `prepare` and `write` (`orders/placing.py`, `inventory/counting.py`). An operation that
takes one request uses `Keyed.check` and `bounded_by_key` by themselves.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from mercato.chassis.contract import (
    Batch,
    Context,
    IdempotencyKeyReused,
    Message,
    RequestInProgress,
    ServiceError,
)
from mercato.chassis.postgres.database import LockTimeout, UniqueViolation

from .keys import Identity, KeyedRequest, keyed

Q = TypeVar("Q", bound=KeyedRequest)
A = TypeVar("A", bound=Message)
W = TypeVar("W")


class StoredAnswer(msgspec.Struct, Generic[A], frozen=True):
    """What is stored for a key: the answer, and the fingerprint of the request that got it."""

    fingerprint: bytes
    answer: A
    field: str = ""
    """The field in which the new request differs, if known; empty if the fingerprints alone are compared."""


class KeyedAttempt(Generic[Q, A, W]):
    """One request that passes through the steps. `answer` is None until a step settles it."""

    __slots__ = ("actor", "answer", "context", "keyed", "prepared", "request")

    def __init__(self, request: Q, context: Context) -> None:
        self.request = request
        self.context = context
        self.actor = context.actor
        self.keyed = None if request.idempotency_key is None else keyed(request, context.actor)
        self.prepared: W | None = None
        """The result of `prepare`, for `write`."""
        self.answer: A | ServiceError | None = None

    @property
    def identity(self) -> Identity:
        """The identity of its key, which it must have."""
        assert self.keyed
        return self.keyed.identity

    def outcome(self) -> A | ServiceError:
        assert self.answer is not None, "a step left a request without an answer"
        return self.answer

    def replay(self, fingerprint: bytes, answer: A, field: str = "") -> None:
        """Replays the stored `answer` to the request with `fingerprint`; refuses if that, or a `field`, differs."""
        assert self.keyed
        is_same = self.keyed.fingerprint == fingerprint
        self.answer = (
            msgspec.structs.replace(answer, replayed=True)
            if is_same and not field
            else IdempotencyKeyReused(field=field)
        )

    def repeat(self, first: KeyedAttempt[Q, A, W]) -> None:
        """Answers as the first request of the batch with its key. Unsettled if that key belongs to another request."""
        assert self.keyed
        assert first.keyed
        answer = first.outcome()
        if not isinstance(answer, ServiceError):
            self.replay(first.keyed.fingerprint, answer)
        elif self.keyed.fingerprint == first.keyed.fingerprint:
            self.answer = answer.copy()
        elif not isinstance(answer, IdempotencyKeyReused):
            self.answer = IdempotencyKeyReused()  # it ran at the same time with another request


class KeyedBatch(abc.ABC, Generic[Q, A, W]):
    """An operation that does each key once. `A` has a field `replayed`."""

    async def run(self, batch: Batch[Any]) -> Sequence[A | ServiceError]:
        """The handler of the operation for a batch of `Q`: one answer or refusal for each request, in order.

        Besides the answers of the steps: `IdempotencyKeyReused` and `RequestInProgress`. Raises `LockTimeout` if one of
        several requests would be in progress: the server then runs each alone.
        """
        attempts: list[KeyedAttempt[Q, A, W]] = [  # not `KeyedAttempt[Q, A, W](...)`, which costs twice as much
            KeyedAttempt(request, context) for request, context in zip(batch, batch.contexts, strict=True)
        ]
        firsts, duplicates = _split_duplicates(attempts)
        await self._recall(firsts)
        await self.prepare(unsettled(firsts))
        await self._recall([a for a in firsts if _is_refused(a.answer)])
        await self._write(unsettled(firsts))
        for attempt, first in duplicates:
            attempt.repeat(first)
        # If the first was refused because its key belongs to another request, a duplicate may be that request.
        await self._recall(unsettled([attempt for attempt, _ in duplicates]))
        return [attempt.outcome() for attempt in attempts]

    @abc.abstractmethod
    async def recall(self, attempts: Sequence[KeyedAttempt[Q, A, W]]) -> Mapping[Identity, StoredAnswer[A]]:
        """The stored answers of these attempts, by identity; new keys are missing."""

    @abc.abstractmethod
    async def prepare(self, attempts: Sequence[KeyedAttempt[Q, A, W]]) -> None:
        """Settles the requests that it refuses, and prepares the others for `write`. May call other services."""

    @abc.abstractmethod
    async def write(self, attempts: Sequence[KeyedAttempt[Q, A, W]]) -> None:
        """Does the work in one transaction, and settles the requests whose keys it could claim; commits their answers.

        If another transaction has used a key, leaves its request unsettled, or raises `UniqueViolation` and commits
        nothing. Raises `LockTimeout` if another transaction holds a key for too long.
        """

    async def _recall(self, attempts: Sequence[KeyedAttempt[Q, A, W]]) -> None:
        with_key = [attempt for attempt in attempts if attempt.keyed]
        if not with_key:
            return
        found = await self.recall(with_key)
        for attempt in with_key:
            if old := found.get(attempt.identity):
                attempt.replay(old.fingerprint, old.answer, old.field)

    async def _write(self, attempts: Sequence[KeyedAttempt[Q, A, W]]) -> None:
        if not attempts:
            return
        taken: UniqueViolation | None = None
        try:
            await self.write(attempts)
        except UniqueViolation as error:
            taken = error
        except LockTimeout:
            if len(attempts) > 1:
                raise  # the server runs each request alone, which shows whose key is in use
            attempts[0].answer = RequestInProgress()
        if not (before := unsettled(attempts)):
            return
        await self._recall(before)
        left = unsettled(before)
        if len(left) == len(before):
            raise taken or AssertionError("a key is taken, and has no answer")
        await self._write(left)


@contextlib.contextmanager
def bounded_by_key() -> Generator[None]:
    """Raises `RequestInProgress` if another transaction uses the key of the request in this block."""
    try:
        yield
    except (LockTimeout, UniqueViolation):
        raise RequestInProgress from None


def unsettled(attempts: Iterable[KeyedAttempt[Q, A, W]]) -> list[KeyedAttempt[Q, A, W]]:
    return [a for a in attempts if a.answer is None]


def _is_refused(answer: object) -> bool:
    return isinstance(answer, ServiceError) and not isinstance(answer, IdempotencyKeyReused)


def _split_duplicates(
    attempts: Sequence[KeyedAttempt[Q, A, W]],
) -> tuple[list[KeyedAttempt[Q, A, W]], list[tuple[KeyedAttempt[Q, A, W], KeyedAttempt[Q, A, W]]]]:
    """The first request of each key, and the duplicates in the batch, each with the first one of its key."""
    firsts: list[KeyedAttempt[Q, A, W]] = []
    duplicates: list[tuple[KeyedAttempt[Q, A, W], KeyedAttempt[Q, A, W]]] = []
    by_identity: dict[Identity, KeyedAttempt[Q, A, W]] = {}
    for attempt in attempts:
        first = by_identity.setdefault(attempt.keyed.identity, attempt) if attempt.keyed else attempt
        if first is attempt:
            firsts.append(attempt)
        else:
            duplicates.append((attempt, first))
    return firsts, duplicates
