"""What the gateway needs of the services: its routes run, each answered by an example that is made of the contract.

An answer has every field first. What the route reads of it, and what the decoder requires, is what the pact states.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import pytest
import pytest_asyncio

from mercato import topology
from mercato.chassis.contract import Context, Operation
from mercato.chassis.hosting.periodic import PeriodicTask
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.client import Connector
from mercato.chassis.rpc.codec import decode_outcomes, encode_requests
from mercato.contracts.events import Events
from mercato.contracts.inventory import Inventory
from mercato.contracts.orders import Orders
from mercato.contracts.payments import Payments
from mercato.contracts.products import Products
from mercato.contracts.users import Users
from pacts.book import PactBook
from pacts.reading import Reads
from pacts.rpc import Exchange, Stage, State, given
from pacts.samples import pruned, sample
from pacts.states import PASSWORD, email_of

CONSUMER: Final = "gateway"

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Need(NamedTuple):
    """A request of a client, which the gateway answers by one operation."""

    operation: Operation[Any, Any]
    method: str
    path: str
    states: tuple[State, ...]
    body: Mapping[str, Any] | None = None
    values: Mapping[str, Any] = {}
    """Values of the answer that are not those of a sample, by paths."""


class Recorder:
    """A transport that gives whole samples, and notes what is sent and what is read of them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.calls: list[tuple[Operation[Any, Any], Any, Reads, dict[str, Any]]] = []

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        [sent] = msgspec.msgpack.decode(encode_requests(requests, contexts, SystemClock().monotonic()))
        answer, reads = with_values(sample(operation.answer), self._values), Reads("a sample")
        (outcome,) = decode_outcomes(operation, msgspec.msgpack.encode([{"body": answer}]))
        self.calls.append((operation, sent, reads, answer))
        return [reads.watch(outcome, answer)]


def with_values(example: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    for path, value in values.items():
        found: Any = example
        *parents, last = path.split(".")
        for name in parents:
            found = found[name][0] if isinstance(found[name], list) else found[name]
        found[last] = value
    return example


class Bare:
    """What the gateway needs of a process: clients whose calls go to one transport."""

    def __init__(self, transport: Any) -> None:
        self.clock = SystemClock()
        self.telemetry = Telemetry()
        self._connector = Connector(self.clock, self.telemetry)
        self._transport = transport

    def client(self, contract: Any, caller: str = "") -> Any:
        return self._connector.client(contract, self._transport)

    async def problems(self) -> Mapping[str, str]:
        return {}

    def also_run(self, name: str, task: PeriodicTask) -> None:
        """It verifies no token."""

    async def close(self) -> None:
        await self._connector.close()


@contextlib.asynccontextmanager
async def gateway(transport: Any) -> AsyncGenerator[topology.Gateway]:
    process = Bare(transport)
    yield topology.gateway(process, open_to=("127.0.0.1", 80))
    await process.close()


async def asked(app: topology.Gateway, need: Need) -> int:
    """The status of the answer to a client."""
    path, _, query = need.path.partition("?")
    content = b"" if need.body is None else msgspec.json.encode(need.body)
    kind = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))] if content else []
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Any) -> None:
        if "status" in message:
            statuses.append(message["status"])

    scope = {
        "type": "http",
        "method": need.method,
        "path": path,
        "raw_path": path.encode(),
        "http_version": "1.1",
        "query_string": query.encode(),
        "headers": [(b"host", b"127.0.0.1"), *kind],
        "client": ("127.0.0.1", 1),
    }
    await app(scope, receive, send)
    return statuses[0]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(book: PactBook) -> AsyncGenerator[Stage]:
    made = Stage(book)
    yield made
    await made.transport.close()


ACCOUNT: Final = given("an account", user_id=7_001)
PRODUCT: Final = given("a product", product_id=7_101, price_minor=1_250)
PIECES: Final = given("pieces in stock", product_id=7_102, pieces=5)
PAID: Final = given("an order is paid", order_id=7_601, user_id=7_601, product_id=7_500, quantity=2)
WAITING: Final = given("an order waits for its payment", order_id=7_602, user_id=7_602, product_id=7_500, quantity=2)
CANCELLABLE: Final = given(
    "an order waits for its payment", order_id=7_604, user_id=7_602, product_id=7_500, quantity=2
)
SHIPPABLE: Final = given("an order is paid", order_id=7_605, user_id=7_601, product_id=7_500, quantity=2)
ARCHIVED: Final = given("a product that is archived", product_id=7_103, price_minor=1_250)
OTHER_ACCOUNT: Final = given("an account", user_id=7_002)
ENTRY: Final = given("an entry of the feed", type="order.paid")
PAYMENT: Final = given(
    "a payment is captured", order_id=7_603, order_nonce=7_603, user_id=7_001, amount_minor=2_500, payment_id=7_603
)

