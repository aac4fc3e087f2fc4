"""Messages between two versions of a contract, really encoded by the sender and decoded by the receiver.

One side is the contract as it is now, with its own classes. The other is a released version, built from its schemas.
Each function sends messages of one kind (requests, answers, errors, events) in one direction, over the codec of the
transports or, for events, as they stand in an outbox; and raises `AssertionError` where a message is not read as it was
sent. Fields that the receiver does not know are ignored; those that the sender does not know have their default.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec
from hypothesis import HealthCheck, Phase, given, settings

from contracts.released_contract import CONTEXT, ReleasedContract, plain, shared
from mercato.chassis.contract import (
    Contract,
    Empty,
    InvalidRequest,
    Message,
    Operation,
    ServiceError,
    single,
)
from mercato.chassis.contract.compatibility import Schema, errors_of, schemas, without_added_values
from mercato.chassis.messaging.events import Outgoing, SourceRow, decoder
from mercato.chassis.postgres import outbox_row
from mercato.chassis.rpc import codec

EXAMPLES: Final = 10
"""Messages of each type, the same ones in every run."""

SLOW: Final = (HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large)

Direction = Callable[[ReleasedContract, type[Contract]], None]
"""Sends messages between a released version and the contract as it is now."""


def requests_to_the_released(released: ReleasedContract, contract: type[Contract]) -> None:
    # A value that the older service does not know is refused by its name: callers send it when all services know it.
    now = schemas(contract)
    known = without_added_values(released.schema["components"], now["components"])
    sender = ReleasedContract({**now, "components": known})
    for name, operation in _operations(released, contract):
        reader = released.operation(name)

        def check(sent: Any, operation: Operation[Any, Any] = operation, reader: Operation[Any, Any] = reader) -> None:
            request(msgspec.convert(sent, operation.request), reader)

        for_each(sender, now["operations"][name]["request"], check)


def requests_from_the_released(released: ReleasedContract, contract: type[Contract]) -> None:
    for name, operation in _operations(released, contract):
        sender = released.operation(name).request
        for_each(
            released,
            released.schema["operations"][name]["request"],
            lambda sent, s=sender, o=operation: request(msgspec.convert(sent, s), o),
        )


def answers_to_the_released(released: ReleasedContract, contract: type[Contract]) -> None:
    sender = ReleasedContract(schemas(contract))
    for name, operation in _operations(released, contract):
        reader = released.operation(name)

        def check(sent: Any, operation: Operation[Any, Any] = operation, reader: Operation[Any, Any] = reader) -> None:
            answer(msgspec.convert(sent, operation.answer), reader)

        for_each(sender, sender.schema["operations"][name]["answer"], check)


def answers_from_the_released(released: ReleasedContract, contract: type[Contract]) -> None:
    for name, operation in _operations(released, contract):
        sender = released.operation(name).answer
        for_each(
            released,
            released.schema["operations"][name]["answer"],
            lambda sent, s=sender, o=operation: answer(msgspec.convert(sent, s), o),
        )


def errors_to_the_released(released: ReleasedContract, contract: type[Contract]) -> None:
    sender = ReleasedContract(schemas(contract))
    known = errors_of(contract)
    for code, described in released.schema["errors"].items():
        reader = released.type_of(described["details"])
        details = sender.type_of(sender.schema["errors"][code]["details"])

        def check(sent: Any, code: str = code, details: Any = details, reader: Any = reader) -> None:
            fields = msgspec.structs.asdict(msgspec.convert(sent, details))
            (wire,) = msgspec.msgpack.decode(
                codec.encode_outcomes(_NO_OPERATION, [known[code](**fields)]), type=list[codec.WireOutcome[msgspec.Raw]]
            )
            assert wire.error is not None
            assert wire.error.code == code
            same(sent, msgspec.convert(wire.error.details, reader))

        for_each(sender, sender.schema["errors"][code]["details"], check)


def errors_from_the_released(released: ReleasedContract, contract: type[Contract]) -> None:
    known = errors_of(contract)
    for code, described in released.schema["errors"].items():
        sender = released.type_of(described["details"])

        def check(sent: Any, code: str = code, sender: Any = sender, kind: str = described["kind"]) -> None:
            details = msgspec.to_builtins(msgspec.convert(sent, sender))
            message = {"code": code, "kind": kind, "message": "A sentence.", "details": details}
            encoded = msgspec.msgpack.encode([{"error": message}])
            (received,) = codec.decode_outcomes(_NO_OPERATION, encoded)
            assert type(received) is known[code], f"{code} is not read as itself"
            assert isinstance(received, ServiceError)
            same(sent, received.details)

        for_each(released, described["details"], check)


def events_to_the_released(released: ReleasedContract, contract: type[Contract]) -> None:
    sender = ReleasedContract(schemas(contract))
    for types in _types_by_message(released, contract):
        message = contract.events[types[0]]

        def check(sent: Any, types: Sequence[str] = types, message: type[Message] = message) -> None:
            for type_ in types:
                read = msgspec.json.Decoder(released.type_of(released.schema["events"][type_])).decode
                event(type_, msgspec.convert(sent, message), read)

        for_each(sender, sender.schema["events"][types[0]], check)


def events_from_the_released(released: ReleasedContract, contract: type[Contract]) -> None:
    for types in _types_by_message(released, contract):
        reference = released.schema["events"][types[0]]
        sender = released.type_of(reference)

        def check(sent: Any, types: Sequence[str] = types, sender: Any = sender) -> None:
            for type_ in types:
                event(type_, msgspec.convert(sent, sender), decoder(contract, contract.events[type_], type_))

        for_each(released, reference, check)


DIRECTIONS: Final[dict[str, Direction]] = {
    function.__name__: function
    for function in (
        requests_to_the_released,
        requests_from_the_released,
        answers_to_the_released,
        answers_from_the_released,
        errors_to_the_released,
        errors_from_the_released,
        events_to_the_released,
        events_from_the_released,
    )
}


# -------------------------------------------------------------------------------------------------------- one message


def request(sent: Any, reader: Operation[Any, Any]) -> None:
    (read,), _ = codec.decode_requests(reader, codec.encode_requests([sent], [CONTEXT], 0.0), 0.0)
    assert not isinstance(read, InvalidRequest), f"{sent} is refused: {read.errors}"
    same(sent, read)


def answer(sent: Any, reader: Operation[Any, Any]) -> None:
    (read,) = codec.decode_outcomes(reader, codec.encode_outcomes(reader, [sent]))
    assert not isinstance(read, ServiceError), f"{sent} cannot be read"
    same(sent, read)


def event(type_: str, sent: Any, read: Callable[[str], Any]) -> None:
    (row,) = outbox_row.pack([Outgoing(type_, "subject", 1, 1, sent)])
    (found,) = SourceRow(source="source", id=1, at=_AT, events=row).unpack()
    assert found.type == type_
    same(sent, read(found.data))


def same(sent: Any, read: Any) -> None:
    """What was sent is what was read, as far as both know it."""
    assert plain(read) == shared(plain(sent), plain(read))


def for_each(
    sender: ReleasedContract,
    schema: Schema,
    check: Callable[[Any], None],
    enums: str = "known",
    examples: int = EXAMPLES,
) -> None:
    """Checks a number of messages that fit the schema. `enums` as in `ReleasedContract.messages`."""

    @settings(
        max_examples=examples,
        phases=(Phase.generate,),  # a smaller message would say no more
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=SLOW,
    )
    @given(sender.messages(schema, enums))
    def body(sent: Any) -> None:
        check(sent)

    body()


def _types_by_message(released: ReleasedContract, contract: type[Contract]) -> list[list[str]]:
    """The types of events that the released version has, those with the same message together."""
    found: dict[str, list[str]] = {}
    for type_, reference in released.schema["events"].items():
        found.setdefault(f"{reference} {contract.events[type_]}", []).append(type_)
    return list(found.values())


def _operations(released: ReleasedContract, contract: type[Contract]) -> Iterator[tuple[str, Operation[Any, Any]]]:
    """Those that both have, with the operation as it is now."""
    for name in released.schema["operations"]:
        yield name, contract.operations[name]


_AT: Final = datetime.datetime(2026, 1, 15, 9, 30, tzinfo=datetime.UTC)
_NO_OPERATION: Final = single(Empty, Empty, allow=frozenset())
"""Errors are read in the same way whatever was asked."""
