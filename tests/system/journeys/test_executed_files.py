"""How many files of the product one order runs through: so much has to be understood by who reads how it is placed.

Counted is every file of which a function is called between the first byte of `POST /orders` and the moment from which
nothing more happens to the order: HTTP, gateway, services, saga. Not counted are what consumes the events of the order,
what looks for orders that were left, the sweep of idle connections, and the simulated bank, which is not ours.

What runs now and then may run during an order, on a slow machine longer than on a quick one; there, a step may take too
long, and is tried again. So several are counted where one has too many, and only what all of them run through is what
an order runs through.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator, Generator, Mapping
from pathlib import Path
from types import FrameType
from typing import Final

import msgspec
import pytest
import pytest_asyncio

import mercato
from mercato import topology
from mercato.chassis.hosting.host import Host
from mercato.chassis.hosting.service import Build
from mercato.chassis.postgres import outbox_row
from mercato.testing.cluster import Cluster
from mercato.testing.harness import ServiceHarness
from mercato.testing.shop import Shop
from mercato.testing.shop_data import new_person, new_product
from mercato.testing.waiting import until

PACKAGE: Final = Path(mercato.__file__).parent
SWEEP: Final = "chassis/http/server.py"
"""Nor what it calls: once a second, which on a slow machine is during each order."""
DRIVING: Final = "drive sagas"
"""The one periodic task that is a part of an order."""
CONTINUING: Final = frozenset({"orders", "payments", "sandbox"})
"""The services whose other periodic tasks continue what a step has left undone."""
NOT_COUNTED: Final = ("testing/", "simulators/", SWEEP)

PLACED: Final = 32
PAID: Final = 38
ORDERS: Final = 6


class OrdersAlone(ServiceHarness):
    """Nothing runs in the background but the sagas of orders, and what continues them."""

    def _host(self, builds: Mapping[str, Build], dsns: Mapping[str, str]) -> Host:
        host = super()._host(builds, dsns)
        assert isinstance(host, Host)
        host.consumers.clear()
        for source in host.services.values():
            source.database.on_events.clear()
            source.database.pack = outbox_row.pack  # the tests' own also checks the events
        for name, service in host.services.items():
            tasks = service.tasks if name in CONTINUING else ()
            host.services[name] = msgspec.structs.replace(service, tasks=tasks, has_outbox=False)
        return host


@pytest_asyncio.fixture
async def shop(cluster: Cluster) -> AsyncGenerator[Shop]:
    made = await Shop.start(cluster, is_open=False, harness_class=OrdersAlone)
    # As most requests are: traced, and not recorded.
    made.harness.host.telemetry.tracing.start(0.0, kept_a_second=0.0)
    try:
        yield made
    finally:
        await made.close()


@contextlib.contextmanager
def counting(files: dict[str, str]) -> Generator[None]:
    """Notes each file of the product whose functions are called in this block, with the first of them."""
    before = sys.getprofile()

    def note(frame: FrameType, event: str, _arg: object) -> None:
        # The body of a coroutine that was begun before is resumed, not called.
        if event == "call" and frame.f_lasti <= FIRST_INSTRUCTIONS:
            code = frame.f_code
            if code.co_filename.startswith(f"{PACKAGE}/"):
                name = code.co_filename[len(f"{PACKAGE}/") :]
                if not name.startswith(NOT_COUNTED) and not is_maintenance() and not is_swept(frame):
                    files.setdefault(name, code.co_qualname)

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


def is_swept(frame: FrameType | None) -> bool:
    """Whether the sweep is among the callers."""
    while frame is not None and not frame.f_code.co_filename.endswith(SWEEP):
        frame = frame.f_back
    return frame is not None


def is_maintenance() -> bool:
    """Whether a periodic task runs that no order asked for, or metrics are added up."""
    task = asyncio.current_task()
    if task is None:
        return False
    service, _, name = task.get_name().partition(": ")
    return service == "metrics" or (service in topology.SERVICES and name != DRIVING)


FIRST_INSTRUCTIONS: Final = 8
"""Bytes of a function up to where it begins (`COPY_FREE_VARS`, `RETURN_GENERATOR`, `POP_TOP`, `RESUME`)."""


@pytest.mark.parametrize(("fields", "limit"), [({}, PLACED), ({"payment_method": "sandbox:ok"}, PAID)])
async def test_one_order_runs_through_few_files(shop: Shop, fields: Mapping[str, str], limit: int):
    person, product = await new_person(shop), await new_product(shop)
    assert person.token
    stocked = await shop.put(f"/products/{product.id}/stock", {"on_hand": ORDERS + 1}, token=await shop.staff())
    assert stocked.status == 200, stocked.body
    order = {"user_id": person.id, "product_id": product.id, **fields}
    await place(shop, person.token, order)  # what only the first order does, such as fetching keys, is done

    end_following(shop)

    files = await files_of(shop, person.token, order)
    for _ in range(ORDERS - 1):
        if len(files) <= limit:
            break
        again = await files_of(shop, person.token, order)
        files = {name: function for name, function in files.items() if name in again}

    listed = "\n".join(f"  {name:<45} {function}" for name, function in sorted(files.items()))
    assert len(files) <= limit, f"{len(files)} files:\n{listed}"


def end_following(shop: Shop) -> None:
    """Ends the task that asks for ended sessions every second; for a customer's order it is not needed."""
    [following] = [task for task in asyncio.all_tasks() if task.get_name().endswith(": follow ended sessions")]
    following.cancel()


async def files_of(shop: Shop, token: str, order: Mapping[str, object]) -> dict[str, str]:
    files: dict[str, str] = {}
    with counting(files):
        await place(shop, token, order)
    return files


async def place(shop: Shop, token: str, order: Mapping[str, object]) -> None:
    reply = await shop.post("/orders", order, token=token)
    assert reply.status == 201, reply.body

    async def is_settled() -> bool:
        sql = "SELECT step, driver FROM sagas WHERE subject_id = $1"
        left = await shop.harness.rows(sql, reply.json["id"], of="orders")
        return left in ([], [("awaiting", None)])

    await until(is_settled, "nothing more happens to the order")
    status = "confirmed" if "payment_method" in order else "pending"
    found = await shop.harness.values("SELECT status FROM orders WHERE id = $1", reply.json["id"], of="orders")
    assert found == [status]
    await asyncio.sleep(0)
