"""A write that takes longer than its caller waits comes again with its key, and is done once; and waits that end."""

from __future__ import annotations

import asyncio

import pytest

from mercato.chassis.contract import DeadlineExceeded, Unavailable
from mercato.testing.actors import ALICE
from mercato.testing.builders import MUG
from mercato.testing.injection import Inject, Pause
from mercato.testing.waiting import until_true
from services.orders.harness import OrdersHarness, basket, mugs

WAITS_SECONDS = 2.0


@pytest.mark.parametrize(
    ("point", "is_stored"), [("orders.place.before_commit", False), ("orders.place.after_commit", True)]
)
async def test_an_order_whose_caller_timed_out_is_placed_once(
    harness: OrdersHarness, inject: Inject, point: str, is_stored: bool
):
    pause = Pause()
    remove = inject(point, pause)
    with harness.acting(ALICE, seconds=WAITS_SECONDS):
        first = asyncio.ensure_future(harness.orders.place(mugs(key="key")))
    await until_true(lambda: pause.reached.is_set() or first.done())
    assert pause.reached.is_set(), "it had begun when its caller stopped waiting"
    try:
        await first
    except DeadlineExceeded:
        pass
    else:
        # An attempt between processes has a share of the time, and the next one may have done it.
        assert harness.transport not in ("local", "loopback")
        is_stored = True
    assert await harness.count("orders") == int(is_stored)
    remove()
    pause.resume.set()

    with harness.acting(ALICE):
        again = await harness.orders.place(mugs(key="key"))
        once_more = await harness.orders.place(mugs(key="key"))

    # Between processes an attempt that no caller waits for may still be at work, and be the one.
    assert again.replayed is is_stored or (again.replayed and harness.transport != "local")
    assert (once_more.replayed, once_more.order.id) == (True, again.order.id)
    for table in ("orders", "order_products", "history"):
        assert await harness.count(table) == 1


async def test_a_wait_for_an_order_ends_when_its_process_is_asked_to_stop(harness: OrdersHarness):
    """Its caller asks another process, or answers with the order as it was."""
    order = await harness.place(basket((MUG, 1), payment_method="sandbox:slow:60000"))
    waiting = asyncio.ensure_future(harness.settled(order.id, 60_000))
    drain = harness.host.services["orders"].drain
    assert drain is not None
    drain()

    with pytest.raises(Unavailable):
        await waiting
