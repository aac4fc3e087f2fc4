"""What a user of NATS may do, as the server enforces it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio
from nats.aio.msg import Msg
from structlog.testing import capture_logs

from embedded_nats.broker import PASSWORD, Broker, started
from mercato.chassis.messaging.outbox import event_log
from mercato.chassis.rpc.transports.nats import NatsConnection, NotConnected, permissions
from mercato.contracts.orders import Orders
from mercato.contracts.payments import Payments
from mercato.embedded_nats import NatsUser
from mercato.testing.assertions import needs_assertions
from mercato.testing.waiting import until_true

ORDERS = permissions("orders", serves=[Orders, event_log("orders")], calls=[Payments.get])
PAYMENTS = permissions("payments", serves=[Payments], calls=[event_log("orders").read])
LISTER = permissions("lister", watches=True)


@pytest_asyncio.fixture
async def broker() -> AsyncGenerator[Broker]:
    named = {"orders": ORDERS, "payments": PAYMENTS, "lister": LISTER}
    async with started(*(NatsUser(name, PASSWORD, p.publish, p.subscribe) for name, p in named.items())) as broker:
        yield broker


class Connected:
    """A connection of a user, and what it receives."""

    def __init__(self, broker: Broker, name: str) -> None:
        self.connection = NatsConnection(broker.url, name, PASSWORD, name)
        self.received: list[Msg] = []

    async def note(self, message: Msg) -> None:
        self.received.append(message)

    async def __aenter__(self) -> Connected:
        await self.connection.open(seconds=60.0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.connection.close()


def test_subjects_are_named_one_by_one():
    assert "mercato.payments.get" in ORDERS.publish
    assert "mercato.payments.refund" not in ORDERS.publish
    assert {"mercato.orders.place", "mercato.orders.log.read", "_INBOX.orders.>"} <= set(ORDERS.subscribe)
    assert {"$SRV.PING", "$SRV.PING.orders-log", "$SRV.STATS.orders.*"} <= set(ORDERS.subscribe)
    assert not [subject for subject in ORDERS.subscribe if subject.startswith("mercato.") and "*" in subject]
    assert "mercato.orders.log.read" not in permissions("orders", serves=[Orders]).subscribe
    assert PAYMENTS.publish == (
        "mercato.orders.log.read", "$SRV.PING.orders-log", "_INBOX.>", "mercato-wake.payments",
    )  # fmt: skip
    assert permissions("nothing") == permissions("nothing", serves=[], calls=[])
    assert permissions("nothing").publish == ()


@needs_assertions
def test_a_user_whose_name_has_a_dot_has_no_inbox():
    with pytest.raises(AssertionError):
        permissions("orders.log")


@pytest.mark.parametrize("subject", ["mercato.payments.refund", "mercato.orders.place", "$SRV.PING", "$SRV.INFO"])
async def test_what_a_service_does_not_call_it_cannot_publish_to(broker: Broker, subject: str):
    async with Connected(broker, "orders") as orders, Connected(broker, "payments") as payments:
        await payments.connection.subscribe("mercato.payments.refund", payments.note)
        await payments.connection.subscribe("$SRV.PING", payments.note)
        await payments.connection.subscribe("$SRV.INFO", payments.note)
        await payments.connection.flush()
        with capture_logs() as logs:
            await orders.connection.publish(subject, b"")
            await until_true(lambda: logs)
        refused = {"event": "nats_refused", "user": "orders", "action": "publish", "subject": subject.lower()}
        assert logs == [{**refused, "log_level": "warning"}]
        await payments.connection.flush()
        assert payments.received == []
        assert orders.connection.is_connected


@pytest.mark.parametrize(
    "subject",
    ["mercato.payments.get", "mercato.>", "_INBOX.payments.>", "_INBOX.lister.*", "_INBOX.>", ">", "$SRV.>",
     "$SRV.PING.payments"],
)  # fmt: skip
async def test_what_is_not_its_own_a_service_cannot_subscribe(broker: Broker, subject: str):
    async with Connected(broker, "orders") as orders:
        with capture_logs() as logs:
            await orders.connection.subscribe(subject, orders.note)
            await until_true(lambda: logs)
        assert [(log["event"], log["subject"]) for log in logs] == [("nats_refused", subject.lower())]
        await orders.connection.flush()
        assert orders.connection.is_connected


async def test_a_user_that_only_asks_which_instances_there_are_cannot_call(broker: Broker):
    async with Connected(broker, "orders") as orders, Connected(broker, "lister") as lister:
        await orders.connection.subscribe("$SRV.PING", orders.note)
        await orders.connection.subscribe("mercato.orders.place", orders.note)
        await orders.connection.flush()
        inbox = await lister.connection.subscribe_inbox(lister.note)
        with capture_logs() as logs:
            await lister.connection.publish("mercato.orders.place", b"", reply=f"{inbox.subject}.1")
            await lister.connection.publish("$SRV.PING", b"", reply=f"{inbox.subject}.2")
            await until_true(lambda: orders.received and logs)
        (asked,) = orders.received
        await orders.connection.publish(asked.reply, b"here")
        await until_true(lambda: lister.received)
        assert [message.data for message in lister.received] == [b"here"]


async def test_a_service_answers_after_it_has_reconnected(broker: Broker):
    async with Connected(broker, "orders") as orders, Connected(broker, "payments") as payments:
        await payments.connection.subscribe("mercato.payments.get", payments.note)
        await payments.connection.flush()
        inbox = await orders.connection.subscribe_inbox(orders.note)
        await orders.connection.publish("mercato.payments.get", b"", reply=f"{inbox.subject}.1")
        await until_true(lambda: payments.received)
        assert payments.connection._client is not None
        await payments.connection._client.end(0.0)
        await until_true(lambda: not payments.connection.is_connected)
        await until_true(lambda: payments.connection.is_connected)
        await payments.connection.publish(payments.received[0].reply, b"late")
        await until_true(lambda: orders.received)
        assert [message.data for message in orders.received] == [b"late"]


async def test_nothing_is_published_without_a_connection(broker: Broker):
    async with Connected(broker, "orders") as orders:
        await broker.kill()
        await until_true(lambda: not orders.connection.is_connected)
        with pytest.raises(NotConnected):
            await orders.connection.publish("mercato.payments.get", b"")
        await asyncio.sleep(0)
