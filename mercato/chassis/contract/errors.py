"""Errors that callers expect: each has a code, a kind, a sentence and typed details."""

from __future__ import annotations

import enum
import functools
import inspect
from typing import Any, ClassVar, Final, Self, cast, get_type_hints

import msgspec

from .messages import Message


class Kind(enum.StrEnum):
    """The sort of failure. Only the gateway turns kinds into HTTP status codes.

    A kind that this process does not know, of a newer service, is read as `INTERNAL`.
    """

    NOT_FOUND = "not_found"
    INVALID = "invalid"
    CONFLICT = "conflict"
    REFUSED = "refused"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    TOO_MANY = "too_many"
    UNAVAILABLE = "unavailable"
    DEADLINE = "deadline"
    INTERNAL = "internal"

    @classmethod
    def _missing_(cls, value: object) -> Kind:
        return cls.INTERNAL


errors_by_code: Final[dict[str, type[ServiceError]]] = {}


class ServiceError(Exception):
    """An expected refusal, known to the caller by its `code`. It crosses every transport unchanged.

    A subclass declares `code`, `kind` and a `sentence`, and its typed details as annotated fields; the details fill
    the sentence:

        class UserNotFound(ServiceError, code="users.not_found", kind=Kind.NOT_FOUND):
            sentence = "There is no user {user_id}."
            user_id: int
    """

    code: ClassVar[str] = "internal"
    kind: ClassVar[Kind] = Kind.INTERNAL
    sentence: ClassVar[str] = "Something went wrong."
    fields: ClassVar[tuple[str, ...]] = ()
    retry_after_s: int | None = None
    """Seconds after which the caller may try again; None if the error gives no such time."""
    key_field: str = ""
    """If a known key belongs to another request: the field that differs. It is not sent to the caller; the service
    counts and logs it."""

    def __init_subclass__(cls, *, code: str = "", kind: Kind = Kind.INTERNAL, is_base: bool = False) -> None:
        super().__init_subclass__()
        if is_base:
            return
        if not code:
            raise TypeError(f"{cls.__name__} has no code")
        cls.code, cls.kind = code, kind
        own = inspect.get_annotations(cls)
        cls.fields = (*cls.fields, *(n for n in own if n not in ("sentence", "retry_after_s", "key_field")))
        assert code not in errors_by_code, f"two errors share the code {code}"
        errors_by_code[code] = cls

    def __init__(self, **details: Any) -> None:
        missing = [n for n in self.fields if n not in details and not hasattr(type(self), n)]
        unknown = [n for n in details if n not in self.fields and n != "retry_after_s"]
        assert not missing, f"{type(self).__name__} misses {missing}"
        assert not unknown, f"{type(self).__name__} has no {unknown}"
        for name, value in details.items():
            setattr(self, name, value)
        super().__init__(self.sentence.format_map(self.sentence_values()))

    def sentence_values(self) -> dict[str, Any]:
        """The details as they are written in the sentence."""
        return {name: _in_sentence(getattr(self, name)) for name in self.fields}

    @property
    def details(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.fields}

    def copy(self) -> Self:
        """A copy: one exception object raised in several tasks would mix their tracebacks."""
        copied = type(self).__new__(type(self), *self.args)
        copied.__dict__.update(self.__dict__)
        copied.__cause__ = self.__cause__
        return copied


def _in_sentence(value: Any) -> Any:
    return (", ".join(map(str, cast(tuple[Any, ...], value))) or "nothing") if isinstance(value, tuple) else value


class RuleBroken(AssertionError):
    """A bug: a service was about to break one of its rules, such as one about money or stock. Nothing is written.

    Raised, not asserted: `python -O` does not run assertions.
    """


class ErrorMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """A `ServiceError` as a transport sends it, or as a stored answer holds it."""

    code: str
    kind: Kind
    message: str
    details: dict[str, Any] = {}
    retry_after_s: int | None = None

    @classmethod
    def of(cls, error: ServiceError) -> ErrorMessage:
        details = cast(dict[str, Any], msgspec.to_builtins(error.details))
        return cls(error.code, error.kind, str(error), details, error.retry_after_s)

    def to_error(self) -> ServiceError:
        """The error; a `RemoteError` with the same code, kind and sentence if this process does not know the code."""
        known = errors_by_code.get(self.code)
        if known is None or known is RemoteError:
            return RemoteError(self)
        hints = field_types(known)
        if any(n not in self.details and not hasattr(known, n) for n in hints):
            return RemoteError(self)
        try:
            error = known(**{n: msgspec.convert(v, hints[n]) for n, v in self.details.items() if n in hints})
        except msgspec.ValidationError:  # its details have other types where it comes from
            return RemoteError(self)
        error.retry_after_s = self.retry_after_s
        return error


