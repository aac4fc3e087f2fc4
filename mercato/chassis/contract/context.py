"""The context of a call: its caller, its deadline, its span, and what the handler has done so far.

A span is what was done for a call, from when to when. Its names and ids are those of OpenTelemetry.

    request ──► call ──► batch ──► transaction          one process, or several: the place of a span goes with each call
                           └─────► call ──► batch ──► ...

A trace is a tree of spans, and a batch belongs to the traces of all requests that it carries: its span is in each of
these trees, with the same id. So a span has a list of places, and its children have the same traces.

Few traces are recorded (`mercato.chassis.observability.tracing` decides). A span without a place is only kept in
memory as a child of its parent, until the request ends: if that has failed, or was slow, its spans are exported.
"""

from __future__ import annotations

import contextlib
import contextvars
import random
import time
from collections.abc import Container, Generator, Sequence
from typing import Any, Final, Protocol, Self, TypeVar

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


# ------------------------------------------------------------------------------------------------------------- spans

SAMPLED: Final = 0x01
"""The trace is exported. The flag of W3C Trace Context."""
KEPT: Final = 0x80
"""The trace is kept in the memory of each process that takes part in it. Only Mercato's processes see this flag."""

OVERTAKEN: Final = "mercato.overtaken"
"""The attribute of a span that ended with `Overtaken`."""

CHILDREN_MAX: Final = 64
"""Spans that a span without a place remembers; further ones are missing if the request fails."""

INTERNAL: Final = "internal"
SERVER: Final = "server"
CLIENT: Final = "client"
PRODUCER: Final = "producer"
CONSUMER: Final = "consumer"


class Overtaken(Exception):
    """Another process was faster: what this one did is rolled back, and nothing has failed."""


class Place(msgspec.Struct, frozen=True, gc=False):
    """A place in a recorded trace: below the span `parent_id` (0: at its root)."""

    trace_id: str
    flags: int
    parent_id: int
    about: int = 0
    """What the trace is about: the id that events name in their `about_field`. 0: not known yet."""

    @property
    def text(self) -> str:
        return f"{self.trace_id}-{self.parent_id:016x}-{self.flags:02x}-{self.about:x}"


def written(places: Sequence[Place]) -> str:
    """Places as a text: for a row of the database, an event, a message between processes (`places.read`)."""
    return ",".join([place.text for place in places])


class Recorder(Protocol):
    """Takes spans that have ended and have a place."""

    def record(self, span: Span, /) -> None: ...


class Span:
    """One piece of work. `end` ends it, once; so does the end of a `with` block.

    An exception fails it, but for `Overtaken`.
    """

    __slots__ = (
        "_id", "attributes", "children", "ended", "failure", "kind", "links", "name", "places", "recorder", "service",
        "started",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        service: str,
        kind: str,
        recorder: Recorder,
        places: Sequence[Place] = (),
        *,
        started: float | None = None,
        span_id: int = 0,
    ) -> None:
        self.name = name
        self.service = service
        self.kind = kind
        self.recorder = recorder
        self.places = places
        self.started = time.perf_counter() if started is None else started
        self.ended: float | None = None
        self.failure = ""
        """The code of the error, or its type; empty: none."""
        self.attributes: dict[str, Any] | None = None
        self.links: Sequence[tuple[str, int]] = ()
        """Trace and span of the recorded requests that a batch carries."""
        self.children: list[Span] | None = None
        self._id = span_id

    @property
    def id(self) -> int:
        """Never 0. Drawn when it is first needed, for most spans need none."""
        if not self._id:
            self._id = random.getrandbits(63) + 1
        return self._id

    def child(self, name: str, kind: str = INTERNAL, service: str = "") -> Span:
        """A span below this one, begun now, of the same service where none is named."""
        span = Span(name, service or self.service, kind, self.recorder, self.below())
        if not self.places:
            self.adopt(span)
        return span

    def below(self) -> Sequence[Place]:
        """The places of a child."""
        if not self.places:
            return ()
        own = self.id
        return [Place(place.trace_id, place.flags, own, place.about) for place in self.places]

    def adopt(self, span: Span) -> None:
        """Remembers a child, as long as this span runs."""
        if self.ended is None:
            if self.children is None:
                self.children = [span]
            elif len(self.children) < CHILDREN_MAX and self.children[-1] is not span:
                self.children.append(span)

    def note(self, attributes: dict[str, Any]) -> None:
        """Adds attributes to a recorded span."""
        if self.places:
            self.attributes = attributes if self.attributes is None else self.attributes | attributes

    def concern(self, about: int, traces: Container[str]) -> None:
        """From now on these traces, as far as the span is in them, are about this id."""
        self.places = [
            Place(p.trace_id, p.flags, p.parent_id, about) if p.trace_id in traces else p for p in self.places
        ]

    def end(self, failure: str = "") -> None:
        """Only the first end counts."""
        if self.ended is not None:
            return
        self.ended = time.perf_counter()
        if failure:
            self.failure = failure
        if self.places:
            self.recorder.record(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        failure = ""
        if isinstance(error, Overtaken):  # a failure would mark the trace of a request that went well
            self.note({OVERTAKEN: True})
        elif kind is not None:
            failure = getattr(error, "code", "") or kind.__name__
        self.end(failure)


NO_SPAN: Final[contextlib.AbstractContextManager[None]] = contextlib.nullcontext()
"""Instead of a span, in a `with` statement."""


# ------------------------------------------------------------------------------------------------------------- calls


class Context(msgspec.Struct, frozen=True, gc=False):
    """What is passed with every call besides the request.

    `deadline` is a time of this process's monotonic clock, in seconds. Transports send the remaining time to another
    process, never a clock reading.
    """

    actor: Actor
    deadline: float
    trace_id: str
    request_id: str
    span: Span | None = None
    """What is done for this call; None: it is not traced."""


current: Final[contextvars.ContextVar[Context]] = contextvars.ContextVar("current_call")
"""The call that is being served here. Calls that its handler makes inherit its deadline and its trace."""


def current_span() -> Span | None:
    """The span of the call that is being served here; None outside of one, or where it is not traced."""
    call = current.get(None)
    return None if call is None else call.span


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


def trace_of(context: Context) -> str:
    """Where the recorded traces of a request of the current batch go on in what it leaves behind, such as a saga."""
    asked, serving = context.span, current_span()
    if serving is None or asked is None or not asked.places:
        return ""
    traces = {place.trace_id for place in asked.places}
    return written([place for place in serving.below() if place.trace_id in traces])


def concern(context: Context, about: int) -> None:
    """From now on the traces of this request of the current batch are about `about`, such as an order."""
    asked, serving = context.span, current_span()
    if serving is not None and asked is not None and asked.places:
        serving.concern(about, {place.trace_id for place in asked.places})


SERVICE_ROLE: Final = "service"
"""The role with which a service calls another one. It may call every operation."""


@contextlib.contextmanager
def within(span: Span | None) -> Generator[None]:
    """Calls and transactions in this block are below `span`, which this ends."""
    if span is None:
        yield
        return
    call = current.get()
    token = current.set(Context(call.actor, call.deadline, call.trace_id, call.request_id, span))
    try:
        with span:
            yield
    finally:
        current.reset(token)


@contextlib.contextmanager
def acting_as(actor: Actor) -> Generator[None]:
    """Calls in this block are made by `actor`, until the same deadline."""
    call = current.get()
    token = current.set(Context(actor, call.deadline, call.trace_id, call.request_id, call.span))
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
