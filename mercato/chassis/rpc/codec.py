"""Requests and outcomes as bytes (MessagePack): what transports carry, and what is stored under an idempotency key.

One request or outcome that cannot be encoded or decoded is an error of its own, and leaves its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, TypeVar

import msgspec
import structlog

from mercato.chassis.contract import (
    Actor,
    Context,
    ErrorMessage,
    FieldError,
    Internal,
    InvalidRequest,
    Message,
    Operation,
    ServiceError,
)

A = TypeVar("A", bound=Message)

log = structlog.stdlib.get_logger("mercato.codec")


LONGEST_REMAINING_MS: Final = 86_400_000.0
"""A day. A sender may be mistaken: more, or what is no number, would be a deadline that never comes."""


class WireRequest(msgspec.Struct, frozen=True):
    """One request of a batch. `remaining_ms` shrinks at each hop."""

    body: msgspec.Raw
    actor: Actor
    remaining_ms: Annotated[float, msgspec.Meta(ge=0, le=LONGEST_REMAINING_MS)]
    trace_id: str
    request_id: str


class WireOutcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """An answer or an error."""

    # Not optional: msgspec decodes a union of Raw and None as None alone.
    body: msgspec.Raw = msgspec.Raw(b"")
    error: ErrorMessage | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode_requests = msgspec.msgpack.Decoder(list[WireRequest]).decode
_decode_outcome = msgspec.msgpack.Decoder(WireOutcome).decode
_decode_outcomes = msgspec.msgpack.Decoder(list[WireOutcome]).decode


def encode_requests(requests: Sequence[Any], contexts: Sequence[Context], now: float) -> bytes:
    """A batch on its way. `now` is the sender's monotonic clock: the time that is left travels, not a reading."""
    return _encode(
        [
            WireRequest(msgspec.Raw(_encode(r)), c.actor, _remaining_ms(c, now), c.trace_id, c.request_id)
            for r, c in zip(requests, contexts, strict=True)
        ]
    )


def _remaining_ms(context: Context, now: float) -> float:
    return min(max(0.0, (context.deadline - now) * 1_000), LONGEST_REMAINING_MS)


def decode_requests(
    operation: Operation[Any, Any], sent: bytes, now: float
) -> tuple[list[Any | InvalidRequest], list[Context]]:
    """A batch that arrived, in order. `now` is the receiver's monotonic clock.

    In the place of a request that does not fit the contract stands what is wrong with it. Raises `msgspec.MsgspecError`
    or `RecursionError` where `sent` is no batch.
    """
    arrived = _decode_requests(sent)
    requests = [_decode_request(operation, r.body) for r in arrived]
    contexts = [Context(r.actor, now + r.remaining_ms / 1_000, r.trace_id, r.request_id) for r in arrived]
    return requests, contexts


def _decode_request(operation: Operation[Any, Any], body: msgspec.Raw) -> Any | InvalidRequest:
    try:
        return msgspec.msgpack.decode(body, type=operation.request)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        return InvalidRequest(errors=(FieldError(field=where.strip(".`"), message=what),))


def encode_outcomes(operation: Operation[Any, Any], outcomes: Sequence[Any]) -> bytes:
    return _encode([_wired_or_internal(operation, o) for o in outcomes])


def decode_outcomes(operation: Operation[Any, A], answered: bytes) -> list[A | ServiceError]:
    return [_unwired_or_internal(operation, o) for o in _decode_outcomes(answered)]


def encode_outcome(outcome: Message | ServiceError) -> bytes:
    return _encode(_wired(outcome))


def decode_outcome(answer: type[A], stored: bytes) -> A | ServiceError:
    return _unwired(answer, _decode_outcome(stored))


def _wired_or_internal(operation: Operation[Any, Any], outcome: Any) -> WireOutcome:
    try:
        return _wired(outcome)
    except (TypeError, ValueError, OverflowError) as error:  # what msgspec says of values that it cannot encode
        log.exception("answer_not_encodable", operation=operation.full_name, reason=repr(error))
        return _wired(Internal(operation=operation.full_name))


def _wired(outcome: Any) -> WireOutcome:
    if isinstance(outcome, ServiceError):
        return WireOutcome(error=ErrorMessage.of(outcome))
    return WireOutcome(msgspec.Raw(_encode(outcome)))


def _unwired_or_internal(operation: Operation[Any, A], outcome: WireOutcome) -> A | ServiceError:
    try:
        return _unwired(operation.answer, outcome)
    except msgspec.MsgspecError as error:
        log.exception("answer_not_decodable", operation=operation.full_name, reason=repr(error))
        return Internal(operation=operation.full_name)


def _unwired(answer: type[A], outcome: WireOutcome) -> A | ServiceError:
    if outcome.error is not None:
        return outcome.error.to_error()
    return msgspec.msgpack.decode(outcome.body, type=answer)
