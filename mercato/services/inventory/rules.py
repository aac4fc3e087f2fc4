"""What may happen to stock. Pure: no I/O, no clock.

A transaction locks reservations and levels and opens `Books` with them. Each request of its batch is entered there, in
order, and hears its answer; availability runs along, so that the second of two who want the last piece is refused.
`Books.close` gives the `Plan`: everything that has changed, to be written at once. Nothing of it is true before that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import Actor, FieldError, InvalidRequest, Message, ServiceError, StaleVersion
from mercato.chassis.events import Outgoing
from mercato.contracts.inventory import (
    ON_HAND_LIMIT,
    BelowReserved,
    Level,
    MovementKind,
    OutOfStock,
    Reservation,
    ReservationClosed,
    ReservationState,
    ReserveStock,
    ReturnStock,
    ReturnTooLarge,
    ShortLine,
    StockAvailability,
    StockLevelSet,
    StockLine,
    StockMoved,
)

MOVES: Final[Mapping[ReservationState, frozenset[ReservationState]]] = {
    "held": frozenset({"committed", "released", "expired"}),
    "committed": frozenset(),
    "released": frozenset(),
    "expired": frozenset(),
}
"""The life of a reservation. What is sold may come back, line by line; the reservation stays committed."""


class HeldLine(msgspec.Struct, frozen=True):
    """A line of a reservation. `returned` of its pieces are back on the shelf."""

    product_id: int
    quantity: int
    returned: int = 0


class Standing(msgspec.Struct, frozen=True):
    """A reservation. Lines by ascending product; `expires_in_s` is negative when its time is over."""

    order_id: int
    state: ReservationState
    version: int
    expires_in_s: float | None
    lines: tuple[HeldLine, ...] = ()

    @property
    def is_over(self) -> bool:
        """Held, and past its time: whoever looks at it next ends it."""
        return self.state == "held" and self.expires_in_s is not None and self.expires_in_s <= 0


class Movement(msgspec.Struct, frozen=True):
    """A change of `on_hand`, and why."""

    product_id: int
    kind: MovementKind
    delta: int
    actor: Actor
    order_id: int | None = None
    reference: str | None = None
    reason: str = ""


class Shift(msgspec.Struct, frozen=True):
    """By how much a level changes, and how many new versions that makes."""

    product_id: int
    on_hand: int
    reserved: int
    versions: int = 1


class Change(msgspec.Struct, frozen=True):
    """A reservation as it will be, and the version at which it must still be."""

    order_id: int
    state: ReservationState
    version: int
    version_before: int


class ReturnedLine(msgspec.Struct, frozen=True):
    order_id: int
    product_id: int
    quantity: int


class Plan(msgspec.Struct, frozen=True):
    """What a transaction writes. `opened` are reservations whose header is there and whose lines are not."""

    opened: tuple[Standing, ...]
    refused: tuple[int, ...]
    changes: tuple[Change, ...]
    returned: tuple[ReturnedLine, ...]
    shifts: tuple[Shift, ...]
    movements: tuple[Movement, ...]
    events: tuple[Outgoing, ...]


# ---------------------------------------------------------------------------------------------------------- requests


def check_lines(lines: Sequence[StockLine]) -> InvalidRequest | None:
    """A product stands in one line: two of them would be checked against the same pieces."""
    counts = Counter(line.product_id for line in lines)
    errors = tuple(
        FieldError(field=f"lines[{i}].product_id", message=f"product {line.product_id} has more than one line")
        for i, line in enumerate(lines)
        if counts[line.product_id] > 1
    )
    return InvalidRequest(errors=errors) if errors else None


def check_delta(delta: int) -> InvalidRequest | None:
    if delta == 0:
        return InvalidRequest(errors=(FieldError(field="delta", message="is 0: that changes nothing"),))
    return None


def check_version(expected: int | None, actual: int) -> StaleVersion | None:
    if expected is not None and expected != actual:
        return StaleVersion(expected=expected, actual=actual)
    return None


def never_counted(product_id: int) -> Level:
    return Level(product_id=product_id, on_hand=0, reserved=0, available=0, updated_at=None, version=0)


def in_product_order(lines: Iterable[StockLine]) -> tuple[StockLine, ...]:
    """How lines are kept and answered, whatever order they came in."""
    return tuple(sorted(lines, key=_product))


def _product(line: StockLine) -> int:
    return line.product_id


# ------------------------------------------------------------------------------------------------------------- books


class Books:
    """Levels and reservations as they become while a batch is decided.

    `levels` and `standing` are those that the transaction has locked; a product that is not among them has nothing.
    `opened` are the reservations that it has just inserted, held and without lines: `reserve` fills or refuses them.
    """

    def __init__(
        self, levels: Iterable[Level], standing: Iterable[Standing] = (), opened: Iterable[Standing] = ()
    ) -> None:
        self._before = {level.product_id: level for level in levels}
        self._on_hand: Counter[int] = Counter()
        self._reserved: Counter[int] = Counter()
        self._locked = {reservation.order_id: reservation for reservation in standing}
        self._empty = {reservation.order_id: reservation for reservation in opened}
        self._now = dict(self._locked)
        self._refused: dict[int, OutOfStock] = {}
        self._counted: Counter[int] = Counter()
        self._returned: Counter[tuple[int, int]] = Counter()
        self._movements: list[Movement] = []
        self._events: list[Outgoing] = []

    # --------------------------------------------------------------------------------------------------- reservations

    def reserve(self, request: ReserveStock) -> Reservation | ServiceError:
        """All lines or none. An order that has a reservation already hears of that one."""
        order_id = request.order_id
        if order_id in self._refused:
            return self._refused[order_id].copy()  # a twin in the same batch hears the same
        if order_id not in self._now:
            return self._open(self._empty[order_id], in_product_order(request.lines))
        reservation = self._now[order_id]
        if reservation.is_over:
            reservation = self._end(reservation, "expired")
        if reservation.state not in ("held", "committed"):
            return ReservationClosed(order_id=order_id, state=reservation.state)
        if _stock_lines(reservation) != in_product_order(request.lines):
            return InvalidRequest(errors=(FieldError(field="lines", message="are not those of the first time"),))
        if request.for_payment and reservation.expires_in_s is not None:
            reservation = self._put(reservation, expires_in_s=None)
        return _answer(reservation)

    def _open(self, reservation: Standing, lines: tuple[StockLine, ...]) -> Reservation | OutOfStock:
        short = [
            ShortLine(product_id=line.product_id, requested=line.quantity, available=available)
            for line in lines
            if (available := self._available(line.product_id)) < line.quantity
        ]
        if short:
            refusal = self._refused[reservation.order_id] = OutOfStock(
                order_id=reservation.order_id, lines=tuple(short)
            )
            return refusal
        held = tuple(HeldLine(line.product_id, line.quantity) for line in lines)
        reservation = msgspec.structs.replace(reservation, lines=held)
        self._now[reservation.order_id] = self._empty[reservation.order_id] = reservation
        for line in lines:
            self._shift(line.product_id, reserved=line.quantity)
        self._tell("stock.held", reservation)
        return _answer(reservation)

    def commit(self, order_id: int, actor: Actor) -> Reservation | ReservationClosed:
        """Also one that is past its time, as long as nobody has ended it."""
        reservation = self._now.get(order_id)
        if reservation is None or reservation.state in ("released", "expired"):
            return ReservationClosed(order_id=order_id, state=reservation.state if reservation else None)
        if reservation.state == "held":
            reservation = self._end(reservation, "committed")
            self._movements += [
                Movement(line.product_id, "sale", -line.quantity, actor, order_id) for line in reservation.lines
            ]
        return _answer(reservation)

    def release(self, order_id: int) -> Reservation:
        """Of one that was not there, the transaction has made a released one: a tombstone, which nobody hears of."""
        reservation = self._now[order_id]
        if reservation.state == "held":
            reservation = self._end(reservation, "released")
        return _answer(reservation)

    def expire(self, order_id: int) -> None:
        self._end(self._now[order_id], "expired")

    def restock(self, request: ReturnStock, actor: Actor) -> Reservation | ServiceError:
        """All lines of a return or none. Whether it is the first with its reference, the caller has looked up."""
        reservation = self._now.get(request.order_id)
        if reservation is None or reservation.state != "committed":
            return ReservationClosed(order_id=request.order_id, state=reservation.state if reservation else None)
        lines = in_product_order(request.lines)
        left = {line.product_id: line.quantity - line.returned for line in reservation.lines}
        for line in lines:
            if line.quantity > left.get(line.product_id, 0):
                return ReturnTooLarge(
                    order_id=request.order_id,
                    product_id=line.product_id,
                    quantity=line.quantity,
                    left=left.get(line.product_id, 0),
                )
        reservation = self._put(reservation, lines=_with_returned(reservation.lines, lines))
        for line in lines:
            self._shift(line.product_id, on_hand=line.quantity)
            self._returned[request.order_id, line.product_id] += line.quantity
            self._movements.append(
                Movement(line.product_id, "return", line.quantity, actor, request.order_id, request.reference)
            )
        self._tell("stock.returned", reservation, lines)
        return _answer(reservation)

    def look(self, order_id: int) -> Reservation:
        """A reservation that is there, as it is by now."""
        return _answer(self._now[order_id])

    def _end(self, reservation: Standing, state: ReservationState) -> Standing:
        """Ends a held reservation: its pieces are free again, or gone with the goods."""
        assert state in MOVES[reservation.state], f"a reservation that is {reservation.state} cannot become {state}"
        ended = self._put(reservation, state=state, expires_in_s=None)
        for line in ended.lines:
            self._shift(line.product_id, on_hand=-line.quantity if state == "committed" else 0, reserved=-line.quantity)
        self._tell(f"stock.{state}", ended)
        return ended

    def _put(self, reservation: Standing, **changed: object) -> Standing:
        now = msgspec.structs.replace(reservation, version=reservation.version + 1, **changed)
        self._now[now.order_id] = now
        return now

    def _tell(self, what: str, reservation: Standing, lines: tuple[StockLine, ...] | None = None) -> None:
        order_id = reservation.order_id
        moved = StockMoved(order_id=order_id, lines=_stock_lines(reservation) if lines is None else lines)
        self._events.append(Outgoing(what, "reservation", order_id, reservation.version, moved))

    # ---------------------------------------------------------------------------------------------------------- levels

    def level(self, product_id: int) -> Level:
        """As it is by now. One that was counted in this batch has no time yet: that comes with the write."""
        before = self._level(product_id)
        on_hand, reserved = before.on_hand + self._on_hand[product_id], before.reserved + self._reserved[product_id]
        return Level(
            product_id=product_id,
            on_hand=on_hand,
            reserved=reserved,
            available=on_hand - reserved,
            updated_at=None if self._counted[product_id] else before.updated_at,
            version=before.version + self._counted[product_id],
        )

    def count(self, movement: Movement) -> Level:
        """What somebody counted, received or wrote off; gives the level as it is then.

        Raises `BelowReserved`; beyond the limit `InvalidRequest`.
        """
        product_id = movement.product_id
        level = self.level(product_id)
        wanted = level.on_hand + movement.delta
        if wanted < level.reserved:
            raise BelowReserved(product_id=product_id, wanted=wanted, reserved=level.reserved)
        if wanted > ON_HAND_LIMIT:
            message = f"would make {wanted} pieces; {ON_HAND_LIMIT} is the most"
            raise InvalidRequest(errors=(FieldError(field="delta", message=message),))
        self._shift(product_id, on_hand=movement.delta)
        self._counted[product_id] += 1
        self._movements.append(movement)
        told = StockLevelSet(product_id=product_id, delta=movement.delta, on_hand=wanted, reason=movement.reason)
        level = self.level(product_id)
        self._tell_level("stock.adjusted", product_id, level.version, told)
        return level

    def _level(self, product_id: int) -> Level:
        return self._before.get(product_id) or never_counted(product_id)

    def _available(self, product_id: int) -> int:
        return self._level(product_id).available + self._on_hand[product_id] - self._reserved[product_id]

    def _shift(self, product_id: int, *, on_hand: int = 0, reserved: int = 0) -> None:
        self._on_hand[product_id] += on_hand
        self._reserved[product_id] += reserved
        assert self._available(product_id) >= 0, f"product {product_id} would be promised twice"

    def _tell_level(self, what: str, product_id: int, version: int, told: Message) -> None:
        self._events.append(Outgoing(what, "product", product_id, version, told))

    # ----------------------------------------------------------------------------------------------------------- close

    def close(self) -> Plan:
        """Everything that has changed. A level that is as it was before the batch has not."""
        uncounted = [i for i, level in self._before.items() if level.version == 0 and not self._counted[i]]
        assert not uncounted, f"levels of {uncounted} were made for nothing: version 0 is never committed"
        shifts = self._shifts()
        self._tell_of_availability(shifts)
        return Plan(
            opened=tuple(self._empty[order_id] for order_id in self._empty if order_id in self._now),
            refused=tuple(order_id for order_id in self._empty if order_id not in self._now),
            changes=self._changes(),
            returned=tuple(ReturnedLine(*key, quantity) for key, quantity in sorted(self._returned.items())),
            shifts=shifts,
            movements=tuple(self._movements),
            events=tuple(self._events),
        )

    def _shifts(self) -> tuple[Shift, ...]:
        products = sorted({*self._on_hand, *self._reserved})
        # Each count is a version of its own, or who was overtaken would not notice. Orders make one together.
        shifts = (Shift(i, self._on_hand[i], self._reserved[i], max(1, self._counted[i])) for i in products)
        return tuple(s for s in shifts if s.on_hand or s.reserved or self._counted[s.product_id])

    def _changes(self) -> tuple[Change, ...]:
        before = {**self._empty, **self._locked}
        return tuple(
            Change(order_id, now.state, now.version, before[order_id].version)
            for order_id, now in self._now.items()
            if now.version != before[order_id].version
        )

    def _tell_of_availability(self, shifts: Iterable[Shift]) -> None:
        for shift in shifts:
            level, available = self._level(shift.product_id), self._available(shift.product_id)
            if (level.available > 0) != (available > 0):
                what = "stock.available" if available > 0 else "stock.exhausted"
                version = level.version + shift.versions
                told = StockAvailability(product_id=level.product_id, version=version)
                self._tell_level(what, level.product_id, version, told)


def _stock_lines(reservation: Standing) -> tuple[StockLine, ...]:
    return tuple(StockLine(product_id=line.product_id, quantity=line.quantity) for line in reservation.lines)


def _answer(reservation: Standing) -> Reservation:
    return Reservation(
        order_id=reservation.order_id,
        state=reservation.state,
        lines=_stock_lines(reservation),
        expires_in_s=reservation.expires_in_s,
    )


def _with_returned(lines: Iterable[HeldLine], back: Iterable[StockLine]) -> tuple[HeldLine, ...]:
    quantities = {line.product_id: line.quantity for line in back}
    return tuple(
        msgspec.structs.replace(line, returned=line.returned + quantities.get(line.product_id, 0)) for line in lines
    )
