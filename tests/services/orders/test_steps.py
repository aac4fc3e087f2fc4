"""The decisions of checkout, against the rules of inventory, payments and the bank, in every order of events.

One order on its way. Drivers take its saga over from each other and die; those that were taken for dead go on and call
late; calls are made twice, and answers are lost; meanwhile somebody pays, cancels, confirms, captures or voids, or the
time runs out. Everything here is pure: what the services would do is done by their own rules.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Generator, Mapping
from typing import Final, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mercato.chassis.contract import Actor, ServiceError
from mercato.contracts.inventory import Level, Reservation, ReserveStock, ReturnStock, StockLine
from mercato.contracts.orders import Order, OrderLine
from mercato.contracts.payments import (
    AnotherPaymentLive,
    AttemptNotFound,
    OperationKind,
    OperationStatus,
    OutcomePending,
)
from mercato.contracts.payments import Payment as PaymentRecord
from mercato.contracts.payments import Status as PaymentStatus
from mercato.services.inventory.rules import Books, Plan, Standing
from mercato.services.orders import rules, steps
from mercato.services.orders.steps import Checkout, Decision, Step, TryAgain
from mercato.services.payments import rules as payment_rules
from mercato.services.payments.rules import Ask, Goal
from mercato.services.sandbox import rules as bank_rules

A = TypeVar("A")

EPOCH: Final = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
ORDER_ID: Final = 1001
PRODUCT_ID: Final = 7
PRICE_MINOR: Final = 500
SHOP: Final = Actor("service")
WINDOW_S: Final = 900.0
HOLD_S: Final = 600.0
RESTING: Final = ("awaiting", "authorized", "done")
METHODS: Final = ("sandbox:ok", "sandbox:declined", "sandbox:capture_expired")
CALLS: Final = st.integers(0, 6)
"""How many calls and saves whoever came last makes meanwhile: from one end of a checkout to the other."""
TRIES: Final = 60
"""More steps than any checkout takes from anywhere to its end."""


# --------------------------------------------------------------------------------------------------------------- stock


class Shelf:
    """Inventory, for one order of one product."""

    def __init__(self, on_hand: int) -> None:
        self.level = Level(
            product_id=PRODUCT_ID, on_hand=on_hand, reserved=0, available=on_hand, updated_at=EPOCH, version=1
        )
        self.reservation: Standing | None = None
        self.returned: set[str] = set()

    def reserve(self, quantity: int, *, for_payment: bool) -> Reservation | ServiceError:
        lines = (StockLine(product_id=PRODUCT_ID, quantity=quantity),)
        request = ReserveStock(order_id=ORDER_ID, lines=lines, for_payment=for_payment, idempotency_key="reserve")
        opened = () if self.reservation else (Standing(ORDER_ID, "held", 1, None if for_payment else HOLD_S),)
        books = Books([self.level], self._standing(), opened)
        return self._close(books, books.reserve(request))

    def commit(self) -> Reservation | ServiceError:
        books = self._books()
        return self._close(books, books.commit(ORDER_ID, SHOP))

    def release(self) -> Reservation:
        if self.reservation is None:
            self.reservation = Standing(ORDER_ID, "released", 1, None)
        books = self._books()
        return self._close(books, books.release(ORDER_ID))

    def restock(self, quantity: int, reference: str) -> Reservation | ServiceError:
        books = self._books()
        if reference in self.returned:
            return books.look(ORDER_ID)
        lines = (StockLine(product_id=PRODUCT_ID, quantity=quantity),)
        request = ReturnStock(order_id=ORDER_ID, lines=lines, reference=reference, idempotency_key="restock")
        answer = self._close(books, books.restock(request, SHOP))
        if isinstance(answer, Reservation):
            self.returned.add(reference)
        return answer

    def receive(self, quantity: int) -> None:
        """Somebody else's pieces come back, or new ones are delivered."""
        on_hand = self.level.on_hand + quantity
        self.level = msgspec.structs.replace(self.level, on_hand=on_hand, available=on_hand - self.level.reserved)

    def let_time_pass(self) -> None:
        """Past the end of a hold; whoever looks next ends it."""
        if self.reservation and self.reservation.expires_in_s is not None:
            self.reservation = msgspec.structs.replace(self.reservation, expires_in_s=-1.0)

    def expire(self) -> None:
        if self.reservation and self.reservation.is_over:
            books = self._books()
            books.expire(ORDER_ID)
            self._close(books, None)

    @property
    def state(self) -> str | None:
        return self.reservation.state if self.reservation else None

    def _books(self) -> Books:
        return Books([self.level], self._standing())

    def _standing(self) -> tuple[Standing, ...]:
        return (self.reservation,) if self.reservation else ()

    def _close(self, books: Books, answer: A) -> A:
        self._write(books.close())
        return answer

    def _write(self, plan: Plan) -> None:
        for opened in plan.opened:
            self.reservation = opened
        for change in plan.changes:
            assert self.reservation
            self.reservation = msgspec.structs.replace(
                self.reservation, state=change.state, version=change.version, expires_in_s=None
            )
        for back in plan.returned:
            assert self.reservation
            lines = tuple(
                msgspec.structs.replace(line, returned=line.returned + back.quantity) for line in self.reservation.lines
            )
            self.reservation = msgspec.structs.replace(self.reservation, lines=lines)
        for shift in plan.shifts:
            on_hand, reserved = self.level.on_hand + shift.on_hand, self.level.reserved + shift.reserved
            self.level = msgspec.structs.replace(
                self.level, on_hand=on_hand, reserved=reserved, available=on_hand - reserved
            )


