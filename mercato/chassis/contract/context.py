"""The context of a call: its caller, its deadline, and what the handler has done so far."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Generator, Sequence
from typing import Final, Self, TypeVar

import msgspec

from .messages import Message

Q = TypeVar("Q", bound=Message)


class Actor(msgspec.Struct, frozen=True):
    """The caller: a role and, for people, their id (else 0)."""

    role: str
    id: int = 0


ANONYMOUS_ACTOR: Final = Actor("anonymous")


GUEST_ROLE: Final = "guest"
"""The role of a caller without an account who holds the access token of one object, whose id is the caller's."""


class Context(msgspec.Struct, frozen=True, gc=False):
    """What is passed with every call besides the request.

    `deadline` is a time of this process's monotonic clock, in seconds. Transports send the remaining time to another
    process, never a clock reading.
    """

    actor: Actor
    deadline: float
    trace_id: str
    request_id: str


current: Final[contextvars.ContextVar[Context]] = contextvars.ContextVar("current_call")
"""The call that is being served here. Calls that its handler makes inherit its deadline and its trace."""


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


class HandlerRun:
    """Whether a handler may be run again: what it has done so far."""

    __slots__ = ("committed", "open_transactions")

    def __init__(self) -> None:
        self.open_transactions = 0
        self.committed = False
        """True once a commit has succeeded, or its outcome is unknown; or once another service was asked for something
        that it must not be asked for twice."""

    @property
    def in_transaction(self) -> bool:
        return self.open_transactions > 0


handler_run: Final[contextvars.ContextVar[HandlerRun | None]] = contextvars.ContextVar("handler_run", default=None)
