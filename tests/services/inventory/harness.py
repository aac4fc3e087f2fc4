"""Inventory with a catalogue that a test owns, and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mercato.chassis.contract import ServiceError
from mercato.chassis.idempotency import keys as idempotency
from mercato.contracts.inventory import (
    CommitStock,
    GetLevel,
    Inventory,
    Level,
    ReleaseStock,
    Reservation,
    ReserveStock,
    ReturnStock,
    SetLevel,
)
from mercato.services.inventory import app
from mercato.testing.actors import SERVICE, STAFF
from mercato.testing.builders import MUG, stock_lines
from mercato.testing.harness import ServiceHarness
from mercato.testing.rules import EVENT_VERSIONS_RISE, audit_rules
from mercato.testing.stubs import stub_products

NONCE: Final = 2**62 + 1
"""Of every order here, unless a test names another."""
UNKNOWN: Final = 999


def reserve(order_id: int, *, for_payment: bool = False, nonce: int = NONCE, **quantities: int) -> ReserveStock:
    return ReserveStock(
        order_id=order_id,
        lines=stock_lines(**quantities),
        for_payment=for_payment,
        idempotency_key=f"reserve:{order_id}",
        order_nonce=nonce,
    )


def commit(order_id: int, nonce: int = NONCE) -> CommitStock:
    return CommitStock(order_id=order_id, idempotency_key=f"commit:{order_id}", order_nonce=nonce)


def release(order_id: int, nonce: int = NONCE) -> ReleaseStock:
    return ReleaseStock(order_id=order_id, idempotency_key=f"release:{order_id}", order_nonce=nonce)


def give_back(order_id: int, reference: str = "return 1", nonce: int = NONCE, **quantities: int) -> ReturnStock:
    return ReturnStock(
        order_id=order_id,
        lines=stock_lines(**quantities),
        reference=reference,
        idempotency_key=f"{order_id}:{reference}",
        order_nonce=nonce,
    )


class InventoryHarness(ServiceHarness):
    """`inventory` is the client; `products` is the stub that it asks."""

    service = "inventory"
    rules = {  # noqa: RUF012  # not changed
        **audit_rules("inventory", "S1", "S2", "S3", "S4", "S7", "S8", "S10"),
        "event versions rise": EVENT_VERSIONS_RISE,
    }

    async def start(self) -> None:
        self.products = stub_products(range(1, 31))
        await self.open({"inventory": app.build}, stubs={"products": self.products.build})
        self.inventory = self.client(Inventory)

    # ------------------------------------------------------------------------------------------------------ requests

    async def stock(self, **quantities: int) -> None:
        with self.acting(STAFF):
            for line in stock_lines(**quantities):
                await self.inventory.set(SetLevel(product_id=line.product_id, on_hand=line.quantity))

    async def level(self, product_id: int = MUG) -> Level:
        with self.acting(STAFF):
            return await self.inventory.levels(GetLevel(product_id=product_id))

    async def pieces(self, product_id: int = MUG) -> tuple[int, int]:
        """On hand, reserved."""
        level = await self.level(product_id)
        assert level.available == level.on_hand - level.reserved
        return level.on_hand, level.reserved

    async def reserve(self, order_id: int, *, for_payment: bool = False, **quantities: int) -> Reservation:
        with self.acting(SERVICE):
            return await self.inventory.reserve(reserve(order_id, for_payment=for_payment, **quantities))

    async def reserve_many(self, *requests: ReserveStock) -> Sequence[Reservation | ServiceError]:
        with self.acting(SERVICE):
            return await self.inventory.reserve.many(requests)

    async def commit(self, order_id: int) -> Reservation:
        with self.acting(SERVICE):
            return await self.inventory.commit(commit(order_id))

    async def release(self, order_id: int) -> Reservation:
        with self.acting(SERVICE):
            return await self.inventory.release(release(order_id))

    async def restock(self, order_id: int, reference: str = "return 1", **quantities: int) -> Reservation:
        with self.acting(SERVICE):
            return await self.inventory.restock(give_back(order_id, reference, **quantities))

    # -------------------------------------------------------------------------------------------------------- tables

    async def let_time_pass(self, order_id: int) -> None:
        """Moves the end of a hold into the past, by the database's clock."""
        await self.rows(
            "UPDATE reservations SET expires_at = now() - interval '1 second' WHERE order_id = $1", order_id
        )

    async def let_days_pass(self, days: int) -> None:
        """Makes everything so many days older, and runs what deletes by age."""
        async with self.database.transaction() as tx:
            for statement in (
                "ALTER TABLE movements DISABLE TRIGGER movements_stay",
                f"UPDATE movements SET at = at - interval '{days} days'",
                "ALTER TABLE movements ENABLE TRIGGER movements_stay",
                f"""
                UPDATE reservations SET created_at = created_at - interval '{days} days',
                       updated_at = updated_at - interval '{days} days', ended_at = ended_at - interval '{days} days'
                """,
                f"UPDATE idempotency SET expires_at = expires_at - interval '{days} days'",
            ):
                await tx.execute(statement)
        async with self.database.transaction() as tx:
            await idempotency.purge_expired(tx)

    async def states(self) -> dict[int, str]:
        """Of the reservations, by order."""
        return dict(await self.rows("SELECT order_id, state FROM reservations"))

    async def movements(self, product_id: int = MUG) -> list[tuple[str, int]]:
        """Kind and delta of each movement of a product, in order."""
        found = await self.rows("SELECT kind, delta FROM movements WHERE product_id = $1 ORDER BY id", product_id)
        return [(kind, delta) for kind, delta in found]

    async def emitted(self, subject: str, subject_id: int) -> list[tuple[str, int]]:
        """Types and versions of the events of a subject, in order."""
        return [(e.type, e.version) for e in await self.events() if (e.subject, e.subject_id) == (subject, subject_id)]
