"""Pacts of services that call each other: the real client of the consumer, against Pact's server.

    service ─► client ─► batcher ─► PactTransport ─► Pact's server, which knows the interactions of one test
                                       │
                                       └─ the codec of the transports, and JSON instead of MessagePack

A call is an HTTP interaction as the http transport has it: `POST /rpc/inventory/reserve`, one request of a batch as its
body, with the actor for whom it is sent, and its outcome as the answer. MessagePack is written as JSON, value by value.
Deadline and trace are those of the chassis, whose own schemas say what they are: they are left out.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Final

import aiohttp
import msgspec
from pact.error import Mismatch, MissingRequest

from mercato.chassis.contract import Context, Internal, Message, Operation, RemoteError, ServiceError
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.codec import decode_outcomes, encode_requests
from mercato.chassis.rpc.transports.http.wire import PATH_PREFIX
from pacts.book import PactBook, interactions_of, new_pact
from pacts.examples import exactly, expectation, values_of
from pacts.reading import Reads

JSON: Final = "application/json"
HOST: Final = "127.0.0.1"
ACTOR: Final[Mapping[str, Any]] = types.MappingProxyType({"role": "service", "id": 0})
"""Services call each other as the shop itself, whatever customer or member of staff they serve."""


class State(msgspec.Struct, frozen=True):
    """What has to be so at the provider. `pacts/states.py` makes it."""

    name: str
    parameters: Mapping[str, Any]


def given(name: str, **parameters: Any) -> State:
    return State(name, parameters)


class Exchange(msgspec.Struct, frozen=True, kw_only=True):
    """A request of a consumer, and an outcome that its provider gives: `answer`, or `error`.

    All are examples as in `pacts/examples.py`.
    """

    description: str
    operation: Operation[Any, Any]
    request: Mapping[str, Any]
    answer: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    states: tuple[State, ...] = ()
    actor: Mapping[str, Any] = ACTOR

    @property
    def path(self) -> str:
        return f"{PATH_PREFIX}{self.operation.service}/{self.operation.name}"

    @property
    def provider(self) -> str:
        return provider_of(self.operation.service)

    @property
    def outcome(self) -> Mapping[str, Any]:
        return {"body": self.answer} if self.error is None else {"error": self.error}


def provider_of(contract: str) -> str:
    """The service that serves a contract: its own, or that of its event log."""
    return contract.removesuffix(".log")


def refusal(error: type[ServiceError], **details: Any) -> Mapping[str, Any]:
    """An error as a provider sends it: a consumer recognises it by its code, and reads its details."""
    return {
        "code": exactly(error.code),
        "kind": exactly(str(error.kind)),
        "message": "A sentence for people.",
        "details": details,
    }


Idle = Callable[[Any], Message]


class PactTransport:
    """The transport of a consumer. Only within `Stage.expects` it has interactions.

    `idle`: what other operations answer that the consumer calls when a test does not expect it, by full name: those of
    its periodic tasks, and those whose answers it remembers.
    """

    def __init__(self, idle: Mapping[str, Idle]) -> None:
        self._idle = idle
        self._clock = SystemClock()
        self._urls: dict[str, str] = {}
        self._exchanges: dict[str, tuple[Exchange, Reads]] = {}
        self.unexpected: list[str] = []
        self._session: aiohttp.ClientSession | None = None

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        return [await self._one(operation, r, c) for r, c in zip(requests, contexts, strict=True)]

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def expect(self, urls: Mapping[str, str], exchanges: Mapping[str, tuple[Exchange, Reads]]) -> None:
        """From now on these: the URLs of Pact's servers by provider, and the exchanges by path."""
        self._urls, self._exchanges, self.unexpected = dict(urls), dict(exchanges), []

    async def _one(self, operation: Operation[Any, Any], request: Any, context: Context) -> Outcome:
        path = f"{PATH_PREFIX}{operation.service}/{operation.name}"
        [sent] = msgspec.msgpack.decode(encode_requests([request], [context], self._clock.monotonic()))
        if path not in self._exchanges:
            if operation.full_name in self._idle:
                return self._idle[operation.full_name](request)
            self.unexpected.append(f"{operation.full_name} is called with {sent['body']}: no interaction states it")
            return Internal(operation=operation.full_name)
        exchange, reads = self._exchanges[path]
        body = [{"actor": sent["actor"], "body": sent["body"]}]
        if self._session is None:
            self._session = aiohttp.ClientSession()
        url = self._urls[provider_of(operation.service)] + path
        async with self._session.post(url, data=msgspec.json.encode(body), headers={"Content-Type": JSON}) as response:
            answered = await response.read()
            if response.status != 200:  # Pact knows what differs, and says so at the end
                return Internal(operation=operation.full_name)
        (outcome,) = decode_outcomes(operation, msgspec.msgpack.encode(msgspec.json.decode(answered)))
        return self._watched(exchange, reads, outcome)

    def _watched(self, exchange: Exchange, reads: Reads, outcome: Outcome) -> Outcome:
        if exchange.error is not None:
            if isinstance(outcome, RemoteError) or not isinstance(outcome, ServiceError):
                reads.violations.append(f"{exchange.description}: the consumer's decoder reads {outcome!r}")
                return outcome
            return reads.watch_error(outcome, values_of(exchange.error)["details"])
        if isinstance(outcome, ServiceError):
            reads.violations.append(
                f"{exchange.description}: the consumer's decoder needs more than the pact states ({outcome})"
            )
            return outcome
        return reads.watch(outcome, values_of(exchange.answer))


