"""Field numbers: committed, complete, and never changed."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from contracts import update_schemas
from mercato.chassis.contract import Contract, Kind, Message, Open, ServiceError, single
from mercato.contracts import field_numbers
from mercato.contracts.field_numbers import Numbering, Numbers, assign, changes
from mercato.testing.assertions import needs_assertions

CONTRACTS = update_schemas.contracts()
MODULE = __name__.rpartition(".")[2]


def test_committed_numbers_are_those_of_the_contracts():
    committed = update_schemas.committed_numbers()

    assert committed == assign(committed, CONTRACTS.values()), f"run `{update_schemas.COMMAND}` and commit the numbers"
    assert update_schemas.FIELD_NUMBERS.read_bytes() == field_numbers.written(committed)


def test_messages_of_all_kinds_have_numbers():
    committed = update_schemas.committed_numbers()

    for module, name in [
        ("orders", "PlaceOrder"),  # a request
        ("orders", "OrderLine"),  # a part of an answer
        ("orders", "IllegalMove"),  # an error
        ("orders", "OrderChanged"),  # an event
        ("payments", "Payment"),  # of another service's module
        ("sandbox", "SandboxOperation"),
        ("chassis", "FieldError"),
        ("chassis", "SourceRow"),
    ]:
        assert committed[module]["messages"][name].numbers, name
    assert committed["chassis"]["enums"]["Kind"].numbers["internal"]
    assert committed["orders"]["enums"]["Status"].numbers["pending"] == 1


def test_no_number_is_0_or_used_twice():
    for kinds in update_schemas.committed_numbers().values():
        for name, numbering in ((n, each) for named in kinds.values() for n, each in named.items()):
            numbers = [*numbering.numbers.values(), *numbering.reserved]
            assert len(set(numbers)) == len(numbers), name
            assert all(1 <= number <= field_numbers.LAST_NUMBER for number in numbers), name


def test_numbers_survive_being_written():
    committed = update_schemas.committed_numbers()

    assert field_numbers.read(field_numbers.written(committed)) == committed


# ------------------------------------------------------------------------------------------------------ how they change


@pytest.mark.parametrize(
    ("names", "numbers", "reserved"),
    [
        ("ab", {"a": 1, "b": 2}, {}),
        ("ba", {"a": 1, "b": 2}, {}),  # another order
        ("abc", {"a": 1, "b": 2, "c": 3}, {}),
        ("cab", {"a": 1, "b": 2, "c": 3}, {}),
        ("ac", {"a": 1, "c": 3}, {2: "b"}),
        ("", {}, {1: "a", 2: "b"}),
    ],
)
def test_a_new_field_gets_the_next_number_and_the_number_of_a_removed_one_is_reserved(
    names: str, numbers: dict[str, int], reserved: dict[int, str]
):
    assert Numbering({"a": 1, "b": 2}).extended(list(names)) == Numbering(numbers, reserved)


def test_a_reserved_number_is_never_used_again():
    without_b = Numbering({"a": 1, "b": 2}).extended(["a"])

    assert without_b.extended(["a", "c"]) == Numbering({"a": 1, "c": 3}, {2: "b"})
    assert without_b.extended(["a", "b"]) == Numbering({"a": 1, "b": 3}, {2: "b"})


def one(numbering: Numbering) -> Numbers:
    return {"orders": {"messages": {"Order": numbering}, "enums": {}}}


@pytest.mark.parametrize(
    ("old", "new", "sentences"),
    [
        (Numbering({"a": 1}), Numbering({"a": 1, "b": 2}), []),
        (Numbering({"a": 1}), Numbering({}, {1: "a"}), []),
        (Numbering({"a": 1}), Numbering({"a": 2}), ["orders.Order: 1 was a, and is nothing now"]),
        (Numbering({"a": 1}), Numbering({}), ["orders.Order: 1 was a, and is nothing now"]),
        (Numbering({"a": 1}), Numbering({"b": 1, "a": 2}), ["orders.Order: 1 was a, and is b now"]),
        (Numbering({}, {1: "a"}), Numbering({"b": 1}), ["orders.Order: 1 was a, and is b now"]),
        (Numbering({}, {1: "a"}), Numbering({"a": 1}), ["orders.Order: 1 was reserved, and is used again"]),
    ],
)
def test_a_number_that_has_changed_is_named(old: Numbering, new: Numbering, sentences: list[str]):
    assert changes(one(old), one(new)) == sentences


def test_a_message_that_is_gone_without_its_numbers_is_named():
    assert changes(one(Numbering({"a": 1})), {}) == ["orders.Order: 1 was a, and is nothing now"]


# ---------------------------------------------------------------------------------------------------- what is numbered

Colour = Literal["red", "green"]
Shade = Literal["light", "dark"]
Hue = Literal["light", "dark"]


class Part(Message):
    colour: Open[Colour] | None


class Ask(Message):
    colour: Colour = "red"


class Said(Message):
    parts: tuple[Part, ...]


class Refused(ServiceError, code="field_numbers_test.refused", kind=Kind.REFUSED):
    sentence = "No."
    parts: tuple[Part, ...]
    retry_after_s: int | None = 1


class Shop(Contract, name="field_numbers_test"):
    read = single(Ask, Said, allow=frozenset())


class Ambiguous(Message):
    shade: Open[Shade]


class Unnamed(Message):
    size: Open[Literal["small", "large"]]


def test_what_a_contract_leads_to_is_numbered():
    made = assign({}, [Shop])["field_numbers_test"]

    assert made["messages"] == {
        "Ask": Numbering({"colour": 1}),
        "Part": Numbering({"colour": 1}),
        "Refused": Numbering({"parts": 1}),
        "Said": Numbering({"parts": 1}),
    }
    assert made["enums"] == {"Colour": Numbering({"red": 1, "green": 2})}


@needs_assertions
@pytest.mark.parametrize(("message", "names"), [(Ambiguous, "'Hue', 'Shade'"), (Unnamed, "none")])
def test_an_enumeration_has_one_name(message: Any, names: str):
    contract = type("Wrong", (Contract,), {"read": single(message, message, allow=frozenset())}, name="wrong")

    with pytest.raises(AssertionError, match=f"{message.__name__}: give the enumeration .* one name .*{names}"):
        assign({}, [contract])
