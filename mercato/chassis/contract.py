"""Contracts: what a service offers, written once.

One definition of an operation gives three things: the typed client (`await users.get(GetUser(id=1))` is a `User` to a
type checker), the server's dispatch (`Server.register(Users.get, service.get)` checks the handler's type), and the
JSON schema (`schemas(Users)`).

    class Users(Contract, name="users"):
        get = batched(GetUser, User, size=512, retry=Retry.SAFE, allow={"customer", "staff"})
        register = single(Register, User, allow={"anonymous"})

Messages are frozen structs and sequences in them are tuples, so a call inside one process can hand over the object
itself and is as safe as a remote one. A contract changes additively: a new operation, a new field with a default.
"""

from __future__ import annotations

import contextvars
import enum
import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Final,
    Generic,
    Protocol,
    Self,
    TypeVar,
    cast,
    dataclass_transform,
    get_type_hints,
    overload,
)

import msgspec

MAX_ID: Final = 2**53 - 1
"""Ids stay below 2^53, so that every JSON reader, JavaScript included, can hold them exactly."""

DEFAULT_DEADLINE_MS: Final = 10_000
DEFAULT_SINGLE_LANES: Final = 64


if TYPE_CHECKING:

    @dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
    class FrozenMeta(msgspec.StructMeta):
        """Tells type checkers that what is derived from a frozen struct is frozen as well."""

else:
    FrozenMeta = msgspec.StructMeta  # a metaclass of our own would double the time that a message takes to make


class Message(msgspec.Struct, frozen=True, kw_only=True, metaclass=FrozenMeta):
    """A request, an answer or a part of one. Frozen; unknown fields are ignored when decoding (additive change)."""


class Empty(Message):
    """The request or answer of an operation that has nothing to say."""


Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)
Q_contra = TypeVar("Q_contra", bound=Message, contravariant=True)
A_co = TypeVar("A_co", bound=Message, covariant=True)


class Kind(enum.StrEnum):
    """What sort of failure an error is. Only the gateway turns kinds into HTTP status codes."""

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


class Retry(enum.StrEnum):
    """Whether a caller may send an operation again when it does not know what became of it."""

    NEVER = "never"
    SAFE = "safe"
    """It changes nothing."""
    KEYED = "keyed"
    """The service does it once for each `idempotency_key`; a request without one is never sent again."""


# ---------------------------------------------------------------------------------------------------------- errors


_errors_by_code: Final[dict[str, type[ServiceError]]] = {}


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
    """Seconds after which trying again makes sense; None where that says nothing."""

    def __init_subclass__(cls, *, code: str, kind: Kind) -> None:
        super().__init_subclass__()
        cls.code, cls.kind = code, kind
        own = inspect.get_annotations(cls)
        cls.fields = (*cls.fields, *(n for n in own if n not in ("sentence", "retry_after_s")))
        assert code not in _errors_by_code, f"two errors share the code {code}"
        _errors_by_code[code] = cls

    def __init__(self, **details: Any) -> None:
        missing = [n for n in self.fields if n not in details and not hasattr(type(self), n)]
        unknown = [n for n in details if n not in self.fields and n != "retry_after_s"]
        assert not missing, f"{type(self).__name__} misses {missing}"
        assert not unknown, f"{type(self).__name__} has no {unknown}"
        for name, value in details.items():
            setattr(self, name, value)
        super().__init__(self.sentence.format_map({n: _spoken(getattr(self, n)) for n in self.fields}))

    @property
    def details(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.fields}

    def copy(self) -> Self:
        """The same error as an object of its own: one exception raised in several tasks would mix their tracebacks."""
        twin = type(self).__new__(type(self), *self.args)
        twin.__dict__.update(self.__dict__)
        twin.__cause__ = self.__cause__
        return twin


def _spoken(value: Any) -> Any:
    return (", ".join(map(str, cast(tuple[Any, ...], value))) or "nothing") if isinstance(value, tuple) else value


class ErrorMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """A `ServiceError` on its way over a transport or in a stored answer."""

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
        """The error itself; `RemoteError` with the same code, kind and sentence where this process does not know it."""
        known = _errors_by_code.get(self.code)
        if known is None or known is RemoteError:
            return RemoteError(self)
        hints = _field_types(known)
        if any(n not in self.details and not hasattr(known, n) for n in hints):
            return RemoteError(self)
        try:
            error = known(**{n: msgspec.convert(v, hints[n]) for n, v in self.details.items() if n in hints})
        except msgspec.ValidationError:  # its details have other types where it comes from
            return RemoteError(self)
        error.retry_after_s = self.retry_after_s
        return error


@functools.cache
def _field_types(error: type[ServiceError]) -> dict[str, Any]:
    return {n: t for n, t in get_type_hints(error).items() if n in error.fields}


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
    """The bounded queue of an operation is full. Nothing was started."""

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
    """The connection was lost at the very commit, or the process ended in the middle: it may have been done."""

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
    """What the caller wanted to change is not any more what the caller had seen."""

    sentence = "This has changed since: it is at version {actual} now, not {expected}."
    expected: int
    actual: int


class IdempotencyKeyReused(ServiceError, code="idempotency_key_reused", kind=Kind.INVALID):
    sentence = "This Idempotency-Key was used before with another request; use a new key for a new request."


class RequestInProgress(ServiceError, code="request_in_progress", kind=Kind.CONFLICT):
    sentence = "A request with this Idempotency-Key is still running; try again in a moment."
    retry_after_s: int | None = 1


# ----------------------------------------------------------------------------------------------- who, until when


class Actor(msgspec.Struct, frozen=True):
    """Who asks: a role and, for people, their id (0 where there is none)."""

    role: str
    id: int = 0


ANONYMOUS: Final = Actor("anonymous")


class Context(msgspec.Struct, frozen=True, gc=False):
    """What travels with every call beside the request itself.

    `deadline` is a time of this process's monotonic clock, in seconds. Between processes the remaining time travels,
    never a clock reading.
    """

    actor: Actor
    deadline: float
    trace_id: str
    request_id: str


current: Final[contextvars.ContextVar[Context]] = contextvars.ContextVar("current_call")
"""The call that is being served here. What is called from it inherits its deadline and its trace."""


class Batch(tuple[Q, ...]):
    """The requests of one dispatch, in order, and `contexts` in the same order."""

    contexts: tuple[Context, ...]

    @classmethod
    def of(cls, requests: Sequence[Q], contexts: Sequence[Context]) -> Self:
        batch = cls(requests)
        batch.contexts = tuple(contexts)
        return batch

    @property
    def actors(self) -> tuple[Actor, ...]:
        return tuple(context.actor for context in self.contexts)


# ------------------------------------------------------------------------------------------- operations, contracts


class Call(Protocol[Q_contra, A_co]):
    """An operation as a caller sees it."""

    def __call__(self, request: Q_contra) -> Awaitable[A_co]:
        """The answer. Raises the operation's errors, `Overloaded`, `Unavailable` or `DeadlineExceeded`."""
        ...

    def many(self, requests: Sequence[Q_contra]) -> Awaitable[Sequence[A_co | ServiceError]]:
        """The answers or errors of many requests, in order. Raises only `Overloaded`, and then none was started."""
        ...