@functools.cache
def field_types(error: type[ServiceError]) -> dict[str, Any]:
    return {n: t for n, t in get_type_hints(error, include_extras=True).items() if n in error.fields}


class RemoteError(ServiceError, code="remote", kind=Kind.INTERNAL):
    """An error of a newer service whose code this process does not know. Keeps code, kind, sentence and details."""

    def __init__(self, message: ErrorMessage) -> None:
        Exception.__init__(self, message.message)
        self.code = message.code  # pyright: ignore[reportAttributeAccessIssue]  # the instance speaks for its sender
        self.kind = message.kind  # pyright: ignore[reportAttributeAccessIssue]
        self.retry_after_s = message.retry_after_s
        self._remote_details = message.details

    @property
    def details(self) -> dict[str, Any]:
        return self._remote_details


class Overloaded(ServiceError, code="overloaded", kind=Kind.UNAVAILABLE):
    """A bounded queue of an operation or of the server is full or too slow. Nothing was started."""

    sentence = "{operation} has too much to do right now; nothing was started."
    operation: str
    retry_after_s: int | None = 1


class Unavailable(ServiceError, code="unavailable", kind=Kind.UNAVAILABLE):
    """A service, or the database behind it, does not answer."""

    sentence = "{service} is not available right now."
    service: str
    retry_after_s: int | None = 1


class DeadlineExceeded(ServiceError, code="deadline_exceeded", kind=Kind.DEADLINE):
    sentence = "{operation} did not answer in time."
    operation: str


class OutcomeUnknown(ServiceError, code="outcome_unknown", kind=Kind.DEADLINE):
    """The connection was lost during the commit, or the process ended in the middle: it may have been done."""

    sentence = "Whether {operation} was done is not known: look, or send it again with the same key."
    operation: str


class Internal(ServiceError, code="internal", kind=Kind.INTERNAL):
    """A bug. The cause is in the log of the process that ran the operation, under the same trace id."""

    sentence = "{operation} failed; the cause is in the log."
    operation: str


class Forbidden(ServiceError, code="forbidden", kind=Kind.FORBIDDEN):
    sentence = "A caller with the role {role} may not call {operation}."
    operation: str
    role: str


class Unauthenticated(ServiceError, code="unauthenticated", kind=Kind.UNAUTHENTICATED):
    sentence = "{reason}"
    reason: str


class FieldError(Message):
    """One wrong field: where (`items[2].quantity`, `?limit`, `header If-Match`) and what is wrong with it."""

    field: str
    message: str


class InvalidRequest(ServiceError, code="invalid_request", kind=Kind.INVALID):
    """The request does not fit its schema, or a rule of the service; names every wrong field at once."""

    sentence = "The request is not valid."
    errors: tuple[FieldError, ...]


class StaleVersion(ServiceError, code="stale_version", kind=Kind.CONFLICT):
    """What the caller wanted to change has another version than the one that the caller has read."""

    sentence = "This has changed since: it is at version {actual} now, not {expected}."
    expected: int
    actual: int


def check_version(expected: int | None, actual: int) -> None:
    """Raises `StaleVersion` if the caller has read another version; None accepts any."""
    if expected is not None and expected != actual:
        raise StaleVersion(expected=expected, actual=actual)


class IdempotencyKeyReused(ServiceError, code="idempotency_key_reused", kind=Kind.INVALID):
    """`field`: the field in which the two requests differ; empty if only their fingerprints are known."""

    sentence = "This Idempotency-Key was used before with another {what}; use a new key for a new request."
    key_field = "request"
    field: str = ""

    def sentence_values(self) -> dict[str, Any]:
        return {**super().sentence_values(), "what": self.field or "request"}


class RequestInProgress(ServiceError, code="request_in_progress", kind=Kind.CONFLICT):
    sentence = "A request with this Idempotency-Key is still running; try again in a moment."
    retry_after_s: int | None = 1
