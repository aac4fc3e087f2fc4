"""The rules of stock. Pure: no I/O, no clock.

A transaction locks reservations and levels and creates a `StockLedger` of them. The ledger takes each request of the
batch, in order, and gives its answer; it updates the available pieces, so that of two requests for the last piece the
second is refused. `StockLedger.write_set` gives all changes, for the store to write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import Actor, FieldError, InvalidRequest, Message, RuleBroken, ServiceError
from mercato.chassis.messaging.events import Outgoing
from mercato.contracts.inventory import (
    GUEST_SHARE_PERCENT,
    ON_HAND_LIMIT,
    AnotherOrder,
    BelowReserved,
    CustomerBound,
    HoldLimitReached,
    Level,
    MovementKind,
    OutOfStock,
    Reservation,
    ReservationClosed,
    ReservationState,
    ReserveStock,
    ReturnReferenceReused,
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
"""The states of a reservation. Sold goods may be returned, line by line; the reservation stays committed."""


class ReservedLine(msgspec.Struct, frozen=True, gc=False):
    """A line of a reservation. `returned`: how many of its pieces were returned."""

    product_id: int
    quantity: int
    returned: int = 0


class StoredReservation(msgspec.Struct, frozen=True):
    """The row of a reservation. Lines by ascending product; `expires_in_s` is negative after the expiry."""

    order_id: int
    nonce: int
    state: ReservationState
    version: int
    expires_in_s: float | None
    lines: tuple[ReservedLine, ...] = ()

    @property
    def is_overdue(self) -> bool:
        """Held after its expiry: the next transaction that reserves for its order, or the expiry task, ends it."""
        return self.state == "held" and self.expires_in_s is not None and self.expires_in_s <= 0


class Movement(msgspec.Struct, frozen=True):
    """A change of `on_hand` that is no sale. `level_version` is the version of the level right after it."""

    product_id: int
    kind: MovementKind
    delta: int
    actor: Actor
    order_id: int | None = None
    reference: str | None = None
    reason: str = ""
    level_version: int = 0


class LevelDelta(msgspec.Struct, frozen=True):
    """The change of a level, and how many new versions it makes."""

    product_id: int
    on_hand: int
    reserved: int
    versions: int = 1


class ReservationChange(msgspec.Struct, frozen=True):
    """The new state of a reservation, and the version that it must still have.

    `level_versions` and `returned` have an element for each line; empty where they do not change.
    """

    order_id: int
    state: ReservationState
    version: int
    version_before: int
    level_versions: tuple[int, ...] = ()
    returned: tuple[int, ...] = ()


class WriteSet(msgspec.Struct, frozen=True):
    """The writes of a transaction. `refused` are orders whose reservation it has inserted and deletes again."""

    refused: tuple[int, ...]
    changes: tuple[ReservationChange, ...]
    deltas: tuple[LevelDelta, ...]
    movements: tuple[Movement, ...]
    events: tuple[Outgoing, ...]


# ---------------------------------------------------------------------------------------------------------- requests


def check_lines(lines: Sequence[StockLine]) -> InvalidRequest | None:
    """A product may have only one line: two lines would be checked against the same pieces."""
    if len(lines) == 1:
        return None
    counts = Counter(line.product_id for line in lines)
    errors = tuple(
        FieldError(field=f"lines[{i}].product_id", message=f"product {line.product_id} has more than one line")
        for i, line in enumerate(lines)
        if counts[line.product_id] > 1
    )
    return InvalidRequest(errors=errors) if errors else None


def check_bound(request: ReserveStock) -> InvalidRequest | None:
    if request.customer_bound is None or len(request.customer_bound.before) == len(request.lines):
        return None
    return InvalidRequest(errors=(FieldError(field="customer_bound.before", message="has not one element a line"),))


def guest_share(on_hand: int) -> int:
    """How many pieces of a product all orders of guests together may hold: at least one, where one is on hand."""
    return max(min(on_hand, 1), on_hand * GUEST_SHARE_PERCENT // 100)


def customer_share(on_hand: int, bound: CustomerBound) -> int:
    """How many pieces of a product the open orders of one customer may hold together."""
    return max(bound.units, on_hand * bound.share_percent // 100)


def least_on_hand(wanted: int, bound: CustomerBound) -> int:
    """The fewest pieces on hand with which a customer may hold `wanted`; above the limit where no number allows it."""
    if wanted <= bound.units:
        return 0
    none = ON_HAND_LIMIT + 1
    return min(-(-wanted * 100 // bound.share_percent), none) if bound.share_percent else none


def needed_on_hand(requests: Iterable[ReserveStock]) -> dict[int, int]:
    """By product, how many pieces must be on hand so that each bounded request fits by itself."""
    needed: dict[int, int] = {}
    for request in requests:
        if bound := request.customer_bound:
            for line, before in zip(request.lines, bound.before, strict=True):
                least = least_on_hand(before + line.quantity, bound)
                needed[line.product_id] = max(least, needed.get(line.product_id, 0))
    return needed


def check_delta(delta: int) -> InvalidRequest | None:
    if delta == 0:
        return InvalidRequest(errors=(FieldError(field="delta", message="is 0: that changes nothing"),))
    return None


def never_counted(product_id: int) -> Level:
    return Level(product_id=product_id, on_hand=0, reserved=0, available=0, updated_at=None, version=0)


def in_product_order(lines: Sequence[StockLine]) -> tuple[StockLine, ...]:
    """The order of lines in rows and answers."""
    return tuple(sorted(lines, key=_product)) if len(lines) > 1 else tuple(lines)


def _product(line: StockLine) -> int:
    return line.product_id


# ---------------------------------------------------------------------------------------------------- answers, events


def stock_lines(reservation: StoredReservation) -> tuple[StockLine, ...]:
    return tuple([StockLine(product_id=line.product_id, quantity=line.quantity) for line in reservation.lines])


def answer(reservation: StoredReservation) -> Reservation:
    return Reservation(
        order_id=reservation.order_id,
        state=reservation.state,
        lines=stock_lines(reservation),
        expires_in_s=reservation.expires_in_s,
    )


def reservation_event(what: str, order_id: int, version: int, lines: tuple[StockLine, ...]) -> Outgoing:
    """`stock.<what>`: the stock of one order has changed its state."""
    return Outgoing(f"stock.{what}", "reservation", order_id, version, StockMoved(order_id=order_id, lines=lines))


def availability_event(product_id: int, version: int, *, before: int, after: int) -> Outgoing | None:
    """The event where the last available piece of a product was taken, or a piece is available again."""
    if (before > 0) == (after > 0):
        return None
    what = "stock.available" if after > 0 else "stock.exhausted"
    return _product_event(what, product_id, version, StockAvailability(product_id=product_id, version=version))


def _product_event(what: str, product_id: int, version: int, data: Message) -> Outgoing:
    return Outgoing(what, "product", product_id, version, data)


# ------------------------------------------------------------------------------------------------------------- ledger


class StockLedger:
    """The current levels and reservations while a batch is decided.

    `levels` and `locked` are those that the transaction has locked; a product without a level has no stock. `inserted`
    are the held reservations that it has just inserted: `reserve` keeps or refuses each. Where these are of guests,
    `held_by_guests` are the pieces that other orders of guests hold, by product.
    """

    def __init__(
        self,
        levels: Iterable[Level],
        locked: Iterable[StoredReservation] = (),
        inserted: Iterable[StoredReservation] = (),
        held_by_guests: Mapping[int, int] | None = None,
    ) -> None:
        self._levels_before = {level.product_id: level for level in levels}
        self._on_hand: Counter[int] = Counter()
        self._reserved: Counter[int] = Counter()
        self._counts: Counter[int] = Counter()
        self._inserted = {reservation.order_id: reservation for reservation in inserted}
        self._before = {reservation.order_id: reservation for reservation in locked}
        self._now = dict(self._before)
        self._guests = None if held_by_guests is None else Counter(held_by_guests)
        self._refused: dict[int, OutOfStock | HoldLimitReached] = {}
        self._movements: list[Movement] = []
        self._events: list[Outgoing] = []

    # --------------------------------------------------------------------------------------------------- reservations

    def reserve(self, request: ReserveStock) -> Reservation | ServiceError:
        """All lines or none. For an order that has a reservation already, the answer is that reservation."""
        order_id = request.order_id
        if order_id in self._refused:
            return self._refused[order_id].copy()  # a duplicate in the batch gets the same answer
        if order_id not in self._now:
            return self._keep(self._inserted[order_id], request)
        reservation = self._of_order(order_id, request.order_nonce)
        if isinstance(reservation, AnotherOrder):
            return reservation
        assert reservation is not None
        if reservation.is_overdue:
            reservation = self._end(reservation, "expired")
        if reservation.state not in ("held", "committed"):
            return ReservationClosed(order_id=order_id, state=reservation.state)
        if stock_lines(reservation) != in_product_order(request.lines):
            refusal = InvalidRequest(errors=(FieldError(field="lines", message="are not those of the first time"),))
            refusal.key_field = "lines"
            return refusal
        if request.for_payment and reservation.expires_in_s is not None:
            reservation = self._put(reservation, expires_in_s=None)
        return answer(reservation)

    def _keep(self, reservation: StoredReservation, request: ReserveStock) -> Reservation | ServiceError:
        short = [
            ShortLine(product_id=line.product_id, requested=line.quantity, available=available)
            for line in reservation.lines
            if (available := self._may_be_held(line.product_id)) < line.quantity
        ]
        if short:
            refusal = self._refused[reservation.order_id] = OutOfStock(
                order_id=reservation.order_id, lines=tuple(short)
            )
            return refusal
        if reached := self._limit_reached(request):
            self._refused[reservation.order_id] = reached
            return reached
        self._before[reservation.order_id] = self._now[reservation.order_id] = reservation
        for line in reservation.lines:
            self._change_level(line.product_id, reserved=line.quantity)
            if self._guests is not None:
                self._guests[line.product_id] += line.quantity
        self._emit("held", reservation)
        return answer(reservation)

    def _limit_reached(self, request: ReserveStock) -> HoldLimitReached | None:
        if (bound := request.customer_bound) is None:
            return None
        lines: list[ShortLine] = []
        shares: list[int] = []
        for line, before in zip(request.lines, bound.before, strict=True):
            share = customer_share(self.level(line.product_id).on_hand, bound)
            if before + line.quantity > share:
                left = max(0, share - before)
                lines.append(ShortLine(product_id=line.product_id, requested=line.quantity, available=left))
                shares.append(share)
        if not lines:
            return None
        return HoldLimitReached(order_id=request.order_id, lines=tuple(lines), bounds=tuple(shares))

    def kept(self) -> Sequence[StoredReservation]:
        """The inserted reservations that were not refused."""
        return [reservation for order_id, reservation in self._inserted.items() if order_id in self._now]

    def commit(self, order_id: int, nonce: int) -> Reservation | ServiceError:
        """Commits a held reservation, also after its expiry, as long as it was not ended."""
        reservation = self._of_order(order_id, nonce)
        if isinstance(reservation, AnotherOrder):
            return reservation
        if reservation is None or reservation.state in ("released", "expired"):
            return ReservationClosed(order_id=order_id, state=reservation.state if reservation else None)
        if reservation.state == "held":
            reservation = self._end(reservation, "committed")
        return answer(reservation)

    def release(self, order_id: int, nonce: int) -> Reservation | AnotherOrder:
        """For an order without a reservation the caller has inserted a tombstone: it is released, without an event."""
        reservation = self._of_order(order_id, nonce)
        if isinstance(reservation, AnotherOrder):
            return reservation
        assert reservation is not None
        if reservation.state == "held":
            reservation = self._end(reservation, "released")
        return answer(reservation)

    def expire(self, order_id: int) -> None:
        self._end(self._now[order_id], "expired")

    def return_items(
        self, request: ReturnStock, actor: Actor, done: Sequence[StockLine] | None = None
    ) -> Reservation | ServiceError:
        """All lines of a return or none. `done`: the lines that this reference has returned already, by product."""
        reservation = self._of_order(request.order_id, request.order_nonce)
        if isinstance(reservation, AnotherOrder):
            return reservation
        if reservation is None or reservation.state != "committed":
            return ReservationClosed(order_id=request.order_id, state=reservation.state if reservation else None)
        lines = in_product_order(request.lines)
        if done is not None:
            return answer(reservation) if lines == tuple(done) else ReturnReferenceReused(order_id=request.order_id)
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
            self._change_level(line.product_id, on_hand=line.quantity)
            self._movements.append(
                Movement(line.product_id, "return", line.quantity, actor, request.order_id, request.reference)
            )
        self._emit("returned", reservation, lines)
        return answer(reservation)

    def _of_order(self, order_id: int, nonce: int) -> StoredReservation | AnotherOrder | None:
        reservation = self._now.get(order_id)
        if reservation is not None and reservation.nonce != nonce:
            return AnotherOrder(order_id=order_id)
        return reservation

    def _end(self, reservation: StoredReservation, state: ReservationState) -> StoredReservation:
        """Ends a held reservation: its pieces become available, or are sold."""
        if state not in MOVES[reservation.state]:
            raise RuleBroken(f"a reservation that is {reservation.state} cannot become {state}")
        ended = self._put(reservation, state=state, expires_in_s=None)
        for line in ended.lines:
            on_hand = -line.quantity if state == "committed" else 0
            self._change_level(line.product_id, on_hand=on_hand, reserved=-line.quantity)
        self._emit(state, ended)
        return ended

    def _put(self, reservation: StoredReservation, **changed: object) -> StoredReservation:
        now = msgspec.structs.replace(reservation, version=reservation.version + 1, **changed)
        self._now[now.order_id] = now
        return now

    def _emit(self, what: str, reservation: StoredReservation, lines: tuple[StockLine, ...] | None = None) -> None:
        lines = stock_lines(reservation) if lines is None else lines
        self._events.append(reservation_event(what, reservation.order_id, reservation.version, lines))

    # ---------------------------------------------------------------------------------------------------------- levels

    def level(self, product_id: int) -> Level:
        """The current level. A level that was counted in this batch has no time yet: the write sets it."""
        before = self._level_before(product_id)
        on_hand, reserved = before.on_hand + self._on_hand[product_id], before.reserved + self._reserved[product_id]
        return Level(
            product_id=product_id,
            on_hand=on_hand,
            reserved=reserved,
            available=on_hand - reserved,
            updated_at=None if self._counts[product_id] else before.updated_at,
            version=before.version + self._counts[product_id],
        )

    def count(self, movement: Movement) -> Level:
        """Applies a count, receipt or write-off; gives the new level.

        Raises `BelowReserved`, and `InvalidRequest` above the limit.
        """
        product_id = movement.product_id
        level = self.level(product_id)
        wanted = level.on_hand + movement.delta
        if wanted < level.reserved:
            raise BelowReserved(product_id=product_id, wanted=wanted, reserved=level.reserved)
        if wanted > ON_HAND_LIMIT:
            message = f"would make {wanted} pieces; {ON_HAND_LIMIT} is the most"
            raise InvalidRequest(errors=(FieldError(field="delta", message=message),))
        self._change_level(product_id, on_hand=movement.delta)
        self._counts[product_id] += 1
        level = self.level(product_id)
        self._movements.append(msgspec.structs.replace(movement, level_version=level.version))
        data = StockLevelSet(product_id=product_id, delta=movement.delta, on_hand=wanted, reason=movement.reason)
        self._events.append(_product_event("stock.adjusted", product_id, level.version, data))
        return level

    def _level_before(self, product_id: int) -> Level:
        return self._levels_before.get(product_id) or never_counted(product_id)

    def _available(self, product_id: int) -> int:
        return self._level_before(product_id).available + self._on_hand[product_id] - self._reserved[product_id]

    def _may_be_held(self, product_id: int) -> int:
        """The available pieces; for guests, at most what is left of their share."""
        available = self._available(product_id)
        if self._guests is None:
            return available
        left = guest_share(self.level(product_id).on_hand) - self._guests[product_id]
        return max(0, min(available, left))

    def _change_level(self, product_id: int, *, on_hand: int = 0, reserved: int = 0) -> None:
        self._on_hand[product_id] += on_hand
        self._reserved[product_id] += reserved
        if self._available(product_id) < 0:
            raise RuleBroken(f"product {product_id} would be oversold")

    # ------------------------------------------------------------------------------------------------------- write set

    def write_set(self) -> WriteSet:
        """All changes. A level with its values of before the batch has not changed."""
        uncounted = [i for i, level in self._levels_before.items() if level.version == 0 and not self._counts[i]]
        if uncounted:
            raise RuleBroken(f"levels of {uncounted} were inserted but not counted: version 0 is never committed")
        deltas = self._deltas()
        versions = {delta.product_id: self._level_before(delta.product_id).version + delta.versions for delta in deltas}
        return WriteSet(
            refused=tuple(self._refused),
            changes=self._changes(versions),
            deltas=deltas,
            movements=tuple(
                movement
                if movement.level_version
                else msgspec.structs.replace(movement, level_version=versions[movement.product_id])
                for movement in self._movements
            ),
            events=(*self._events, *self._availability_events(versions)),
        )

    def _deltas(self) -> tuple[LevelDelta, ...]:
        products = sorted({*self._on_hand, *self._reserved})
        # Each count makes a version, so that a client with an older one is refused. A batch of orders makes one.
        deltas = (LevelDelta(i, self._on_hand[i], self._reserved[i], max(1, self._counts[i])) for i in products)
        return tuple(d for d in deltas if d.on_hand or d.reserved or self._counts[d.product_id])

    def _changes(self, versions: Mapping[int, int]) -> tuple[ReservationChange, ...]:
        return tuple(
            _change(before, self._now[order_id], versions)
            for order_id, before in self._before.items()
            if self._now[order_id].version != before.version
        )

    def _availability_events(self, versions: Mapping[int, int]) -> Iterable[Outgoing]:
        for product_id, version in versions.items():
            before, after = self._level_before(product_id).available, self._available(product_id)
            if event := availability_event(product_id, version, before=before, after=after):
                yield event


def _change(before: StoredReservation, now: StoredReservation, versions: Mapping[int, int]) -> ReservationChange:
    is_sale = before.state == "held" and now.state == "committed"
    return ReservationChange(
        order_id=now.order_id,
        state=now.state,
        version=now.version,
        version_before=before.version,
        level_versions=tuple(versions[line.product_id] for line in now.lines) if is_sale else (),
        returned=tuple(line.returned for line in now.lines) if now.lines != before.lines else (),
    )


def _with_returned(lines: Iterable[ReservedLine], back: Iterable[StockLine]) -> tuple[ReservedLine, ...]:
    quantities = {line.product_id: line.quantity for line in back}
    return tuple(
        msgspec.structs.replace(line, returned=line.returned + quantities.get(line.product_id, 0)) for line in lines
    )
