"""The transport that encodes everything and repeats what may be repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec
import pytest

from mercato.chassis.contract import (
    Batch,
    Context,
    DeadlineExceeded,
    ErrorMessage,
    Internal,
    InvalidRequest,
    Kind,
    RemoteError,
    ServiceError,
    Unavailable,
)
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.codec import decode_outcomes, decode_requests, encode_requests
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.transports import Transport
from mercato.chassis.rpc.transports.loopback import LoopbackTransport

from .conformance import CUSTOMER, Ask, Conformance, Refused, Said, Stage, Things, said
from .false_promise import COUNT, counting


class Unencodable(msgspec.Struct):
    """No message at all: what a handler with a mistake may give."""

    thing: object


def numbers(batches: Sequence[Sequence[Ask]]) -> list[list[int]]:
    return [[request.number for request in batch] for batch in batches]


class TestWire(Conformance):
    def transport(self, servers: Mapping[str, Server], clock: Clock) -> Transport:
        return LoopbackTransport(servers, clock)

    async def test_a_message_really_travels(self, stage: Stage):
        request = Ask(number=1)
        with stage.acting(CUSTOMER):
            answer = await stage.things.change(request)
        assert answer.echo is not request

    async def test_safe_operations_run_twice(self, stage: Stage):
        with stage.acting(CUSTOMER):
            await stage.things.read.many([Ask(number=1), Ask(number=2)])
            await stage.things.look(Ask(number=3))
        assert numbers(stage.service.batches) == [[1, 2], [1, 2]]
        assert [request.number for request in stage.service.singles] == [3, 3]

    async def test_keyed_operations_run_twice_with_a_key_and_once_without(self, stage: Stage):
        with stage.acting(CUSTOMER):
            await stage.things.put.many(
                [Ask(number=1, idempotency_key="a"), Ask(number=2), Ask(number=3, idempotency_key="b")]
            )
        assert numbers(stage.service.batches) == [[1, 2, 3], [1, 3]]

    async def test_operations_that_must_not_be_repeated_run_once(self, stage: Stage):
        with stage.acting(CUSTOMER):
            await stage.things.change(Ask(number=1, idempotency_key="a key changes nothing"))
            await stage.things.move(Ask(number=2))
        assert numbers(stage.service.batches) == [[1]]
        assert len(stage.service.singles) == 1

    async def test_a_read_with_a_side_effect_runs_twice_and_is_found(self, stage: Stage):
        assert await counting(stage) == 2 * COUNT

    @pytest.mark.parametrize(
        ("second", "reported"),
        [(Refused(number=1), True), (Unavailable(service="x"), False), (DeadlineExceeded(operation="x"), False)],
        ids=["refused", "unavailable", "too late"],
    )
    async def test_a_keyed_operation_that_refuses_the_second_time_is_reported(
        self, stage: Stage, second: ServiceError, reported: bool
    ):
        runs = 0

        async def once(batch: Batch[Ask]) -> Sequence[Said | ServiceError]:
            nonlocal runs
            runs += 1
            return [said(r, c) if runs == 1 else second for r, c in zip(batch, batch.contexts, strict=True)]

        stage.server.register(Things.put, once)
        with stage.acting(CUSTOMER):
            (outcome,) = await stage.things.put.many([Ask(idempotency_key="a")])
        assert isinstance(outcome, Internal if reported else Said)
        assert stage.failures("things.put") == int(reported)

    async def test_a_request_that_does_not_fit_its_schema_fails_alone(self, stage: Stage):
        wrong = Ask(number=cast(Any, "seven"))
        with stage.acting(CUSTOMER):
            answers = await stage.things.change.many([Ask(number=1), wrong, Ask(number=2)])
        assert [type(answer) for answer in answers] == [Said, InvalidRequest, Said]
        assert isinstance(answers[1], InvalidRequest)
        assert [(e.field, e.message) for e in answers[1].errors] == [("number", "must be a whole number, not a text")]

    async def test_an_answer_that_cannot_be_encoded_or_decoded_fails_alone(self, stage: Stage):
        async def careless(batch: Batch[Ask]) -> Sequence[Said | ServiceError]:
            good = said(batch[0], batch.contexts[0])
            return [good, cast(Any, Unencodable(object())), cast(Any, Ask(number=1)), cast(Any, None), good]

        stage.server.register(Things.change, careless)
        with stage.acting(CUSTOMER):
            answers = await stage.things.change.many([Ask()] * 5)
        assert [type(answer) for answer in answers] == [Said, Internal, Internal, Internal, Said]

    def test_the_time_that_is_left_travels_and_no_reading_of_a_clock(self):
        contexts = [Context(CUSTOMER, 105.0, "", ""), Context(CUSTOMER, 99.0, "", "")]
        _, arrived = decode_requests(Things.read, encode_requests([Ask(), Ask()], contexts, now=100.0), now=7.0)
        assert [context.deadline for context in arrived] == [12.0, 7.0]


def test_an_error_whose_details_have_changed_elsewhere_keeps_what_it_says():
    newer = ErrorMessage("things.refused", Kind.REFUSED, "Thing A7 is refused.", {"number": "A7"})
    missing = ErrorMessage("things.refused", Kind.REFUSED, "A thing is refused.", {})
    sent = msgspec.msgpack.encode(
        [{"error": newer}, {"error": missing}, {"error": ErrorMessage("remote", Kind.INVALID, "?")}]
    )
    first, second, third = decode_outcomes(Things.read, sent)
    for error, sentence in ((first, newer.message), (second, missing.message), (third, "?")):
        assert isinstance(error, RemoteError)
        assert str(error) == sentence