# --------------------------------------------------------------------------------------------------------------- money


class Charge(msgspec.Struct, frozen=True):
    id: int
    method: str
    authorized_minor: int
    order_id: int = ORDER_ID
    currency: str = "USD"
    captured_minor: int = 0
    refunded_minor: int = 0
    state: bank_rules.State = "open"


class TheBank:
    """The bank, by its own rules: an operation is done once for each key."""

    def __init__(self) -> None:
        self.charges: dict[int, Charge] = {}
        self.done: dict[str, payment_rules.Succeeded | payment_rules.Declined] = {}
        self.captures = 0

    def ask(
        self, key: str, ask: Ask, method: str, charge_id: int | None
    ) -> payment_rules.Succeeded | payment_rules.Declined:
        if key not in self.done:
            self.done[key] = self._do(ask, method, charge_id)
        return self.done[key]

    def _do(self, ask: Ask, method: str, charge_id: int | None) -> payment_rules.Succeeded | payment_rules.Declined:
        number = len(self.done) + 1
        if ask.kind == "authorize":
            if code := bank_rules.NO_AUTHORIZATION.get(method):
                return payment_rules.Declined(code)
            self.charges[number] = Charge(number, method, ask.amount_minor)
            return payment_rules.Succeeded(number, number)
        assert charge_id is not None, "nobody asks for anything of a charge that there is none of"
        self.charges[charge_id], code = bank_rules.carry_out(self.charges[charge_id], ask.kind, ask.amount_minor)
        if code is not None:
            return payment_rules.Declined(code)
        self.captures += ask.kind == "capture"
        return payment_rules.Succeeded(number, charge_id)

    @property
    def net_minor(self) -> int:
        return sum(charge.captured_minor - charge.refunded_minor for charge in self.charges.values())

    @property
    def open_charges(self) -> int:
        return sum(charge.state == "open" for charge in self.charges.values())


class Attempt(msgspec.Struct, frozen=True):
    """A payment, as its service keeps it."""

    id: int
    method: str
    amount_minor: int
    status: PaymentStatus = "pending"
    currency: str = "USD"
    authorized_minor: int = 0
    captured_minor: int = 0
    refunded_minor: int = 0
    code: str | None = None
    charge_id: int | None = None
    version: int = 1


class Operation(msgspec.Struct):
    kind: OperationKind
    reference: str
    amount_minor: int
    status: OperationStatus = "intent"
    code: str | None = None


