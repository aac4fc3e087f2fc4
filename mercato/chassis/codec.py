"""Requests and outcomes as bytes (MessagePack): what transports carry, and what is stored under an idempotency key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import msgspec

from .contract import Actor, Context, ErrorMessage, Message, Operation, ServiceError

A = TypeVar("A", bound=Message)


class WireRequest(msgspec.Struct, frozen=True):
    """One request of a batch. `remaining_ms` shrinks at each hop."""

    body: msgspec.Raw
    actor: Actor
    remaining_ms: float
    trace_id: str
    request_id: str


class WireOutcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """An answer or an error."""

    body: msgspec.Raw | None = None
    error: ErrorMessage | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode_requests = msgspec.msgpack.Decoder(list[WireRequest]).decode
_decode_outcome = msgspec.msgpack.Decoder(WireOutcome).decode
_decode_outcomes = msgspec.msgpack.Decoder(list[WireOutcome]).decode


def encode_requests(requests: Sequence[Any], contexts: Sequence[Context], now: float) -> bytes:
    """A batch on its way. `now` is the sender's monotonic clock: the time that is left travels, not a reading."""
    return _encode(
        [
            WireRequest(msgspec.Raw(_encode(r)), c.actor, max(0.0, (c.deadline - now) * 1_000), c.trace_id, c.request_id)
            for r, c in zip(requests, contexts, strict=True)
        ]
    )


def decode_requests(operation: Operation[Any, Any], sent: bytes, now: float) -> tuple[list[Any], list[Context]]:
    """A batch that arrived, in order. `now` is the receiver's monotonic clock."""
    arrived = _decode_requests(sent)
    requests = [msgspec.msgpack.decode(r.body, type=operation.request) for r in arrived]
    contexts = [Context(r.actor, now + r.remaining_ms / 1_000, r.trace_id, r.request_id) for r in arrived]
    return requests, contexts


def encode_outcomes(outcomes: Sequence[Any]) -> bytes:
    return _encode([_wired(o) for o in outcomes])


def decode_outcomes(operation: Operation[Any, A], answered: bytes) -> list[A | ServiceError]:
    return [_unwired(operation.answer, o) for o in _decode_outcomes(answered)]


def encode_outcome(outcome: Message | ServiceError) -> bytes:
    return _encode(_wired(outcome))


def decode_outcome(answer: type[A], stored: bytes) -> A | ServiceError:
    return _unwired(answer, _decode_outcome(stored))


def _wired(outcome: Any) -> WireOutcome:
    if isinstance(outcome, ServiceError):
        return WireOutcome(error=ErrorMessage.of(outcome))
    return WireOutcome(msgspec.Raw(_encode(outcome)))


def _unwired(answer: type[A], outcome: WireOutcome) -> A | ServiceError:
    if outcome.error is not None:
        return outcome.error.to_error()
    return cast(A, msgspec.msgpack.decode(outcome.body or b"", type=answer))
