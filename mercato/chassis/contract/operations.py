"""Operations, and the contracts that they form."""

from __future__ import annotations

import enum
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, Generic, Protocol, Self, TypeVar, cast, overload

import msgspec

from .errors import ServiceError
from .messages import Message

DEFAULT_DEADLINE_MS: Final = 10_000


DEFAULT_SINGLE_LANES: Final = 64


EVENT_TYPE: Final = re.compile(r"[a-z]+\.[a-z_]+")


Q = TypeVar("Q", bound=Message)


A = TypeVar("A", bound=Message)


Q_contra = TypeVar("Q_contra", bound=Message, contravariant=True)


A_co = TypeVar("A_co", bound=Message, covariant=True)


class Retry(enum.StrEnum):
    """Whether a caller may send an operation again when it does not know the outcome."""

    NEVER = "never"
    SAFE = "safe"
    """It changes nothing."""
    KEYED = "keyed"
    """The service does it once for each `idempotency_key`; a request without one is never sent again."""


class Call(Protocol[Q_contra, A_co]):
    """An operation as a caller sees it."""

    def __call__(self, request: Q_contra) -> Awaitable[A_co]:
        """The answer. Raises the operation's errors, `Overloaded`, `Unavailable` or `DeadlineExceeded`."""
        ...

    def many(self, requests: Sequence[Q_contra]) -> Awaitable[Sequence[A_co | ServiceError]]:
        """The answers or errors of many requests, in order. Raises only `Overloaded`, and then none was started."""
        ...


class Operation(msgspec.Struct, Generic[Q, A], frozen=True, eq=False):
    """One operation of a contract. `size` is the largest batch that its handler takes; 1 for a single operation.

    `waits` says that an answer may take long without a failure: it waits for an order, or in the queue for
    hashing a password.
    """

    request: type[Q]
    answer: type[A]
    size: int
    lanes: int
    deadline_ms: int
    retry: Retry
    allow: frozenset[str]
    service: str = ""
    name: str = ""
    waits: bool = False

    @property
    def full_name(self) -> str:
        return f"{self.service}.{self.name}"

    def repeatable(self, request: Q) -> bool:
        """True if sending `request` again cannot do it twice. The field of a key is called `idempotency_key`."""
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
    waits: bool = False,
) -> SingleOperation[Q, A]:
    """An operation whose handler takes one request; up to `lanes` of them run at once."""
    return SingleOperation(request, answer, 1, lanes, deadline_ms, retry, allow, waits=waits)


class Contract:
    """The operations and events of one service. An instance is its client."""

    service: ClassVar[str]
    operations: ClassVar[Mapping[str, Operation[Any, Any]]]
    events: ClassVar[Mapping[str, type[Message]]] = {}
    """The types of the events that the service emits, each with its message. It emits no others."""
    views: ClassVar[tuple[type[Message], ...]] = ()
    """Messages that the gateway makes of the service's answers for clients. No service sends them."""

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
        wrong = [type_ for type_ in cls.events if not EVENT_TYPE.fullmatch(type_)]
        assert not wrong, f"{name}: these are no types of events, such as order.paid: {wrong}"

    def __init__(self, connect: Callable[[Operation[Any, Any]], Call[Any, Any]]) -> None:
        for name, operation in self.operations.items():
            self.__dict__[name] = connect(operation)
