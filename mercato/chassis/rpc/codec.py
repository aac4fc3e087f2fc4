"""Requests and outcomes as bytes (MessagePack): what transports send, and what is stored under an idempotency key.

A request or outcome that cannot be encoded or decoded becomes an error, and does not affect the others of its batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, Generic, TypeVar, cast

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
    Span,
)
from mercato.chassis.contract.constraints import explained
from mercato.chassis.contract.context import written as span_places
from mercato.chassis.contract.places import read as read_places, remote, remote_parent, traceparent

A = TypeVar("A", bound=Message)
B = TypeVar("B")

log = structlog.stdlib.get_logger("mercato.codec")

LONGEST_REMAINING_MS: Final = 86_400_000.0
"""A day. A sender may be wrong: a longer time, or NaN, would be a deadline that never passes."""

UNENCODABLE: Final = (TypeError, ValueError, OverflowError)
"""What msgspec raises about values that it cannot encode."""


class WireRequest(msgspec.Struct, Generic[B], frozen=True, omit_defaults=True):
    """One request of a batch. `remaining_ms` shrinks at each hop."""

    body: B
    actor: Actor
    remaining_ms: Annotated[float, msgspec.Meta(ge=0, le=LONGEST_REMAINING_MS)]
    trace_id: str
    request_id: str
    places: str = ""
    """Where the spans of this request go on, if its trace is recorded (`contract/places.py`). Requests of one call have
    the same: only the first of them in a batch has it."""


class WireOutcome(msgspec.Struct, Generic[B], frozen=True, omit_defaults=True):
    """An answer or an error."""

    body: B | msgspec.UnsetType = msgspec.UNSET
    error: ErrorMessage | None = None


_encode = msgspec.msgpack.Encoder().encode


@functools.cache
def _decoder(wire: type[msgspec.Struct], body: type[Any]) -> Callable[[bytes], list[Any]]:
    """The decoder of a batch with such bodies; `Raw` bodies are not checked."""
    return msgspec.msgpack.Decoder(list[cast(Any, wire)[body]]).decode


# ----------------------------------------------------------------------------------------------------------- requests


def encode_requests(requests: Sequence[Any], contexts: Sequence[Context], now: float) -> bytes:
    """Encodes a batch. `now` is the sender's monotonic clock: the remaining time is sent, not a clock reading."""
    sent = [
        WireRequest(r, c.actor, _remaining_ms(c, now), c.trace_id, c.request_id)
        for r, c in zip(requests, contexts, strict=True)
    ]
    written: Span | None = None
    for n, context in enumerate(contexts):
        span = context.span
        if span is not None and span.places and span is not written:
            sent[n] = msgspec.structs.replace(sent[n], places=span_places(span.below()))
            written = span
    return _encode(sent)


def traceparent_of(contexts: Sequence[Context]) -> str | None:
    """The header of a batch (W3C Trace Context). None: the trace of no request is recorded."""
    spans = (context.span for context in contexts if context.span is not None and context.span.places)
    return next((traceparent(span.below()[0]) for span in spans), None)


def _remaining_ms(context: Context, now: float) -> float:
    return min(max(0.0, (context.deadline - now) * 1_000), LONGEST_REMAINING_MS)


def decode_requests(
    operation: Operation[Any, Any], sent: bytes, now: float, traceparent: str = ""
) -> tuple[list[Any | InvalidRequest], list[Context]]:
    """Decodes a batch, in order. `now` is the receiver's monotonic clock.

    `traceparent` is that of the batch, which counts where its requests name no trace: the caller is no Mercato process.

    A request that does not fit the contract is replaced by an `InvalidRequest`. Raises `msgspec.MsgspecError` or
    `RecursionError` if `sent` is no batch.
    """
    try:
        arrived: list[WireRequest[Any]] = _decoder(WireRequest, operation.request)(sent)
        requests = [r.body for r in arrived]
    except msgspec.ValidationError:
        arrived = _decoder(WireRequest, msgspec.Raw)(sent)
        requests = [_decode_request(operation, r.body) for r in arrived]
    outer = remote_parent(traceparent) if traceparent and not any(r.places for r in arrived) else None
    return requests, [
        Context(
            r.actor, now + r.remaining_ms / 1_000, r.trace_id, r.request_id, _caller(r.places) if r.places else outer
        )
        for r in arrived
    ]


def _caller(places: str) -> Span | None:
    found = read_places(places)
    return remote(found) if found else None


def _decode_request(operation: Operation[Any, Any], body: msgspec.Raw) -> Any | InvalidRequest:
    try:
        return msgspec.msgpack.decode(body, type=operation.request)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        return InvalidRequest(errors=(FieldError(field=where.strip(".`"), message=explained(what)),))


# ----------------------------------------------------------------------------------------------------------- outcomes


def encode_outcomes(operation: Operation[Any, Any], outcomes: Sequence[Any]) -> bytes:
    try:
        return _encode([_wired(o) for o in outcomes])
    except UNENCODABLE:
        return _encode([_wired_or_internal(operation, o) for o in outcomes])


def decode_outcomes(operation: Operation[Any, A], answered: bytes) -> list[A | ServiceError]:
    try:
        return [_unwired(o) for o in _decoder(WireOutcome, operation.answer)(answered)]
    except msgspec.ValidationError:
        return [_unwired_or_internal(operation, o) for o in _decoder(WireOutcome, msgspec.Raw)(answered)]


def encode_outcome(outcome: Message | ServiceError) -> bytes:
    return _encode(_wired(outcome))


def decode_outcome(answer: type[A], stored: bytes) -> A | ServiceError:
    return _unwired(msgspec.msgpack.decode(stored, type=WireOutcome[answer]))


def _wired_or_internal(operation: Operation[Any, Any], outcome: Any) -> WireOutcome[Any]:
    try:
        wired = _wired(outcome)
        _encode(wired)
    except UNENCODABLE as error:
        log.exception("answer_not_encodable", operation=operation.full_name, reason=repr(error))
        return _wired(Internal(operation=operation.full_name))
    return wired


def _wired(outcome: Any) -> WireOutcome[Any]:
    if isinstance(outcome, ServiceError):
        return WireOutcome(error=ErrorMessage.of(outcome))
    return WireOutcome(outcome)


def _unwired_or_internal(operation: Operation[Any, A], outcome: WireOutcome[msgspec.Raw]) -> A | ServiceError:
    try:
        whole = cast(Any, outcome)
        if isinstance(outcome.body, msgspec.Raw):
            whole = WireOutcome(msgspec.msgpack.decode(outcome.body, type=operation.answer))
        return _unwired(whole)
    except msgspec.MsgspecError as error:
        log.exception("answer_not_decodable", operation=operation.full_name, reason=repr(error))
        return Internal(operation=operation.full_name)


def _unwired(outcome: WireOutcome[A]) -> A | ServiceError:
    if outcome.error is not None:
        return outcome.error.to_error()
    if outcome.body is msgspec.UNSET:
        raise msgspec.ValidationError("an outcome has an answer or an error")
    return outcome.body