class Operation(msgspec.Struct, Generic[Q, A], frozen=True, eq=False):
    """One operation of a contract. `size` is the largest batch that its handler takes; 1 for a single operation."""

    request: type[Q]
    answer: type[A]
    size: int
    lanes: int
    deadline_ms: int
    retry: Retry
    allow: frozenset[str]
    service: str = ""
    name: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.service}.{self.name}"

    def repeatable(self, request: Q) -> bool:
        """True where sending `request` again cannot do it twice. The field of a key is called `idempotency_key`."""
        if self.retry is Retry.KEYED:
            return getattr(request, "idempotency_key", None) is not None
        return self.retry is Retry.SAFE

    @overload
    def __get__(self, instance: None, owner: type[Contract]) -> Self: ...
    @overload
    def __get__(self, instance: Contract, owner: type[Contract]) -> Call[Q, A]: ...
    @overload
    def __get__(self, instance: object, owner: type[object]) -> Self: ...
    def __get__(self, instance: object, owner: type[object]) -> Self | Call[Q, A]:
        # Only reached on the class: an instance has the call itself in its __dict__.
        assert instance is None, "a client was made without connecting its operations"
        return self


class BatchOperation(Operation[Q, A], frozen=True, eq=False):
    """Its handler takes `Batch[Q]` and gives a sequence of `A | ServiceError` of the same length, in the same order."""


class SingleOperation(Operation[Q, A], frozen=True, eq=False):
    """Its handler takes one `Q`, and gives an `A` or raises."""


def batched(
    request: type[Q],
    answer: type[A],
    *,
    allow: frozenset[str],
    size: int = 512,
    lanes: int = 2,
    deadline_ms: int = DEFAULT_DEADLINE_MS,
    retry: Retry = Retry.NEVER,
) -> BatchOperation[Q, A]:
    """An operation whose handler takes a batch. `lanes` batches of up to `size` requests are in flight at once."""
    return BatchOperation(request, answer, size, lanes, deadline_ms, retry, allow)


def single(
    request: type[Q],
    answer: type[A],
    *,
    allow: frozenset[str],
    lanes: int = DEFAULT_SINGLE_LANES,
    deadline_ms: int = DEFAULT_DEADLINE_MS,
    retry: Retry = Retry.NEVER,
) -> SingleOperation[Q, A]:
    """An operation whose handler takes one request; up to `lanes` of them run at once."""
    return SingleOperation(request, answer, 1, lanes, deadline_ms, retry, allow)


class Contract:
    """The operations of one service. An instance is its client."""

    service: ClassVar[str]
    operations: ClassVar[Mapping[str, Operation[Any, Any]]]

    def __init_subclass__(cls, *, name: str) -> None:
        super().__init_subclass__()
        cls.service = name
        named: dict[str, Operation[Any, Any]] = {}
        for attribute, value in list(vars(cls).items()):
            if isinstance(value, Operation):
                operation = cast(Operation[Any, Any], value)
                named[attribute] = msgspec.structs.replace(operation, service=name, name=attribute)
                setattr(cls, attribute, named[attribute])
        cls.operations = named

    def __init__(self, connect: Callable[[Operation[Any, Any]], Call[Any, Any]]) -> None:
        for name, operation in self.operations.items():
            self.__dict__[name] = connect(operation)


def schemas(contract: type[Contract]) -> dict[str, Any]:
    """The JSON schemas of a contract: per operation its request and answer, its errors by code, the shared components.

    The errors of a service are those whose code begins with its name.
    """
    errors = {c: e for c, e in sorted(_errors_by_code.items()) if c.startswith(f"{contract.service}.")}
    messages = [t for o in contract.operations.values() for t in (o.request, o.answer)]
    details = [msgspec.defstruct(e.__name__, list(_field_types(e).items())) for e in errors.values()]
    references, components = msgspec.json.schema_components((*messages, *details), ref_template="#/components/{name}")
    parts = iter(references)
    operations = {
        name: {
            "request": next(parts),
            "answer": next(parts),
            "batch": operation.size,
            "deadline_ms": operation.deadline_ms,
            "retry": operation.retry.value,
            "allow": sorted(operation.allow),
        }
        for name, operation in contract.operations.items()
    }
    described = {
        "service": contract.service,
        "operations": operations,
        "errors": {code: {"kind": error.kind.value, "details": next(parts)} for code, error in errors.items()},
        "components": components,
    }
    return msgspec.json.decode(msgspec.json.encode(described))  # a default that is a tuple is a list in JSON
