"""Orders asks payments once a minute for each method that it meets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from mercato.chassis.contract import Actor, Context, FieldError, InvalidRequest, ServiceError, Unavailable, current
from mercato.contracts.payments import CheckedMethod, CheckMethod, Payments
from mercato.services.orders import payment_methods
from mercato.services.orders.payment_methods import PaymentMethods

DEFAULT = "bank:default"


class Clock:
    now_s = 71.25

    def monotonic(self) -> float:
        return self.now_s


class Checking:
    """Payments, as far as methods go: those that end with `bad` are refused."""

    def __init__(self) -> None:
        self.asked: list[list[str | None]] = []
        self.check_method = self
        self.is_away = False

    async def many(self, requests: Sequence[CheckMethod]) -> Sequence[CheckedMethod | ServiceError]:
        self.asked.append(sorted((request.method for request in requests), key=str))
        return [Unavailable(service="payments") if self.is_away else _checked(request.method) for request in requests]


def _checked(method: str | None) -> CheckedMethod | ServiceError:
    if method is not None and method.endswith("bad"):
        return InvalidRequest(errors=(FieldError(field="payment_method", message="it is bad"),))
    return CheckedMethod(method=method or DEFAULT)


@pytest.fixture
def clock() -> Clock:
    current.set(Context(Actor("customer", 7), 1e9, "", ""))
    return Clock()


@pytest.fixture
def payments() -> Checking:
    return Checking()


@pytest.fixture
def methods(payments: Checking, clock: Clock) -> PaymentMethods:
    return PaymentMethods(cast(Payments, payments), cast(Any, clock))


async def test_a_batch_asks_once_for_each_method_that_it_does_not_know(methods: PaymentMethods, payments: Checking):
    found = await methods.check(["bank:a", "bank:b", "bank:a", None])
    assert found == {"bank:a": "bank:a", "bank:b": "bank:b", None: DEFAULT}

    assert (await methods.check(["bank:a", "bank:c", None]))["bank:c"] == "bank:c"

    assert payments.asked == [[None, "bank:a", "bank:b"], ["bank:c"]]


async def test_a_refusal_is_not_remembered(methods: PaymentMethods, payments: Checking):
    for _ in range(2):
        found = await methods.check(["bank:bad", "bank:a"])
        assert isinstance(found["bank:bad"], InvalidRequest)
        assert found["bank:a"] == "bank:a"
        with pytest.raises(InvalidRequest):
            await methods.check_one("bank:bad")
    assert payments.asked == [["bank:a", "bank:bad"], ["bank:bad"], ["bank:bad"], ["bank:bad"]]


async def test_methods_are_asked_for_again_after_a_minute(methods: PaymentMethods, payments: Checking, clock: Clock):
    assert await methods.check_one(None) == DEFAULT
    clock.now_s += 59.9
    assert await methods.check_one(None) == DEFAULT
    assert len(payments.asked) == 1
    clock.now_s += 0.1
    assert await methods.check_one(None) == DEFAULT
    assert len(payments.asked) == 2


async def test_while_payments_is_unavailable_its_last_answer_counts(
    methods: PaymentMethods, payments: Checking, clock: Clock
):
    await methods.check(["bank:a", None])
    payments.is_away = True
    for _ in range(3):
        clock.now_s += 60.5
        found = await methods.check(["bank:a", None, "bank:new"])
        assert (found["bank:a"], found[None]) == ("bank:a", DEFAULT)
        assert isinstance(found["bank:new"], Unavailable)
    payments.is_away = False
    assert await methods.check_one("bank:new") == "bank:new"


async def test_a_method_that_payments_refuses_by_now_is_refused(
    methods: PaymentMethods, payments: Checking, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    await methods.check_one("bank:a")
    clock.now_s += 60.5
    monkeypatch.setattr(f"{__name__}._checked", lambda _method: InvalidRequest(errors=()))
    with pytest.raises(InvalidRequest):
        await methods.check_one("bank:a")


async def test_what_is_remembered_is_bounded(methods: PaymentMethods, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(payment_methods, "REMEMBERED", 3)
    for number in range(50):
        assert await methods.check_one(f"bank:{number}") == f"bank:{number}"
        assert len(methods._known) <= 4
