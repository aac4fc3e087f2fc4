"""What every transport must do, written once: the tests of each transport inherit `Conformance`."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import types
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from typing import Annotated, Any, Protocol, Union, get_args, get_origin, get_type_hints, runtime_checkable

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings, strategies as st

from mercato import topology
from mercato.chassis.contract import (
    MAX_ID,
    Actor,
    Batch,
    Context,
    Contract,
    DeadlineExceeded,
    FieldError,
    Forbidden,
    Internal,
    Kind,
    Message,
    RemoteError,
    Retry,
    ServiceError,
    Span,
    Unavailable,
    batched,
    current,
    errors,
    handler_run,
    single,
)
from mercato.chassis.observability.clock import Clock, SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.client import Connector
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.transports import Transport
from mercato.contracts.inventory import ShortLine
from mercato.testing.waiting import BOUND_SECONDS, until_true

SIZE = 16
SECRET = "the handler's own words"


class Part(Message):
    name: str
    at: datetime.datetime | None = None


class Ask(Message):
    """`do` says what the handler does with it; the rest comes back."""

    number: int = 0
    do: str = ""
    text: str = ""
    maybe: int | None = None
    parts: tuple[Part, ...] = ()
    raw: bytes = b""
    idempotency_key: str | None = None


class Said(Message):
    echo: Ask
    role: str
    actor_id: int
    trace_id: str
    request_id: str


class Refused(ServiceError, code="things.refused", kind=Kind.REFUSED):
    sentence = "Thing {number} is refused."
    number: int


class Things(Contract, name="things"):
    """One operation of each sort."""

    read = batched(Ask, Said, allow=frozenset({"customer", "staff"}), size=SIZE, retry=Retry.SAFE)
    put = batched(Ask, Said, allow=frozenset({"customer"}), size=SIZE, retry=Retry.KEYED)
    change = batched(Ask, Said, allow=frozenset({"customer"}), size=SIZE)
    look = single(Ask, Said, allow=frozenset({"customer"}), retry=Retry.SAFE)
    move = single(Ask, Said, allow=frozenset({"customer"}))


class ThingsService:
    """Does what the requests say, and notes what it was asked to do."""

    def __init__(self) -> None:
        self.batches: list[list[Ask]] = []
        self.singles: list[Ask] = []
        self.remaining: list[float] = []
        self.calls_on: Callable[[Ask], Awaitable[Said]] | None = None
        self.stored: dict[str, Said] = {}
        self.release = asyncio.Event()

    async def run(self, batch: Batch[Ask]) -> Sequence[Said | ServiceError]:
        self.batches.append(list(batch))
        now = SystemClock.monotonic()
        self.remaining += [context.deadline - now for context in batch.contexts]
        whole = {request.do for request in batch}
        if "commit" in whole:
            made = handler_run.get()
            assert made is not None
            made.committed = True
        if "poison" in whole:
            raise RuntimeError(SECRET)
        if "refuse all" in whole:
            raise Refused(number=-1)
        if "down" in whole:
            raise Unavailable(service="database")
        if "miscount" in whole:
            return [said(batch[0], batch.contexts[0])] * (len(batch) + 1)
        if "hang" in whole:
            await self.release.wait()
        return [self.one(request, context) for request, context in zip(batch, batch.contexts, strict=True)]

    def one(self, request: Ask, context: Context) -> Said | ServiceError:
        if request.do == "refuse":
            return Refused(number=request.number)
        return said(request, context)

    async def run_single(self, request: Ask) -> Said:
        self.singles.append(request)
        self.remaining.append(current.get().deadline - SystemClock.monotonic())
        if request.do == "poison":
            raise RuntimeError(SECRET)
        if request.do == "refuse":
            raise Refused(number=request.number)
        if request.do == "pass on":
            assert self.calls_on is not None
            return await self.calls_on(Ask(number=request.number))
        return said(request, current.get())


def said(request: Ask, context: Context) -> Said:
    return Said(
        echo=request,
        role=context.actor.role,
        actor_id=context.actor.id,
        trace_id=context.trace_id,
        request_id=context.request_id,
    )


def server_of(service: ThingsService, clock: Clock) -> Server:
    server = Server(Things, clock)
    for operation in (Things.read, Things.put, Things.change):
        server.register(operation, service.run)
    server.register(Things.look, service.run_single)
    server.register(Things.move, service.run_single)
    return server.complete()


@runtime_checkable
class Opening(Protocol):
    """A transport under test that serves and connects, and so must be opened and closed."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...


