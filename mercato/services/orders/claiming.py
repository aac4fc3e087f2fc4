"""A guest's order becomes that of an account.

The caller sends the order's access token, and is signed in to an account with a proven e-mail address; where the order
has an address, it is that one. The order changes its owner in one transaction under its lock, so that of two claims one
succeeds; from then on the access token opens nothing. A saga of one step assigns the payments that the guest made; a
sweeper continues it where this process dies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import Actor, Forbidden, ServiceError, as_service, current, trace_of
from mercato.chassis.mail import addresses
from mercato.chassis.observability import faults
from mercato.chassis.postgres.database import Database
from mercato.chassis.sagas import store as saga
from mercato.chassis.sagas.runner import Runner
from mercato.chassis.sagas.store import Next, Saga
from mercato.contracts.order_refusals import AlreadyClaimed, AnotherEmail, EmailNotProven, OrderNotFound
from mercato.contracts.orders import ClaimOrder, Order
from mercato.contracts.payments import AssignPayments, Payments
from mercato.contracts.roles import GUEST_USER
from mercato.contracts.users import GetUser, Users

from . import claim_store, read_store
from .guests import Guests
from .locking import locked_order
from .paying import ANSWER_SECONDS, Paying

CLAIM: Final = "claim"

faults.declare(
    *(f"orders.claim.{when}_commit" for when in ("before", "after")),
    *(f"claim.assign.{when}_call" for when in ("before", "after")),
)


class Assigning(msgspec.Struct, frozen=True):
    """The state of the saga: the account that gets the payments."""

    user_id: int


class Claiming:
    """Claims orders, and the step of their saga."""

    def __init__(
        self, database: Database, runner: Runner, *, users: Users, payments: Payments, paying: Paying, guests: Guests
    ) -> None:
        self._database = database
        self._runner = runner
        self._users = users
        self._payments = payments
        self._paying = paying
        self._guests = guests
        runner.register(CLAIM, {"assign": self._assign})

    async def claim(self, request: ClaimOrder) -> Order:
        """Raises OrderNotFound, EmailNotProven, AnotherEmail, AlreadyClaimed, PaymentInProgress, Forbidden."""
        actor = current.get().actor
        if not actor.id:
            raise Forbidden(operation="orders.claim without an account", role=actor.role)
        order = await self._of_token(request)
        if not _is_owned(order, actor):
            await self._check_address(order, actor)
            await self._paying.wait_until_idle(order.id)
            await self._change_owner(order.id, actor)
        await self._runner.wait_until_idle((order.id, CLAIM, ""), (), ANSWER_SECONDS)
        async with self._database.read() as tx:
            return (await read_store.visible_record(tx, order.id, actor)).order

    async def _of_token(self, request: ClaimOrder) -> Order:
        async with self._database.read() as tx:
            record = (await read_store.get(tx, [request.id])).get(request.id)
        if record is None or not self._guests.is_token_of(record, request.access_token):
            raise OrderNotFound(order_id=request.id)
        return record.order

    async def _check_address(self, order: Order, actor: Actor) -> None:
        with as_service():
            user = await self._users.get(GetUser(id=actor.id))
        if not user.email_proven:
            raise EmailNotProven
        if order.guest_email is not None and _folded(order.guest_email) != _folded(user.email):
            raise AnotherEmail(order_id=order.id)

    async def _change_owner(self, order_id: int, actor: Actor) -> None:
        state, trace = msgspec.json.encode(Assigning(actor.id)).decode(), trace_of(current.get())
        started = Saga((order_id, CLAIM, ""), "assign", state, trace=trace)
        with as_service():  # the caller is not the guest any more, and not the owner yet
            async with locked_order(self._database, order_id) as (tx, locked):
                is_owned = _is_owned(locked.order, actor)  # by a repetition of this request
                if not is_owned:
                    locked.check_idle()  # a driver at work has read the owner of the order
                    await claim_store.claim(tx, order_id, actor)
                    await saga.start(tx, [started], self._runner.driver)
                    await faults.point("orders.claim.before_commit")
        await faults.point("orders.claim.after_commit")
        if not is_owned:
            self._runner.drive([started])

    async def _assign(self, sagas: Sequence[Saga]) -> None:
        async with self._database.read() as tx:
            records = await read_store.get(tx, [each.subject_id for each in sagas])
        await faults.point("claim.assign.before_call")
        answers = await self._payments.assign.many(
            [
                AssignPayments(
                    order_id=each.subject_id,
                    order_nonce=records[each.subject_id].nonce,
                    user_id=msgspec.json.decode(each.state, type=Assigning).user_id,
                )
                for each in sagas
            ]
        )
        await faults.point("claim.assign.after_call")
        outcomes = [
            self._runner.retry_later(each) if isinstance(answer, ServiceError) else Next("assign", "", finished=True)
            for each, answer in zip(sagas, answers, strict=True)
        ]
        async with self._runner.saving(list(zip(sagas, outcomes, strict=True))):
            pass


def _is_owned(order: Order, actor: Actor) -> bool:
    """Whether the order is that of the actor. Raises AlreadyClaimed where it is another account's."""
    if order.user_id not in (GUEST_USER, actor.id):
        raise AlreadyClaimed(order_id=order.id)
    return order.user_id == actor.id


def _folded(email: str) -> str:
    return addresses.canonical(email).lower()