NEEDS: Final = (
    Need(Users.get, "GET", "/users/7001", (ACCOUNT,)),
    Need(Users.list, "GET", "/users?email=pact-7001@example.com", (ACCOUNT,), values={"next_after": None}),
    Need(Users.update_profile, "PATCH", "/users/7001", (ACCOUNT,), {"name": "Buyer"}),
    Need(Users.set_role, "PUT", "/users/7002/role", (OTHER_ACCOUNT,), {"role": "customer"}),
    Need(Users.sign_in, "POST", "/login", (ACCOUNT,), {"email": email_of(7_001), "password": PASSWORD}),
    Need(Products.get, "GET", "/products/7101", (PRODUCT,)),
    Need(Products.search, "GET", "/products?sku=PACT-7101", (PRODUCT,), values={"next_after": None}),
    Need(Products.categories, "GET", "/categories", (PRODUCT,), values={"next_after": None}),
    Need(Products.update, "PATCH", "/products/7101", (PRODUCT,), {"name": "Mug"}),
    Need(Products.archive, "POST", "/products/7103/archive", (ARCHIVED,), {}),
    Need(Products.restore, "POST", "/products/7103/restore", (ARCHIVED,), {}),
    Need(Inventory.levels, "GET", "/products/7102/stock", (PIECES,)),
    Need(Inventory.list, "GET", "/stock?limit=1", (PIECES,)),
    Need(Inventory.set, "PUT", "/products/7102/stock", (PIECES,), {"on_hand": 10, "reason": "counted"}),
    Need(Events.list, "GET", "/events?types=order.paid&limit=1", (ENTRY,), values={"entries.traceparent": None}),
    Need(
        Orders.move,
        "PATCH",
        "/orders/7605",
        (SHIPPABLE,),
        {"fulfilment": "shipped"},
        {"reason": None, "guest_email": None},
    ),
    Need(Orders.get, "GET", "/orders/7601", (PAID,), values={"reason": None, "guest_email": None}),
    Need(
        Orders.list,
        "GET",
        "/orders?user_id=7601",
        (PAID,),
        values={"orders.reason": None, "orders.guest_email": None, "next_before": None},
    ),
    Need(Orders.timeline, "GET", "/orders/7602/timeline", (WAITING,), values={"entries.took_ms": None}),
    Need(Orders.history, "GET", "/orders/7602/history", (WAITING,), values={"entries.before": None}),
    Need(Orders.refunds, "GET", "/orders/7601/refunds", (PAID,), values={"refunds": []}),
    Need(
        Orders.cancel,
        "POST",
        "/orders/7604/cancel",
        (CANCELLABLE,),
        {"reason": "changed my mind"},
        {"reason.lines": [], "reason.provider_code": None, "guest_email": None},
    ),
    Need(Payments.get, "GET", "/payments/7603", (PAYMENT,), values={"code": None}),
    Need(
        Payments.list,
        "GET",
        "/payments?order_id=7603",
        (PAYMENT,),
        values={"payments.code": None, "next_before": None},
    ),
)


@pytest.mark.parametrize("need", NEEDS, ids=lambda each: each.operation.full_name)
async def test_a_route_has_what_it_needs_of_a_service(stage: Stage, need: Need):
    recorder = Recorder(need.values)
    async with gateway(recorder) as app:
        assert await asked(app, need) in (200, 201)
    [(operation, sent, reads, answer)] = recorder.calls
    assert operation is need.operation

    exchange = Exchange(
        description=f"{need.method} {need.path}",
        operation=operation,
        request=sent["body"],
        answer=pruned(answer, operation.answer, reads.paths),
        states=need.states,
        actor=sent["actor"],
    )
    async with stage.expects(exchange), gateway(stage.transport) as app:
        assert await asked(app, need) in (200, 201)