class Stage:
    """A service, and its client over the transport under test."""

    def __init__(self, make_transport: Callable[[Mapping[str, Server], Clock], Transport]) -> None:
        self.clock = SystemClock()
        self.telemetry = Telemetry()
        self.service = ThingsService()
        self.server = server_of(self.service, self.clock)
        self.transport = make_transport({"things": self.server}, self.clock)
        self.connector = Connector(self.clock, self.telemetry)
        self.things = self.connector.client(Things, self.transport)

    async def open(self) -> None:
        """Opens the transport, where it has something to open."""
        if isinstance(self.transport, Opening):
            await self.transport.open()

    async def close(self) -> None:
        await self.connector.close()
        if isinstance(self.transport, Opening):
            await self.transport.close()

    @contextlib.contextmanager
    def acting(
        self,
        actor: Actor,
        seconds: float = BOUND_SECONDS,
        trace_id: str = "t",
        request_id: str = "r",
        span: Span | None = None,
    ) -> Generator[None]:
        token = current.set(Context(actor, self.clock.monotonic() + seconds, trace_id, request_id, span))
        try:
            yield
        finally:
            current.reset(token)

    def send_as(
        self,
        actor: Actor,
        request: Ask,
        seconds: float = BOUND_SECONDS,
        trace_id: str = "t",
        span: Span | None = None,
    ) -> Awaitable[Said]:
        with self.acting(actor, seconds, trace_id, span=span):
            return self.things.read(request)

    def failures(self, operation: str) -> float:
        return self.telemetry.registry.get_sample_value("mercato_batches_failed_total", {"operation": operation}) or 0.0


CUSTOMER = Actor("customer", 7)
TRACES = ("4bf92f3577b34da6a3ce929d0e0e4736", "0af7651916cd43dd8448eb211c80319c")


class ChainEnd:
    """Lets `operation` of a stage call itself, as a chain of services would, until `number` is 0; there it hangs."""

    def __init__(self, stage: Stage, operation: str) -> None:
        self._stage = stage
        self._call = getattr(stage.things, operation)
        stage.service.calls_on = self._pass_on
        self.begin()

    def begin(self) -> None:
        self.reached = self.cancelled = self.work_after_the_end = 0
        self._stage.service.remaining.clear()

    async def _pass_on(self, request: Ask) -> Said:
        depth = len(self._stage.service.remaining)
        if depth < 3:
            return await self._call(Ask(number=request.number, do="pass on"))
        self.reached += 1
        try:
            await self._stage.service.release.wait()
            self.work_after_the_end += 1
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return said(request, current.get())


def all_errors() -> list[type[ServiceError]]:
    """Every error of the chassis and of every contract."""
    ours = ("mercato.chassis.", *(contract.__module__ for contract in topology.SERVICES.values()))
    found: list[type[ServiceError]] = []
    waiting = list(ServiceError.__subclasses__())
    while waiting:
        error = waiting.pop()
        waiting += error.__subclasses__()
        if error.__module__.startswith(ours) and error is not RemoteError:
            found.append(error)
    return sorted(found, key=lambda error: error.code)


@st.composite
def instances(draw: st.DrawFn, error: type[ServiceError]) -> ServiceError:
    hints = get_type_hints(error, include_extras=True)
    made = error(**{name: draw(values(hints[name])) for name in error.fields})
    made.retry_after_s = draw(st.none() | st.integers(0, 3_600))
    return made


def values(hint: Any) -> st.SearchStrategy[Any]:
    if hint is int:
        return st.integers(-MAX_ID, MAX_ID)
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        return st.one_of([values(option) for option in get_args(hint)])
    if get_origin(hint) is Annotated:  # an open enumeration: also with a value that is not known here
        return st.from_regex(r"\A[a-z][a-z_]{0,63}\Z")
    if get_args(hint) == (int, ...):
        return st.lists(values(int), max_size=5).map(tuple)
    return st.from_type(hint)


st.register_type_strategy(FieldError, st.builds(FieldError, field=st.text(), message=st.text()))
st.register_type_strategy(
    ShortLine, st.builds(ShortLine, product_id=values(int), requested=values(int), available=values(int))
)