class Till:
    """Payments, for one order. `loses` says whether the next answer of the bank is lost."""

    def __init__(self, bank: TheBank) -> None:
        self.bank = bank
        self.attempts: dict[int, Attempt] = {}
        self.operations: dict[int, dict[tuple[str, str], Operation]] = {}
        self.loses = False

    def reach(self, goal: Goal, attempt: int, opening: Attempt | None = None) -> PaymentRecord | ServiceError:
        if attempt not in self.attempts:
            if opening is None:
                return AttemptNotFound(order_id=ORDER_ID, attempt=attempt)
            if opening.status == "pending" and any(self._is_live(other) for other in self.attempts.values()):
                return AnotherPaymentLive(order_id=ORDER_ID)
            self.attempts[attempt] = opening
            self.operations[attempt] = {}
        for _ in range(4):
            known = self.operations[attempt]
            ask = payment_rules.next_step(goal, self.attempts[attempt], known.values())
            if ask is None:
                return self._record(attempt)
            if isinstance(ask, ServiceError):
                return ask
            operation = known.setdefault(
                (ask.kind, ask.reference), Operation(ask.kind, ask.reference, ask.amount_minor)
            )
            if not self._ask(attempt, ask, operation):
                break
        return OutcomePending(operation=goal.kind, order_id=ORDER_ID)

    def _ask(self, attempt: int, ask: Ask, operation: Operation) -> bool:
        """False where the bank's answer is lost."""
        payment = self.attempts[attempt]
        key = payment_rules.key_of(payment.id, ask.kind, ask.reference)
        outcome = self.bank.ask(key, ask, payment.method, payment.charge_id)
        if self.loses:
            self.loses = False
            operation.status = "unknown"
            return False
        self.attempts[attempt] = payment_rules.settle(payment, operation, outcome)
        operation.status = "succeeded" if isinstance(outcome, payment_rules.Succeeded) else "declined"
        operation.code = outcome.code if isinstance(outcome, payment_rules.Declined) else None
        return True

    def _is_live(self, payment: Attempt) -> bool:
        return payment.status not in ("failed", "voided", "refunded")

    def _record(self, attempt: int) -> PaymentRecord:
        payment = self.attempts[attempt]
        return PaymentRecord(
            id=payment.id,
            order_id=ORDER_ID,
            attempt=attempt,
            user_id=1,
            method=payment.method,
            currency=payment.currency,
            amount_minor=payment.amount_minor,
            authorized_minor=payment.authorized_minor,
            captured_minor=payment.captured_minor,
            refunded_minor=payment.refunded_minor,
            status=payment.status,
            code=payment.code,
            created_at=EPOCH,
            updated_at=EPOCH,
            version=payment.version,
        )


# ------------------------------------------------------------------------------------------------------------- drivers

Outcome = Decision | TryAgain
Call = Callable[[], object]
Walk = Generator[Call, object, Outcome]
"""The calls of one step, each answered, and what the step has come to."""


class Driver:
    """Somebody who drives the saga, as it was when they took it. Whoever is not the last is a zombie."""

    def __init__(self, machine: CheckoutMachine) -> None:
        self.machine = machine
        self.begin()

    def begin(self) -> None:
        """The next step, from where the saga is."""
        machine = self.machine
        self.epoch, self.version = machine.epoch, machine.version
        self.walk = WALKS[machine.step](machine, machine.order, machine.state)
        self.calls: list[Call] = []
        self.outcome: Outcome | None = None
        self._send(None)

    def go_on(self, times: int) -> bool:
        """Makes the next call, or saves. False where this driver is at its end."""
        if self.outcome is not None:
            return self.machine.save(self)
        call = self.calls[-1]
        answer: object = None
        for _ in range(times):
            answer = call()
        self._send(answer)
        return True

    def _send(self, answer: object) -> None:
        try:
            self.calls.append(self.walk.send(answer))
        except StopIteration as end:
            self.outcome = end.value


def _reserve(machine: CheckoutMachine, order: Order, state: Checkout) -> Walk:
    final = state.paying or state.on_account
    held = yield lambda: machine.shelf.reserve(machine.quantity, for_payment=final)
    assert isinstance(held, Reservation | ServiceError)
    decision = steps.after_reserve(order, state, held, WINDOW_S)
    if decision is not None:
        return decision
    goal, opening = Goal("authorize"), machine.opening(state, "pending")
    authorized = yield lambda: machine.till.reach(goal, state.attempt, opening)
    assert isinstance(authorized, PaymentRecord | ServiceError)
    return steps.after_authorize(order, state, authorized, WINDOW_S)


