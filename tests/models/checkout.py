"""The decisions of checkout, against the rules of inventory, payments and the bank, in every order of events.

One order and its saga. Drivers take the saga over from each other and die; fenced drivers go on and call late; calls
are made twice, requests and answers are lost, lost requests arrive late; meanwhile clients pay, cancel, confirm,
capture and refund, or the hold ends. Everything is pure: what a service does, its own rules do.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Final, Literal, TypeVar

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mercato.chassis.contract import Actor, ServiceError
from mercato.contracts.inventory import (
    AnotherOrder as StockOfAnotherOrder,
    Level,
    Reservation,
    ReserveStock,
    ReturnStock,
    StockLine,
)
from mercato.contracts.orders import Order, OrderLine, ReturnLine
from mercato.contracts.payments import (
    AnotherOrder as PaymentOfAnotherOrder,
    AnotherPaymentLive,
    AttemptNotFound,
    OperationKind,
    OperationStatus,
    OutcomePending,
    Payment as PaymentRecord,
    RefundDeclined,
    Status as PaymentStatus,
)
from mercato.services.inventory.rules import ReservedLine, StockLedger, StoredReservation, WriteSet
from mercato.services.orders import rules, steps
from mercato.services.orders.steps import ATTEMPTS_LIMIT, Checkout, Decision, RetryLater, Step
from mercato.services.payments import rules as payment_rules
from mercato.services.payments.rules import NextOperation, Target
from mercato.simulators.bank import rules as bank_rules

A = TypeVar("A")

EPOCH: Final = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
ORDER_ID: Final = 1001
NONCE: Final = 0x5EED
ANOTHER_NONCE: Final = 0xC0FFEE
"""Of an order with the same id that a restored database has forgotten."""
PRODUCT_ID: Final = 7
PRICE_MINOR: Final = 500
SHOP: Final = Actor("service")
WINDOW_S: Final = 900.0
HOLD_S: Final = 600.0
METHODS: Final = ("sandbox:ok", "sandbox:declined", "sandbox:capture_expired")
FINISHED: Final = "finished"
"""Where a checkout is that has no saga any more."""
RESTING: Final = ("awaiting", "authorized", FINISHED)
TRIES: Final = 60
"""More steps than a checkout takes from anywhere to its end."""

Loss = Literal["request", "answer"]
"""What of a call to the provider is lost on its way."""
LOSSES: Final[tuple[Loss, ...]] = ("request", "answer")

Progress = int | Loss
"""What the newest driver does meanwhile: so many calls and saves, or all until a call of the provider is lost."""
PROGRESS: Final = st.integers(0, 7) | st.sampled_from(LOSSES)


# ------------------------------------------------------------------------------------------------------------ inventory


class InventoryModel:
    """Inventory, for one order of one product."""

    def __init__(self, on_hand: int) -> None:
        self.level = Level(
            product_id=PRODUCT_ID, on_hand=on_hand, reserved=0, available=on_hand, updated_at=EPOCH, version=1
        )
        self.reservation: StoredReservation | None = None
        self.returned: dict[str, tuple[StockLine, ...]] = {}

    def reserve(self, quantity: int, *, for_payment: bool) -> Reservation | ServiceError:
        request = ReserveStock(
            order_id=ORDER_ID,
            order_nonce=NONCE,
            lines=(StockLine(product_id=PRODUCT_ID, quantity=quantity),),
            for_payment=for_payment,
            idempotency_key="reserve",
        )
        if self.reservation is not None:
            return self._execute(lambda ledger: ledger.reserve(request))
        inserted = held(quantity, NONCE, None if for_payment else HOLD_S)
        ledger = StockLedger([self.level], (), (inserted,))
        answer = ledger.reserve(request)
        written = ledger.write_set()
        self.reservation = None if ORDER_ID in written.refused else inserted
        self._write(written)
        return answer

    def commit(self) -> Reservation | ServiceError:
        return self._execute(lambda ledger: ledger.commit(ORDER_ID, NONCE))

    def release(self) -> Reservation | ServiceError:
        if self.reservation is None:
            self.reservation = StoredReservation(ORDER_ID, NONCE, "released", 1, None)  # a tombstone
        return self._execute(lambda ledger: ledger.release(ORDER_ID, NONCE))

    def return_items(self, quantity: int, reference: str) -> Reservation | ServiceError:
        request = ReturnStock(
            order_id=ORDER_ID,
            order_nonce=NONCE,
            lines=(StockLine(product_id=PRODUCT_ID, quantity=quantity),),
            reference=reference,
            idempotency_key="return",
        )
        done = self.returned.get(reference)
        answer = self._execute(lambda ledger: ledger.return_items(request, SHOP, done))
        if isinstance(answer, Reservation):
            self.returned[reference] = request.lines
        return answer

    def receive(self, quantity: int) -> None:
        """Pieces of others come back, or new ones are delivered."""
        on_hand = self.level.on_hand + quantity
        self.level = msgspec.structs.replace(self.level, on_hand=on_hand, available=on_hand - self.level.reserved)

    def let_time_pass(self) -> None:
        """Past the end of a hold. The next transaction about the order, or the expiry, ends it."""
        if self.reservation and self.reservation.expires_in_s is not None:
            self.reservation = msgspec.structs.replace(self.reservation, expires_in_s=-1.0)

    def expire(self) -> None:
        if self.reservation and self.reservation.is_overdue:
            self._execute(lambda ledger: ledger.expire(ORDER_ID))

    @property
    def state(self) -> str | None:
        return self.reservation.state if self.reservation else None

    def _execute(self, work: Callable[[StockLedger], A]) -> A:
        ledger = StockLedger([self.level], (self.reservation,) if self.reservation else ())
        answer = work(ledger)
        self._write(ledger.write_set())
        return answer

    def _write(self, written: WriteSet) -> None:
        for change in written.changes:
            reservation = self.reservation
            assert reservation is not None
            assert reservation.version == change.version_before
            lines = reservation.lines
            if change.returned:
                pairs = zip(lines, change.returned, strict=True)
                lines = tuple(msgspec.structs.replace(line, returned=returned) for line, returned in pairs)
            self.reservation = msgspec.structs.replace(
                reservation, state=change.state, version=change.version, expires_in_s=None, lines=lines
            )
        for delta in written.deltas:
            on_hand, reserved = self.level.on_hand + delta.on_hand, self.level.reserved + delta.reserved
            self.level = msgspec.structs.replace(
                self.level, on_hand=on_hand, reserved=reserved, available=on_hand - reserved
            )


def held(quantity: int, nonce: int, expires_in_s: float | None) -> StoredReservation:
    return StoredReservation(ORDER_ID, nonce, "held", 1, expires_in_s, (ReservedLine(PRODUCT_ID, quantity),))


# ------------------------------------------------------------------------------------------------- the bank, payments


class BankCharge(msgspec.Struct, frozen=True):
    id: int
    method: str
    authorized_minor: int
    order_id: int = ORDER_ID
    currency: str = "USD"
    captured_minor: int = 0
    refunded_minor: int = 0
    state: bank_rules.State = "open"


Result = payment_rules.Succeeded | payment_rules.Declined


class BankModel:
    """The bank, by its own rules: an operation is done once for each key."""

    def __init__(self) -> None:
        self.charges: dict[int, BankCharge] = {}
        self.results: dict[str, Result] = {}
        self.captures = 0
        self.requests = 0
        self.declines_refunds = False

    def execute(self, key: str, operation: NextOperation, method: str, charge_id: int | None) -> Result:
        self.requests += 1
        if key not in self.results:
            self.results[key] = self._execute(operation, method, charge_id)
        return self.results[key]

    def _execute(self, operation: NextOperation, method: str, charge_id: int | None) -> Result:
        number = len(self.results) + 1
        if operation.kind in bank_rules.OPENING:
            return self._open(number, operation, method)
        assert charge_id is not None, "payments never asks for a charge that it does not know"
        if operation.kind == "refund" and self.declines_refunds:
            return payment_rules.Declined("account_closed")
        self.charges[charge_id], code = bank_rules.carry_out(
            self.charges[charge_id], operation.kind, operation.amount_minor
        )
        if code is not None:
            return payment_rules.Declined(code)
        self.captures += operation.kind == "capture"
        return payment_rules.Succeeded(number, charge_id)

    def _open(self, number: int, operation: NextOperation, method: str) -> Result:
        if code := bank_rules.DECLINED[operation.kind].get(method):
            return payment_rules.Declined(code)
        charge = BankCharge(number, method, operation.amount_minor)
        if operation.kind == "charge":
            charge = msgspec.structs.replace(charge, captured_minor=operation.amount_minor, state="captured")
            self.captures += 1
        self.charges[number] = charge
        return payment_rules.Succeeded(number, number)

    @property
    def net_minor(self) -> int:
        return sum(charge.captured_minor - charge.refunded_minor for charge in self.charges.values())

    @property
    def open_charges(self) -> int:
        return sum(charge.state == "open" for charge in self.charges.values())


class PaymentModel(msgspec.Struct, frozen=True):
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


class OperationModel(msgspec.Struct):
    kind: OperationKind
    reference: str
    amount_minor: int
    status: OperationStatus = "intent"
    code: str | None = None


class PaymentsModel:
    """Payments, for one order. `loss` says what of the next call to the bank is lost."""

    def __init__(self, bank: BankModel, nonce: int = NONCE) -> None:
        self.bank = bank
        self.nonce = nonce
        self.payments: dict[int, PaymentModel] = {}
        self.operations: dict[int, dict[tuple[str, str], OperationModel]] = {}
        self.loss: Loss | None = None
        self.late: list[Callable[[], object]] = []
        """Requests to the bank that are still on their way."""

    def execute(
        self, target: Target, attempt: int, opening: PaymentModel | None = None
    ) -> PaymentRecord | ServiceError:
        if self.nonce != NONCE:
            return PaymentOfAnotherOrder(order_id=ORDER_ID)
        if attempt not in self.payments:
            if opening is None:
                return AttemptNotFound(order_id=ORDER_ID, attempt=attempt)
            if opening.status == "pending" and any(_is_live(other) for other in self.payments.values()):
                return AnotherPaymentLive(order_id=ORDER_ID)
            self.payments[attempt], self.operations[attempt] = opening, {}
        for _ in range(4):
            known = self.operations[attempt]
            following = payment_rules.next_operation(target, self.payments[attempt], known.values())
            if following is None:
                return self._record(attempt)
            if isinstance(following, ServiceError):
                return following
            if self.payments[attempt].amount_minor == 0:
                settled = payment_rules.after_result(self.payments[attempt], following, payment_rules.NOT_ASKED)
                self.payments[attempt] = settled
                continue
            operation = known.setdefault(
                (following.kind, following.reference),
                OperationModel(following.kind, following.reference, following.amount_minor),
            )
            if not self._call(attempt, following, operation):
                break
        return OutcomePending(operation=target.kind, order_id=ORDER_ID)

    def sweep(self) -> None:
        """Calls again for what has no result yet."""
        for attempt, operations in self.operations.items():
            for operation in operations.values():
                if operation.status in payment_rules.OPEN:
                    again = NextOperation(operation.kind, operation.reference, operation.amount_minor)
                    self._call(attempt, again, operation)

    def deliver_late(self) -> None:
        """Requests that were lost arrive at the bank after all; their answers do not come back."""
        for arrive in self.late:
            arrive()
        self.late.clear()

    def _call(self, attempt: int, following: NextOperation, operation: OperationModel) -> bool:
        """False where the request or the answer is lost."""
        payment = self.payments[attempt]
        key = payment_rules.key_of(ORDER_ID, NONCE, attempt, following.kind, following.reference)
        loss, self.loss = self.loss, None
        if loss is not None:
            operation.status = "unknown"
        if loss == "request":
            self.late.append(lambda: self.bank.execute(key, following, payment.method, payment.charge_id))
            return False
        result = self.bank.execute(key, following, payment.method, payment.charge_id)
        if loss == "answer":
            return False
        self.payments[attempt] = payment_rules.after_result(payment, operation, result)
        operation.status = "succeeded" if isinstance(result, payment_rules.Succeeded) else "declined"
        operation.code = result.code if isinstance(result, payment_rules.Declined) else None
        return True

    def _record(self, attempt: int) -> PaymentRecord:
        payment = self.payments[attempt]
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


def _is_live(payment: PaymentModel) -> bool:
    return payment.status not in ("failed", "voided", "refunded")


# ------------------------------------------------------------------------------------------------------------- drivers

Call = Callable[[], object]
StepRun = Generator[Call, object, Decision | RetryLater]
"""The calls of one step, each sent its answer; returns the outcome of the step."""


class SagaModel(msgspec.Struct, frozen=True):
    """A saga as its row has it."""

    step: Step
    state: Checkout
    epoch: int
    version: int = 1


class Driver:
    """A process with a saga, as both were when it took the saga over. All but the newest are fenced."""

    def __init__(self, machine: CheckoutMachine) -> None:
        self.machine = machine
        self.begin()

    def begin(self) -> None:
        """Begins the step at which the saga is."""
        saga = self.machine.saga
        assert saga is not None, "a finished saga has no driver"
        self.epoch, self.version = saga.epoch, saga.version
        self.run = RUNS[saga.step](self.machine, self.machine.order, saga.state)
        self.outcome: Decision | RetryLater | None = None
        self._send(None)

    def go_on(self, times: int = 1) -> bool:
        """Makes the next call, so many times, or saves. False where this driver has no more to do.

        A save that is made twice is one whose answer was lost.
        """
        if self.outcome is None:
            answers = [self.call() for _ in range(times)]
            self._send(answers[-1])
            return True
        is_running = self.machine.save(self, self.outcome)
        if times > 1:
            assert not self.machine.save(self, self.outcome)
            return False
        if is_running:
            self.begin()
        return is_running

    def _send(self, answer: object) -> None:
        try:
            self.call = self.run.send(answer)
        except StopIteration as end:
            self.outcome = end.value


def _reserve(machine: CheckoutMachine, order: Order, state: Checkout) -> StepRun:
    reserved = yield lambda: machine.inventory.reserve(machine.quantity, for_payment=steps.is_final(order, state))
    assert isinstance(reserved, Reservation | ServiceError)
    decision = steps.after_reserve(order, state, reserved, WINDOW_S)
    if decision is None and state.paying:
        target = Target("charge" if state.capture else "authorize")
        made = yield lambda: machine.payments.execute(target, state.attempt, opening(order, state, "pending"))
        assert isinstance(made, PaymentRecord | ServiceError)
        if not state.capture:
            return steps.after_authorize(order, state, made, WINDOW_S)
        decision = steps.after_charge(order, state, made, WINDOW_S)
    if decision is not None:
        return decision
    sold = yield machine.inventory.commit
    assert isinstance(sold, Reservation | ServiceError)
    decision = steps.after_commit(order, state, sold)
    assert decision is not None, "only an authorized order still has to be captured"
    return decision


def _settle(machine: CheckoutMachine, order: Order, state: Checkout) -> StepRun:
    sold = yield machine.inventory.commit
    assert isinstance(sold, Reservation | ServiceError)
    decision = steps.after_commit(order, state, sold)
    if decision is not None:
        return decision
    target = Target("capture", amount_minor=state.capture_minor or 0)
    captured = yield lambda: machine.payments.execute(target, state.attempt)
    assert isinstance(captured, PaymentRecord | ServiceError)
    return steps.after_capture(order, state, captured)


def _awaiting(_machine: CheckoutMachine, _order: Order, state: Checkout) -> StepRun:
    yield lambda: None
    return steps.after_awaiting(state)


def _unwind(machine: CheckoutMachine, order: Order, state: Checkout) -> StepRun:
    payment: PaymentRecord | None = None
    is_kept = False
    if order.payment not in rules.REFUNDABLE and state.method is not None:
        tombstone = opening(order, state, "voided")
        voided = yield lambda: machine.payments.execute(Target("void"), state.attempt, tombstone)
        if isinstance(voided, PaymentRecord):
            payment = voided
        elif not isinstance(voided, PaymentOfAnotherOrder):
            return RetryLater("void")
    if left_minor := _minor_to_refund(order, payment):
        target = Target("refund", "cancel", left_minor)
        refunded = yield lambda: machine.payments.execute(target, state.attempt)
        if isinstance(refunded, PaymentRecord):
            payment = refunded
        elif isinstance(refunded, RefundDeclined):
            is_kept = True
        else:
            return RetryLater("refund")
    released = yield machine.inventory.release
    if isinstance(released, Reservation):
        if released.state == "committed":
            back = yield lambda: machine.inventory.return_items(machine.quantity - machine.returned, "cancel")
            if isinstance(back, ServiceError):
                return RetryLater("restock")
    elif not isinstance(released, StockOfAnotherOrder):
        return RetryLater("release")
    return steps.after_unwind(order, state, payment, is_kept=is_kept)


def _minor_to_refund(order: Order, payment: PaymentRecord | None) -> int:
    if order.payment in rules.REFUNDABLE:
        return rules.payable_minor(order) - order.refunded_minor
    return payment.captured_minor - payment.refunded_minor if payment else 0


def opening(order: Order, state: Checkout, status: PaymentStatus) -> PaymentModel:
    assert state.method is not None
    return PaymentModel(state.attempt, state.method, rules.payable_minor(order), status)


RUNS: Final[Mapping[Step, Callable[[CheckoutMachine, Order, Checkout], StepRun]]] = {
    "reserve": _reserve,
    "settle": _settle,
    "awaiting": _awaiting,
    "unwind": _unwind,
}
"""The steps as `checkout.py` has them, for one order."""


# ------------------------------------------------------------------------------------------------------------- machine


class CheckoutMachine(RuleBasedStateMachine):
    """One order, its saga while there is one, its drivers, its clients, and the services that are asked."""

    @initialize(
        on_hand=st.sampled_from([2, 5]),
        method=st.sampled_from([*METHODS, "sandbox:ok", None]),
        quantity=st.sampled_from([1, 2, 3]),
        price_minor=st.sampled_from([PRICE_MINOR, PRICE_MINOR, PRICE_MINOR, 0]),
    )
    def place(self, on_hand: int, method: str | None, quantity: int, price_minor: int = PRICE_MINOR) -> None:
        self.on_hand, self.quantity = on_hand, quantity
        self.inventory, self.bank = InventoryModel(on_hand), BankModel()
        self.payments = PaymentsModel(self.bank)
        self.order = new_order(quantity, price_minor)
        self.payment_attempt = 0 if method is None else 1
        self.on_account = False
        self.epochs: Iterator[int] = iter(range(1, 10_000))
        state = Checkout() if method is None else Checkout(paying=True, method=method, attempt=1)
        self.saga: SagaModel | None = SagaModel("reserve", state, next(self.epochs))
        self.drivers: list[Driver] = [Driver(self)]

    @property
    def returned(self) -> int:
        return self.order.lines[0].returned

    @property
    def step(self) -> str:
        return self.saga.step if self.saga else FINISHED

    # ------------------------------------------------------------------------------------------------------- drivers

    @rule(calls=st.integers(1, 7), times=st.sampled_from([1, 1, 1, 2]))
    def go_on(self, calls: int, times: int = 1) -> None:
        """The newest driver makes its next calls, perhaps twice, or saves."""
        self._newest_goes_on(calls, times)

    @precondition(lambda self: len(self.drivers) > 1)
    @rule(data=st.data(), times=st.sampled_from([1, 2]))
    def go_on_late(self, data: st.DataObject, times: int) -> None:
        """Any driver goes on, however late it is."""
        self._go_on(data.draw(st.sampled_from(self.drivers)), times)

    def lose(self, loss: Loss) -> None:
        """The newest driver goes on until its next call of the provider, which is lost."""
        self.payments.loss = loss
        while self.payments.loss and self.drivers:
            self._newest_goes_on(1)
        self.payments.loss = None

    def _meanwhile(self, progress: Progress) -> None:
        if isinstance(progress, int):
            self._newest_goes_on(progress)
        else:
            self.lose(progress)

    def _newest_goes_on(self, calls: int, times: int = 1) -> None:
        for _ in range(calls):
            if self.drivers:
                self._go_on(self.drivers[-1], times)

    def _go_on(self, driver: Driver, times: int) -> None:
        if not driver.go_on(times):
            self.drivers.remove(driver)

    @precondition(lambda self: self.step not in RESTING)
    @rule(meanwhile=PROGRESS, dies=st.booleans())
    def take_over(self, meanwhile: Progress = 0, dies: bool = False) -> None:
        """The lease of a driver ends, though it may be alive; or the time of the next try has come."""
        self._meanwhile(meanwhile)
        if self.step in RESTING:
            return
        if dies and self.drivers:
            self.drivers.pop()
        self._fence()

    @precondition(lambda self: self.step == "awaiting")
    @rule()
    def wake(self) -> None:
        """The time that the order waits for its payment is over."""
        self._fence()

    def _fence(self) -> None:
        """Another driver takes the saga over."""
        assert self.saga is not None
        self.saga = msgspec.structs.replace(self.saga, epoch=next(self.epochs))
        self.drivers.append(Driver(self))

    def save(self, driver: Driver, outcome: Decision | RetryLater) -> bool:
        """Saves the outcome of a step, unless its driver has lost the saga. Gives whether it drives on."""
        saga = self.saga
        if saga is None or (driver.epoch, driver.version) != (saga.epoch, saga.version):
            return False
        if isinstance(outcome, RetryLater):
            self.saga = msgspec.structs.replace(saga, version=saga.version + 1)
            return False
        self._write(saga, outcome)
        return outcome.running

    def _write(self, saga: SagaModel, decision: Decision) -> None:
        order = self.order
        rules.check_declared(order, decision.status, decision.payment, None)
        self.order = msgspec.structs.replace(
            order,
            status=decision.status or order.status,
            payment=decision.payment or order.payment,
            refunded_minor=order.refunded_minor + decision.refunded_minor,
            reason=decision.reason or order.reason,
            waived_minor=order.waived_minor if decision.waived_minor is None else decision.waived_minor,
        )
        self.on_account |= decision.state.on_account and decision.status == "confirmed"
        assert not (decision.finished and decision.running)
        moved = SagaModel(decision.step, decision.state, saga.epoch, saga.version + 1)
        self.saga = None if decision.finished else moved

    # -------------------------------------------------------------------------------------------------------- clients

    @property
    def state(self) -> Checkout:
        return self.saga.state if self.saga else Checkout(attempt=self.payment_attempt)

    def redirect(self, decision: Decision) -> None:
        """A request fences the driver of the saga, or makes a new saga where the last one is finished."""
        if self.saga is None:
            made = SagaModel(decision.step, decision.state, next(self.epochs))
            self._write(made, decision)
            self.saga = made
        else:
            self.saga = msgspec.structs.replace(self.saga, epoch=next(self.epochs))
            self._write(self.saga, decision)
        self.drivers.append(Driver(self))

    def is_payable(self) -> bool:
        order = self.order
        is_sold_without_stock = order.status != "pending" and not self.on_account
        is_due = rules.due_minor(order) > 0
        return is_due and self.step in ("awaiting", FINISHED) and not is_sold_without_stock

    @precondition(is_payable)
    @rule(method=st.sampled_from(METHODS), capture=st.booleans(), then=PROGRESS)
    def pay(self, method: str, capture: bool = True, then: Progress = 0) -> None:
        self.payment_attempt += 1
        paying = msgspec.structs.replace(
            self.state,
            paying=True,
            method=method,
            attempt=self.payment_attempt,
            capture=capture,
            on_account=self.on_account,
        )
        self.redirect(Decision("reserve", "payment requested", paying, running=True))
        self._meanwhile(then)

    @precondition(is_payable)
    @rule(times=st.integers(2, ATTEMPTS_LIMIT))
    def pay_with_declined_cards(self, times: int) -> None:
        for _ in range(times):
            if self.is_payable():
                self.pay("sandbox:declined", then=7)

    @precondition(lambda self: "cancelled" in rules.legal_moves(self.order, "status"))
    @rule(meanwhile=PROGRESS)
    def cancel(self, meanwhile: Progress = 0) -> None:
        self._meanwhile(meanwhile)
        if "cancelled" in rules.legal_moves(self.order, "status"):
            self.redirect(steps.cancelled_by(self.state, "no more"))

    @precondition(lambda self: self.step == "awaiting" and self.order.status == "pending")
    @rule()
    def confirm_on_account(self) -> None:
        state = msgspec.structs.replace(self.state, on_account=True, confirmed_by=9)
        self.redirect(Decision("reserve", "confirmed by hand", state, running=True))

    @precondition(lambda self: self.step == "authorized")
    @rule(part=st.sampled_from([None, 0.25, 0.5]))
    def capture(self, part: float | None = None) -> None:
        """Staff take what was authorized, or a part of it."""
        capture_minor = None if part is None else int(rules.payable_minor(self.order) * part) or None
        state = msgspec.structs.replace(self.state, capture=True, capture_minor=capture_minor)
        self.redirect(Decision("settle", "capture requested", state, running=True))

    @precondition(lambda self: self.step == FINISHED and self.order.payment in rules.REFUNDABLE)
    @precondition(lambda self: rules.payable_minor(self.order) > self.order.refunded_minor)
    @rule(is_rest=st.booleans())
    def refund(self, is_rest: bool = False) -> None:
        """Staff give back all that is left, or a part of it."""
        order = self.order
        left_minor = rules.payable_minor(order) - order.refunded_minor
        amount_minor = left_minor if is_rest else left_minor // 2
        self._refund(f"staff-{order.refunded_minor}", amount_minor)

    def _refund(self, reference: str, amount_minor: int) -> None:
        order = self.order
        refunded = self.payments.execute(Target("refund", reference, amount_minor), self.payment_attempt)
        assert isinstance(refunded, PaymentRecord)
        refunded_minor = order.refunded_minor + amount_minor
        became = "refunded" if refunded_minor == rules.payable_minor(order) else "partially_refunded"
        rules.check_declared(order, None, became, None)
        self.order = msgspec.structs.replace(order, payment=became, refunded_minor=refunded_minor)

    @precondition(lambda self: self.order.fulfilment in ("shipped", "delivered"))
    @precondition(lambda self: self.step in RESTING and self.order.payment != "authorized")
    @precondition(lambda self: self.returned < self.quantity)
    @rule()
    def take_back_one(self) -> None:
        """One piece arrives, if it has not yet, and comes back; what was paid for it is refunded, as far as it can."""
        self.order = msgspec.structs.replace(self.order, fulfilment="delivered")
        order = self.order
        [back] = rules.check_return(order, [ReturnLine(line_id=1, quantity=1)])
        assert isinstance(self.inventory.return_items(1, f"back-{self.returned}"), Reservation)
        lines = tuple(msgspec.structs.replace(line, returned=line.returned + back.quantity) for line in order.lines)
        self.order = msgspec.structs.replace(
            order, lines=lines, fulfilment="returned" if rules.is_all(order, [back]) else "delivered"
        )
        if order.payment == "unpaid":
            self.order = msgspec.structs.replace(self.order, waived_minor=rules.returned_value(lines))
        elif order.payment in rules.REFUNDABLE:
            amount_minor = min(rules.refund_value(order, [back]), rules.payable_minor(order) - order.refunded_minor)
            if amount_minor:
                self._refund(f"back-{order.lines[0].returned}", amount_minor)

    @precondition(lambda self: self.step in RESTING)
    @precondition(lambda self: "completed" in rules.legal_moves(self.order, "status"))
    @rule()
    def complete(self) -> None:
        """Staff close the order. It may still be paid later."""
        self.order = msgspec.structs.replace(self.order, status="completed")

    @precondition(lambda self: "shipped" in rules.legal_moves(self.order, "fulfilment"))
    @rule()
    def ship(self) -> None:
        """Staff send the goods, without the saga."""
        assert self.order.payment in ("unpaid", "paid", "partially_refunded")
        assert self.inventory.state == "committed"
        self.order = msgspec.structs.replace(self.order, fulfilment="shipped")

    # ------------------------------------------------------------------------------------------------- other services

    @rule(meanwhile=PROGRESS, is_ended=st.booleans())
    def hold_runs_out(self, meanwhile: Progress = 0, is_ended: bool = True) -> None:
        """Ended by the expiry of inventory, or only by the next request about it."""
        self._meanwhile(meanwhile)
        self.inventory.let_time_pass()
        if is_ended:
            self.inventory.expire()

    @rule(meanwhile=PROGRESS, what=st.sampled_from(["goods arrive", "payments are swept", "lost requests arrive"]))
    def other_work(self, meanwhile: Progress, what: str) -> None:
        self._meanwhile(meanwhile)
        match what:
            case "goods arrive":
                self.goods_arrive(3)
            case "payments are swept":
                self.payments.sweep()
            case _:
                self.payments.deliver_late()

    def goods_arrive(self, pieces: int) -> None:
        """A fenced driver that was answered "out of stock" may find enough when it asks again."""
        self.inventory.receive(pieces)
        self.on_hand += pieces

    # ---------------------------------------------------------------------------------------------------- invariants

    @invariant()
    def no_card_is_charged_twice(self) -> None:
        assert self.bank.captures <= 1
        assert self.bank.open_charges <= 1
        assert 0 <= self.bank.net_minor <= self.order.total_minor

    @invariant()
    def stock_is_neither_lost_nor_invented(self) -> None:
        level = self.inventory.level
        lines = self.inventory.reservation.lines if self.inventory.reservation else ()
        state = self.inventory.state
        sold = sum(line.quantity - line.returned for line in lines) if state == "committed" else 0
        reserved = sum(line.quantity for line in lines) if state == "held" else 0
        assert (level.on_hand, level.reserved) == (self.on_hand - sold, reserved)

    @invariant()
    def stock_is_not_lost_while_a_payment_is_under_way(self) -> None:
        assert self.order.reason is None or self.order.reason.code != "stock_lost"

    @invariant()
    def order_and_bank_agree_about_money(self) -> None:
        order = self.order
        if order.payment in ("paid", "partially_refunded", "refunded") and order.status in ("confirmed", "completed"):
            assert self.bank.net_minor == rules.payable_minor(order) - order.refunded_minor
        if order.payment in ("unpaid", "failed") and self.step in RESTING:
            assert (self.bank.net_minor, self.bank.open_charges) == (0, 0)

    @invariant()
    def a_pending_order_has_a_saga(self) -> None:
        assert self.saga is not None or self.order.status != "pending"

    @invariant()
    def a_parked_saga_is_parked_rightly(self) -> None:
        if self.saga and self.saga.step == "authorized":
            assert steps.resumed(self.saga.step, self.order.status, self.order.payment) is None

    @invariant()
    def an_order_at_rest_is_consistent(self) -> None:
        if self.step in RESTING:
            self.assert_consistent()

    def assert_consistent(self) -> None:
        """Of an order for which no work is under way, whichever driver may still call late."""
        order, level, bank = self.order, self.inventory.level, self.bank
        match order.status:
            case "cancelled":
                assert self.step == FINISHED
                assert (bank.net_minor, bank.open_charges) == (0, 0)
                assert (level.on_hand, level.reserved) == (self.on_hand, 0)
                assert order.reason is not None
                assert order.refunded_minor == (rules.payable_minor(order) if order.payment == "refunded" else 0)
                assert order.payment in ("unpaid", "failed", "voided", "refunded")
            case "confirmed" | "completed":
                assert self.inventory.state == "committed"
                assert level.on_hand == self.on_hand - self.quantity + self.returned
                assert bank.open_charges == (self.step == "authorized")
                was_paid = order.payment in ("paid", "partially_refunded", "refunded")
                assert bank.net_minor == (rules.payable_minor(order) - order.refunded_minor if was_paid else 0)
                assert (order.payment == "authorized") == (self.step == "authorized")
                assert was_paid or order.payment in ("unpaid", "authorized")
            case _:
                assert (order.status, order.payment, self.step) == ("pending", "unpaid", "awaiting")
                assert self.payment_attempt < ATTEMPTS_LIMIT
                assert self.inventory.state in ("held", "expired")
                assert (bank.net_minor, bank.open_charges) == (0, 0)

    def teardown(self) -> None:
        """Without faults the order comes to rest; late calls and late requests then change nothing any more."""
        if not hasattr(self, "order"):
            return
        fenced, self.drivers = self.drivers, []
        self._come_to_rest()
        self.assert_consistent()
        before = (self.order, self.saga, self.inventory.level, self.bank.net_minor, self.bank.open_charges)
        for driver in fenced:
            while driver.go_on():
                pass
        self.payments.deliver_late()
        self.payments.sweep()
        assert (self.order, self.saga, self.inventory.level, self.bank.net_minor, self.bank.open_charges) == before

    def _come_to_rest(self) -> None:
        if self.saga:  # the drivers are fenced, also where it rests
            self.saga = msgspec.structs.replace(self.saga, epoch=next(self.epochs))
        for _ in range(TRIES):
            if self.step in RESTING:
                return
            self._fence()
            driver = self.drivers.pop()
            while driver.go_on():
                pass
        raise AssertionError(f"it does not come to rest: {self.step}, {self.order.status}, {self.order.payment}")


def new_order(quantity: int, price_minor: int) -> Order:
    total_minor = quantity * price_minor
    line = OrderLine(
        id=1,
        product_id=PRODUCT_ID,
        sku="SKU-7",
        name="Thing 7",
        quantity=quantity,
        unit_price_minor=price_minor,
        discount_minor=0,
        tax_minor=0,
        line_total_minor=total_minor,
    )
    return Order(
        id=ORDER_ID,
        user_id=1,
        status="pending",
        payment="unpaid",
        fulfilment="unfulfilled",
        currency="USD",
        total_minor=total_minor,
        lines=(line,),
        created_at=EPOCH,
        updated_at=EPOCH,
        version=1,
    )
