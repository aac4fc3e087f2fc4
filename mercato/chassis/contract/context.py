"""What travels with a call beside the request: who calls, until when, and what the handler has done so far."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Generator, Sequence
from typing import Final, Self, TypeVar

import msgspec

from .messages import Message

Q = TypeVar("Q", bound=Message)


class Actor(msgspec.Struct, frozen=True):
    """Who asks: a role and, for people, their id (0 where there is none)."""

    role: str
    id: int = 0


ANONYMOUS: Final = Actor("anonymous")


GUEST_ROLE: Final = "guest"
"""The role of a caller without an account who holds the access token of one thing; the id is that of the thing."""


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


SERVICE_ROLE: Final = "service"
"""The role with which a service calls another one. It may call every operation."""


@contextlib.contextmanager
def acting_as(actor: Actor) -> Generator[None]:
    """Calls in this block are made by `actor`, until the same deadline."""
    call = current.get()
    token = current.set(Context(actor, call.deadline, call.trace_id, call.request_id))
    try:
        yield
    finally:
        current.reset(token)


def as_service() -> contextlib.AbstractContextManager[None]:
    """Calls in this block are made as the service itself, not as its caller; until the same deadline."""
    return acting_as(Actor(SERVICE_ROLE))


class Attempt:
    """What a handler has done so far, as far as running it again is concerned."""

    __slots__ = ("committed", "open_transactions")

    def __init__(self) -> None:
        self.open_transactions = 0
        self.committed = False
        """True once a commit has succeeded, or its outcome is unknown; or once another service was asked for something
        that it must not be asked for twice."""

    @property
    def in_transaction(self) -> bool:
        return self.open_transactions > 0


attempt: Final[contextvars.ContextVar[Attempt | None]] = contextvars.ContextVar("attempt", default=None)