def _settle(machine: CheckoutMachine, order: Order, state: Checkout) -> Walk:
    sold = yield machine.shelf.commit
    assert isinstance(sold, Reservation | ServiceError)
    decision = steps.after_commit(order, state, sold)
    if decision is not None:
        return decision
    captured = yield lambda: machine.till.reach(Goal("capture"), state.attempt)
    assert isinstance(captured, PaymentRecord | ServiceError)
    return steps.after_capture(order, state, captured)


def _awaiting(_machine: CheckoutMachine, order: Order, state: Checkout) -> Walk:
    yield lambda: None
    return steps.after_waiting(order, state)


def _unwind(machine: CheckoutMachine, order: Order, state: Checkout) -> Walk:
    payment: PaymentRecord | None = None
    if state.attempt:
        voided = yield lambda: machine.till.reach(Goal("void"), state.attempt, machine.opening(state, "voided"))
        if not isinstance(voided, PaymentRecord):
            return TryAgain("void")
        payment = voided
        if left := voided.captured_minor - voided.refunded_minor:
            refunded = yield lambda: machine.till.reach(Goal("refund", "cancel", left), state.attempt)
            if not isinstance(refunded, PaymentRecord):
                return TryAgain("refund")
            payment = refunded
    released = yield machine.shelf.release
    assert isinstance(released, Reservation)
    if released.state == "committed":
        back = yield lambda: machine.shelf.restock(machine.quantity, "cancel")
        if isinstance(back, ServiceError):
            return TryAgain("restock")
    return steps.after_unwind(order, state, payment)


WALKS: Final[Mapping[Step, Callable[[CheckoutMachine, Order, Checkout], Walk]]] = {
    "reserve": _reserve,
    "settle": _settle,
    "awaiting": _awaiting,
    "unwind": _unwind,
}
"""As `checkout.py` has them, for one order."""


# ------------------------------------------------------------------------------------------------------------- machine