class Conformance:
    """Inherit, and say how the transport is made."""

    def transport(self, servers: Mapping[str, Server], clock: Clock) -> Transport:
        raise NotImplementedError

    @pytest_asyncio.fixture
    async def stage(self) -> AsyncGenerator[Stage]:
        made = Stage(self.transport)
        await made.open()
        yield made
        made.service.release.set()
        await made.close()

    # ------------------------------------------------------------------------------------------------- answers

    @pytest.mark.parametrize("count", [1, 2, SIZE, SIZE + 1, 5 * SIZE])
    async def test_answers_come_in_the_order_of_the_requests(self, stage: Stage, count: int):
        with stage.acting(CUSTOMER):
            answers = await stage.things.change.many([Ask(number=n) for n in range(count)])
            one_by_one = await asyncio.gather(*(stage.things.change(Ask(number=n)) for n in range(count)))
        expected = list(range(count))
        assert [answer.echo.number for answer in answers if isinstance(answer, Said)] == expected
        assert [answer.echo.number for answer in one_by_one] == expected
        assert max(map(len, stage.service.batches)) <= SIZE

    async def test_a_full_batch_arrives_as_one(self, stage: Stage):
        with stage.acting(CUSTOMER):
            await stage.things.change.many([Ask(number=n) for n in range(SIZE)])
        assert [len(batch) for batch in stage.service.batches] == [SIZE]

    @pytest.mark.parametrize(
        "request_",
        [
            Ask(text="Größe 漢字 🛒 \u0000 \u202e"),
            Ask(maybe=None),
            Ask(maybe=0),
            Ask(number=MAX_ID),
            Ask(number=-MAX_ID),
            Ask(raw=bytes(range(256))),
            Ask(
                parts=(
                    Part(name=""),
                    Part(name="b", at=datetime.datetime(2024, 2, 29, 23, 59, 59, 999_999, datetime.UTC)),
                )
            ),
            Ask(text="x" * 100_000),
        ],
        ids=["unicode", "none", "zero", "largest", "smallest", "bytes", "tuple of parts", "long"],
    )
    async def test_messages_arrive_as_they_were_sent(self, stage: Stage, request_: Ask):
        with stage.acting(CUSTOMER):
            in_batch, alone = await asyncio.gather(stage.things.change(request_), stage.things.move(request_))
        for answer in (in_batch, alone):
            assert answer.echo == request_
            assert type(answer.echo.parts) is tuple
        assert stage.service.singles == [request_]

    # -------------------------------------------------------------------------------------------------- errors

    @pytest.mark.parametrize("error", all_errors(), ids=lambda error: error.code)
    def test_every_error_of_every_contract_arrives_unchanged(self, error: type[ServiceError]):
        with asyncio.Runner() as runner:
            stage = Stage(self.transport)
            runner.run(stage.open())

            @settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
            @given(instances(error))
            def body(sent: ServiceError) -> None:
                runner.run(self.check_error(stage, sent))

            body()
            runner.run(stage.close())

    async def check_error(self, stage: Stage, sent: ServiceError) -> None:
        stage.service.one = lambda request, context: sent
        with stage.acting(CUSTOMER):
            (received,) = await stage.things.change.many([Ask()])
        assert isinstance(received, ServiceError)
        assert type(received) is type(sent)
        assert (received.code, received.kind, str(received)) == (sent.code, sent.kind, str(sent))
        assert received.details == sent.details
        assert [type(v) for v in received.details.values()] == [type(v) for v in sent.details.values()]
        assert received.retry_after_s == sent.retry_after_s

    async def test_each_request_has_its_own_error(self, stage: Stage):
        asks = [Ask(number=n, do="refuse" if n % 2 else "") for n in range(6)]
        with stage.acting(CUSTOMER):
            answers = await stage.things.change.many(asks)
            with pytest.raises(Refused, match="Thing 9 is refused"):
                await stage.things.move(Ask(number=9, do="refuse"))
        assert [a.number if isinstance(a, Refused) else "done" for a in answers] == ["done", 1, "done", 3, "done", 5]

    async def test_one_poisoned_request_fails_alone_and_its_text_stays_inside(self, stage: Stage):
        asks = [Ask(number=n, do="poison" if n == 2 else "") for n in range(4)]
        with stage.acting(CUSTOMER):
            answers = await stage.things.change.many(asks)
            with pytest.raises(Internal) as alone:
                await stage.things.move(Ask(do="poison"))
        assert [isinstance(answer, Internal) for answer in answers] == [False, False, True, False]
        assert [len(batch) for batch in stage.service.batches] == [4, 1, 1, 1, 1]
        for error in (answers[2], alone.value):
            assert SECRET not in f"{error!s} {error!r} {getattr(error, 'details', None)}"

    async def test_a_refusal_raised_for_a_whole_batch_is_sorted_out_one_by_one(self, stage: Stage):
        asks = [Ask(number=n, do="refuse all" if n == 0 else "") for n in range(3)]
        with stage.acting(CUSTOMER):
            answers = await stage.things.change.many(asks)
        assert [isinstance(answer, Refused) for answer in answers] == [True, False, False]

    @pytest.mark.parametrize("failure", ["poison", "refuse all", "miscount"])
    async def test_nothing_is_run_again_after_a_commit(self, stage: Stage, failure: str):
        with stage.acting(CUSTOMER):
            answers = await stage.things.change.many([Ask(do="commit"), Ask(do=failure), Ask()])
        # Whose failure it was is not known: a refusal of one must not be sent to the others.
        assert [type(answer) for answer in answers] == [Internal] * 3
        assert len(stage.service.batches) == 1

    async def test_nothing_is_run_again_when_something_is_down(self, stage: Stage):
        with stage.acting(CUSTOMER):
            answers = await stage.things.change.many([Ask(do="down"), Ask()])
        assert [type(answer) for answer in answers] == [Unavailable] * 2
        assert len(stage.service.batches) == 1

    async def test_a_wrong_number_of_answers_fails_every_request(self, stage: Stage):
        with stage.acting(CUSTOMER):
            answers = await stage.things.change.many([Ask(number=1, do="miscount"), Ask(number=2)])
        assert [type(answer) for answer in answers] == [Internal, Said]

    async def test_an_unknown_error_keeps_what_it_says(self, stage: Stage):
        """A newer service refuses with a code that this process does not know."""

        class Newer(ServiceError, code="things.newer", kind=Kind.CONFLICT):
            sentence = "New: {what}."
            what: str

        stage.service.one = lambda request, context: Newer(what="rules")
        try:
            del errors.errors_by_code["things.newer"]
            with stage.acting(CUSTOMER):
                (received,) = await stage.things.change.many([Ask()])
        finally:
            errors.errors_by_code.pop("things.newer", None)
        assert isinstance(received, ServiceError)
        assert (received.code, received.kind, str(received), received.details) == (
            "things.newer", Kind.CONFLICT, "New: rules.", {"what": "rules"},
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ who, until when

    async def test_actor_and_trace_travel_with_each_request(self, stage: Stage):
        answers = await asyncio.gather(
            stage.send_as(Actor("customer", 1), Ask(number=1), trace_id="one"),
            stage.send_as(Actor("staff", 2), Ask(number=2), trace_id="two"),
            stage.send_as(Actor("service"), Ask(number=3), trace_id="three"),
        )
        assert [(a.role, a.actor_id, a.trace_id) for a in answers] == [
            ("customer", 1, "one"), ("staff", 2, "two"), ("service", 0, "three"),
        ]  # fmt: skip
        assert len(stage.service.batches[0]) == 3

    async def test_a_batch_is_in_the_traces_of_those_of_its_requests_that_are_recorded(self, stage: Stage):
        tracing = stage.telemetry.tracing
        tracing.start(0.0)
        stage.server.report_to(stage.telemetry)
        asked = [tracing.request("GET /things", "gateway", each, 0, asked=True, started=0.0) for each in TRACES]
        recorded = [span for span in asked if span is not None]
        answers = await asyncio.gather(
            *(stage.send_as(CUSTOMER, Ask(), trace_id=span.places[0].trace_id, span=span) for span in recorded),
            stage.send_as(CUSTOMER, Ask(), trace_id="not recorded"),
        )
        assert [answer.trace_id for answer in answers] == [*TRACES, "not recorded"]
        for span, trace_id in zip(recorded, TRACES, strict=True):
            spans = {each.span_id: each for each in tracing.recent.trace(trace_id)}
            [call] = [each for each in spans.values() if each.kind == "client"]
            batches = [each for each in spans.values() if each.kind == "server"]
            assert (call.name, call.service, call.parent_id) == ("things.read", "gateway", span.id)
            assert {(each.name, each.service, each.parent_id) for each in batches} == {
                ("things.read", "things", call.span_id)
            }
            assert all((trace_id, call.span_id) in each.links for each in batches)
            assert all(each.attributes["mercato.batch.size"] == 3 for each in batches)

    async def test_a_forbidden_role_is_refused_and_its_neighbours_are_not(self, stage: Stage):
        outcomes = await asyncio.gather(
            stage.send_as(CUSTOMER, Ask(number=1)),
            stage.send_as(Actor("anonymous"), Ask(number=2)),
            stage.send_as(CUSTOMER, Ask(number=3)),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [Said, Forbidden, Said]
        assert all(request.number != 2 for batch in stage.service.batches for request in batch)

    async def test_an_expired_request_never_reaches_the_handler(self, stage: Stage):
        now = stage.clock.monotonic()
        contexts = [Context(CUSTOMER, now + left, "", "") for left in (30.0, -0.001, 30.0)]
        outcomes = await stage.transport.send(Things.change, [Ask(number=n) for n in range(3)], contexts)
        assert [type(outcome) for outcome in outcomes] == [Said, DeadlineExceeded, Said]
        assert [[r.number for r in batch] for batch in stage.service.batches] == [[0, 2]]

    async def test_a_service_that_hangs_is_given_up_at_the_deadline(self, stage: Stage):
        with stage.acting(CUSTOMER, seconds=0.05), pytest.raises(DeadlineExceeded):
            await stage.things.change(Ask(do="hang"))

    async def test_the_remaining_time_travels_and_shrinks_over_hops(self, stage: Stage):
        stage.service.calls_on = stage.things.move
        with stage.acting(CUSTOMER, seconds=5.0):
            await stage.things.move(Ask(do="pass on"))
        first, second = stage.service.remaining
        assert 5.0 >= first >= second > 0

    @pytest.mark.parametrize("operation", ["move", "look"])
    async def test_at_the_end_of_a_chain_less_time_is_left_and_what_hangs_there_is_cancelled(
        self, stage: Stage, operation: str
    ):
        """Three services, of which the last one stands still: with the time of its caller its work ends as well."""
        last = ChainEnd(stage, operation)
        for left in (0.3, 3.0, BOUND_SECONDS):  # on a machine that is too busy for a chain of 300 ms
            last.begin()
            with stage.acting(CUSTOMER, seconds=left), pytest.raises(DeadlineExceeded):
                await getattr(stage.things, operation)(Ask(number=2, do="pass on"))
            if last.reached:
                break

        await until_true(lambda: last.cancelled == last.reached, "what hangs at the last service is cancelled")
        first, second, third = stage.service.remaining[:3]
        assert left >= first >= second >= third > 0
        assert last.work_after_the_end == 0

    async def test_a_deadline_of_the_operation_is_the_most_that_a_caller_gets(self, stage: Stage):
        with stage.acting(CUSTOMER, seconds=3_600.0):
            await stage.things.change(Ask())
        assert stage.service.remaining[0] <= Things.change.deadline_ms / 1_000

    async def test_a_batch_calls_others_as_the_service_with_the_time_of_its_last_request(self, stage: Stage):
        seen: list[Context] = []

        async def note(batch: Batch[Ask]) -> Sequence[Said | ServiceError]:
            seen.append(current.get())
            return [said(r, c) for r, c in zip(batch, batch.contexts, strict=True)]

        stage.server.register(Things.read, note)
        await asyncio.gather(stage.send_as(CUSTOMER, Ask(), 1.0, "one"), stage.send_as(CUSTOMER, Ask(), 9.0, "two"))
        assert seen[0].actor == Actor("service")
        assert seen[0].deadline - stage.clock.monotonic() > 5.0

    async def test_after_a_call_that_must_not_be_repeated_nothing_is_run_again(self, stage: Stage):
        """What another service has done for this batch is as good as a commit."""

        async def ask_others(batch: Batch[Ask]) -> Sequence[Said | ServiceError]:
            stage.service.batches.append(list(batch))
            await (stage.things.move if batch[0].do == "changing" else stage.things.look)(Ask())
            raise RuntimeError(SECRET)

        stage.server.register(Things.change, ask_others)
        for do, runs in (("changing", 1), ("looking", 3)):
            stage.service.batches.clear()
            with stage.acting(CUSTOMER):
                answers = await stage.things.change.many([Ask(do=do), Ask(do=do)])
            assert [type(answer) for answer in answers] == [Internal] * 2
            assert len(stage.service.batches) == runs