class Stage:
    """The providers of a consumer under test, played by Pact."""

    def __init__(self, book: PactBook, idle: Mapping[str, Idle] | None = None) -> None:
        self.transport: Final = PactTransport(idle or {})
        self._book = book

    @contextlib.asynccontextmanager
    async def expects(self, *exchanges: Exchange) -> AsyncGenerator[None]:
        """In this block the consumer has all these exchanges, and no other. At its end they are in the book.

        Raises where Pact has seen another request, or not each of them, or where the pact does not state what the
        consumer needs of an answer, or states more.
        """
        by_path = {each.path: (each, Reads(each.description)) for each in exchanges}
        if len(by_path) != len(exchanges):
            raise AssertionError("one block has one exchange of an operation")
        providers = sorted({each.provider for each in exchanges})
        pacts = {name: new_pact(self._book.consumer, name) for name in providers}
        for each in exchanges:
            _state(pacts[each.provider], each)
        with contextlib.ExitStack() as running:
            servers = {
                name: running.enter_context(pact.serve(HOST, raises=False, verbose=False))
                for name, pact in pacts.items()
            }
            self.transport.expect({name: str(server) for name, server in servers.items()}, by_path)
            try:
                yield
            finally:
                wrong = [*self.transport.unexpected, *(v for _, reads in by_path.values() for v in reads.violations)]
                wrong += [sentence_of(each) for server in servers.values() for each in server.mismatches]
                self.transport.expect({}, {})
                if wrong:
                    raise AssertionError("; ".join(dict.fromkeys(wrong)))
        for each, reads in by_path.values():
            if unneeded := reads.unneeded():
                raise AssertionError(
                    f"{each.description}: the pact states {unneeded}, which the consumer does not read"
                )
        for name, pact in pacts.items():
            for interaction in interactions_of(pact):
                self._book.add(name, interaction, by_path[interaction["request"]["path"]][1].paths)


def sentence_of(mismatch: Mismatch) -> str:
    """What Pact has seen otherwise than stated; without the whole interaction where a request is only missing."""
    return f"{mismatch.path} is not called" if isinstance(mismatch, MissingRequest) else str(mismatch)


def _state(pact: Any, exchange: Exchange) -> None:
    interaction = pact.upon_receiving(exchange.description)
    for state in exchange.states:
        interaction = interaction.given(state.name, dict(state.parameters))
    sent = [{"actor": dict(exchange.actor), "body": expectation(exchange.request)}]
    answered = [expectation(exchange.outcome)]
    interaction.with_request("POST", exchange.path).with_body(sent, JSON).will_respond_with(200).with_body(
        answered, JSON
    )