class CheckoutMachine(RuleBasedStateMachine):
    """One order, its saga, and everybody who has to do with it."""

    @initialize(
        on_hand=st.sampled_from([2, 5]), method=st.none() | st.sampled_from(METHODS), quantity=st.integers(1, 3)
    )
    def place(self, on_hand: int, method: str | None, quantity: int) -> None:
        self.on_hand, self.quantity = on_hand, quantity
        self.shelf, self.bank = Shelf(on_hand), TheBank()
        self.till = Till(self.bank)
        self.order = new_order(quantity)
        self.state = Checkout()
        if method is not None:
            self.state = Checkout(paying=True, method=method, attempt=1, with_order=True)
        self.step: Step = "reserve"
        self.epoch, self.version = 1, 1
        self.drivers: list[Driver] = [Driver(self)]

    # ------------------------------------------------------------------------------------------------------- drivers

    @rule(calls=st.integers(1, 6), times=st.sampled_from([1, 1, 1, 2]), loses=st.booleans())
    def go_on(self, calls: int, times: int, loses: bool) -> None:
        """Whoever came last makes its next calls, perhaps twice, or saves; the last answer may be lost."""
        self._last_goes_on(calls - 1, times)
        if self.drivers:
            self._go_on(self.drivers[-1], times, loses=loses)

    @precondition(lambda self: len(self.drivers) > 1)
    @rule(data=st.data(), times=st.sampled_from([1, 2]))
    def go_on_late(self, data: st.DataObject, times: int) -> None:
        """Any driver goes on, however late it is."""
        self._go_on(data.draw(st.sampled_from(self.drivers)), times, loses=False)

    def _last_goes_on(self, calls: int, times: int = 1) -> None:
        for _ in range(calls):
            if self.drivers:
                self._go_on(self.drivers[-1], times, loses=False)

    def _go_on(self, driver: Driver, times: int, *, loses: bool) -> None:
        self.till.loses = loses
        if not driver.go_on(times):
            self.drivers.remove(driver)
        self.till.loses = False

    @precondition(lambda self: self.step not in RESTING)
    @rule(meanwhile=CALLS, dies=st.booleans())
    def take_over(self, meanwhile: int, dies: bool) -> None:
        """A lease has run out; who had it is dead, or is not."""
        self._last_goes_on(meanwhile)
        if self.step in RESTING:
            return
        if dies and self.drivers:
            self.drivers.pop()
        self.epoch += 1
        self.drivers.append(Driver(self))

    @precondition(lambda self: self.step == "awaiting")
    @rule()
    def wake(self) -> None:
        """The time that the order waits for its payment is over."""
        self.epoch += 1
        self.drivers.append(Driver(self))

    def save(self, driver: Driver) -> bool:
        """What a step has come to, unless its driver has lost the saga. Gives whether it drives on."""
        outcome = driver.outcome
        assert outcome is not None
        if (driver.epoch, driver.version) != (self.epoch, self.version):
            return False
        self.version += 1
        if isinstance(outcome, TryAgain):
            return False
        self._move(outcome)
        if outcome.running:
            driver.begin()
        return outcome.running

    def _move(self, decision: Decision) -> None:
        rules.assert_declared(self.order, decision.status, decision.payment, None)
        self.order = msgspec.structs.replace(
            self.order,
            status=decision.status or self.order.status,
            payment=decision.payment or self.order.payment,
            refunded_minor=self.order.refunded_minor + decision.refunded_minor,
            reason=decision.reason or self.order.reason,
        )
        self.step, self.state = decision.step, decision.state

    def opening(self, state: Checkout, status: PaymentStatus) -> Attempt:
        assert state.method is not None
        return Attempt(state.attempt, state.method, self.order.total_minor, status)

    # -------------------------------------------------------------------------------------------------------- people

    def redirect(self, decision: Decision) -> None:
        self.epoch += 1
        self.version += 1
        self._move(decision)
        self.drivers.append(Driver(self))

    @precondition(lambda self: self.step in ("awaiting", "done") and self.order.payment == "unpaid")
    @precondition(lambda self: self.order.status != "cancelled")
    @rule(method=st.sampled_from(METHODS), capture=st.booleans(), then=CALLS)
    def pay(self, method: str, capture: bool, then: int) -> None:
        paying = msgspec.structs.replace(
            self.state, paying=True, method=method, attempt=self.state.attempt + 1, capture=capture, with_order=False
        )
        self.redirect(Decision("reserve", "payment asked for", paying, running=True))
        self._last_goes_on(then)

    @precondition(lambda self: "cancelled" in rules.legal_moves(self.order, "status"))
    @rule(meanwhile=CALLS)
    def cancel(self, meanwhile: int) -> None:
        self._last_goes_on(meanwhile)
        if "cancelled" in rules.legal_moves(self.order, "status"):
            self.redirect(steps.cancelled_by(self.order, self.state, "no more"))

    @precondition(lambda self: self.step == "awaiting" and self.order.status == "pending")
    @rule()
    def confirm_on_account(self) -> None:
        state = msgspec.structs.replace(self.state, on_account=True, confirmed_by=9)
        self.redirect(Decision("reserve", "confirmed by hand", state, running=True))

    @precondition(lambda self: self.step == "authorized")
    @rule()
    def capture(self) -> None:
        state = msgspec.structs.replace(self.state, capture=True)
        self.redirect(Decision("settle", "capture asked for", state, running=True))

    @precondition(lambda self: self.step in ("done", "awaiting", "authorized"))
    @precondition(lambda self: "completed" in rules.legal_moves(self.order, "status"))
    @rule()
    def complete(self) -> None:
        """Staff close it; it may be paid later all the same."""
        self.order = msgspec.structs.replace(self.order, status="completed")

    @rule(pieces=st.integers(1, 3))
    def goods_arrive(self, pieces: int) -> None:
        """There may be enough again when somebody asks late who was told that there is not."""
        self.shelf.receive(pieces)
        self.on_hand += pieces

    @rule(meanwhile=CALLS, is_seen=st.booleans())
    def hold_runs_out(self, meanwhile: int, is_seen: bool) -> None:
        """Seen by inventory itself, or only by whoever asks next."""
        self._last_goes_on(meanwhile)
        self.shelf.let_time_pass()
        if is_seen:
            self.shelf.expire()

    # ---------------------------------------------------------------------------------------------------- invariants

    @invariant()
    def no_card_is_charged_twice(self) -> None:
        assert self.bank.captures <= 1
        assert self.bank.open_charges <= 1
        assert 0 <= self.bank.net_minor <= self.order.total_minor

    @invariant()
    def stock_is_neither_lost_nor_invented(self) -> None:
        level = self.shelf.level
        lines = self.shelf.reservation.lines if self.shelf.reservation else ()
        sold = sum(line.quantity - line.returned for line in lines) if self.shelf.state == "committed" else 0
        held = sum(line.quantity for line in lines) if self.shelf.state == "held" else 0
        assert (level.on_hand, level.reserved) == (self.on_hand - sold, held)

    @invariant()
    def stock_is_not_lost_while_somebody_pays(self) -> None:
        assert self.order.reason is None or self.order.reason.code != "stock_lost"

    @invariant()
    def what_the_order_says_of_money_the_bank_says_too(self) -> None:
        if self.order.payment == "paid" and self.order.status in ("confirmed", "completed"):
            assert self.bank.net_minor == self.order.total_minor
        if self.order.payment in ("unpaid", "failed") and self.step in RESTING:
            assert (self.bank.net_minor, self.bank.open_charges) == (0, 0)

    @invariant()
    def what_is_at_rest_is_whole(self) -> None:
        if self.step in RESTING:
            self.assert_whole()

    def assert_whole(self) -> None:
        """Of an order for which nothing is under way, whoever may still call late."""
        order, level, bank = self.order, self.shelf.level, self.bank
        match order.status:
            case "cancelled":
                assert (bank.net_minor, bank.open_charges) == (0, 0)
                assert (level.on_hand, level.reserved) == (self.on_hand, 0)
                assert order.reason is not None
                assert order.refunded_minor == (order.total_minor if order.payment == "refunded" else 0)
                assert order.payment in ("unpaid", "failed", "voided", "refunded")
            case "confirmed" | "completed":
                assert self.shelf.state == "committed"
                assert level.on_hand == self.on_hand - self.quantity
                assert bank.open_charges == (self.step == "authorized")
                assert bank.net_minor == (order.total_minor if order.payment == "paid" else 0)
                assert order.payment == ("authorized" if self.step == "authorized" else order.payment)
            case _:
                assert (order.status, self.step) == ("pending", "awaiting")
                assert self.shelf.state in ("held", "expired")
                assert (bank.net_minor, bank.open_charges) == (0, 0)

    def teardown(self) -> None:
        """When faults stop, the order comes to rest; and those who call late then change nothing any more."""
        if not hasattr(self, "order"):
            return
        zombies = self.drivers
        self.drivers = []
        self.epoch += 1
        self._come_to_rest()
        self.assert_whole()
        before = (self.order, self.shelf.level, self.bank.net_minor, self.bank.open_charges)
        for zombie in zombies:
            while zombie.go_on(1):
                pass
        assert (self.order, self.shelf.level, self.bank.net_minor, self.bank.open_charges) == before

    def _come_to_rest(self) -> None:
        for _ in range(TRIES):
            if self.step in RESTING:
                return
            self.epoch += 1
            driver = Driver(self)
            while driver.go_on(1):
                pass
        raise AssertionError(f"it does not come to rest: {self.step}, {self.order.status}, {self.order.payment}")


def new_order(quantity: int) -> Order:
    total = quantity * PRICE_MINOR
    line = OrderLine(
        product_id=PRODUCT_ID,
        sku="SKU-7",
        name="Thing 7",
        quantity=quantity,
        unit_price_minor=PRICE_MINOR,
        line_total_minor=total,
    )
    return Order(
        id=ORDER_ID,
        user_id=1,
        status="pending",
        payment="unpaid",
        fulfilment="unfulfilled",
        currency="USD",
        total_minor=total,
        lines=(line,),
        created_at=EPOCH,
        updated_at=EPOCH,
        version=1,
    )


TestCheckout = CheckoutMachine.TestCase
TestCheckout.settings = settings(
    max_examples=120,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


# ------------------------------------------------------------------------------------------------------ by themselves


def placed(method: str | None) -> CheckoutMachine:
    """An order of one of five pieces, whose driver has not begun."""
    machine = CheckoutMachine()
    machine.place(on_hand=5, method=method, quantity=1)
    return machine


def assert_at(machine: CheckoutMachine, step: Step, status: str, payment: str) -> None:
    assert (machine.step, machine.order.status, machine.order.payment) == (step, status, payment)
    machine.no_card_is_charged_twice()
    machine.stock_is_neither_lost_nor_invented()
    machine.what_the_order_says_of_money_the_bank_says_too()
    machine.what_is_at_rest_is_whole()


def test_what_was_confirmed_on_account_is_paid_later():
    machine = placed(None)
    machine.go_on(calls=2, times=1, loses=False)
    assert_at(machine, "awaiting", "pending", "unpaid")
    machine.confirm_on_account()
    machine.go_on(calls=6, times=1, loses=False)
    assert_at(machine, "done", "confirmed", "unpaid")

    machine.pay(method="sandbox:ok", capture=True, then=6)

    assert_at(machine, "done", "confirmed", "paid")


@pytest.mark.parametrize("calls", [2, 5])
def test_a_lost_answer_is_asked_for_again_with_the_same_key(calls: int):
    """That of the authorization, and that of the capture."""
    machine = placed("sandbox:ok")
    machine.go_on(calls=calls, times=1, loses=True)
    machine.go_on(calls=1, times=1, loses=False)  # it saves that it does not know
    assert machine.drivers == []

    machine.take_over(meanwhile=0, dies=False)
    machine.go_on(calls=6, times=1, loses=False)

    assert_at(machine, "done", "confirmed", "paid")
    assert machine.bank.captures == 1
    assert len(machine.bank.charges) == 1


@pytest.mark.parametrize("calls", range(1, 5))
def test_a_hold_does_not_run_out_while_somebody_pays(calls: int):
    machine = placed("sandbox:ok")
    machine.hold_runs_out(meanwhile=calls, is_seen=True)
    machine.go_on(calls=6, times=1, loses=False)

    assert_at(machine, "done", "confirmed", "paid")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("calls", range(8))
def test_a_cancel_at_any_moment_leaves_nothing_whoever_calls_late(calls: int, method: str):
    machine = placed(method)
    late = machine.drivers[0]
    machine.cancel(meanwhile=calls)
    machine.go_on(calls=6, times=2, loses=False)
    assert machine.order.status == "cancelled"
    machine.assert_whole()

    while late in machine.drivers and late.go_on(1):
        pass

    machine.assert_whole()


def test_who_asks_late_for_an_order_that_was_out_of_stock_holds_and_charges_nothing():
    machine = CheckoutMachine()
    machine.place(on_hand=2, method="sandbox:ok", quantity=3)
    late = machine.drivers[0]
    machine.take_over(meanwhile=0, dies=False)
    while machine.step not in RESTING:
        machine.go_on(calls=1, times=1, loses=False)
    assert machine.order.reason is not None
    assert machine.order.reason.code == "out_of_stock"
    machine.goods_arrive(pieces=3)

    while late.go_on(1):
        pass

    machine.assert_whole()


@pytest.mark.parametrize("status", ["confirmed", "completed"])
def test_a_declined_payment_of_what_was_sold_on_account_changes_nothing(status: str):
    machine = placed(None)
    machine.go_on(calls=2, times=1, loses=False)
    machine.confirm_on_account()
    machine.go_on(calls=6, times=1, loses=False)
    if status == "completed":
        machine.complete()

    machine.pay(method="sandbox:declined", capture=True, then=6)

    assert_at(machine, "done", status, "unpaid")


def test_what_a_checkout_remembers_comes_back_as_it_was():
    for state in (Checkout(), Checkout(paying=True, method="sandbox:ok", attempt=3, capture=False, confirmed_by=9)):
        assert msgspec.json.decode(steps.encoded(state), type=Checkout) == state
