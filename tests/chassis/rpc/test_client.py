"""The clients of one service call what it is known to call, and nothing else."""

from __future__ import annotations

import pytest

from mercato.chassis.contract import SERVICE_ROLE, Actor, Batch, Contract, Message, Retry, batched, current
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.client import Clients, Connector, UndeclaredCallError, acting, restricted
from mercato.chassis.rpc.server import LocalTransport, Server


class Number(Message):
    n: int


class Things(Contract, name="things"):
    read = batched(Number, Number, allow=frozenset(), retry=Retry.SAFE)
    change = batched(Number, Number, allow=frozenset())


async def echo(batch: Batch[Number]) -> list[Number]:
    return list(batch)


def clients() -> Clients:
    clock = SystemClock()
    server = Server(Things, clock)
    server.register(Things.read, echo)
    server.register(Things.change, echo)
    made = Connector(clock, Telemetry()).client(Things, LocalTransport({"things": server}))
    return lambda _contract: made  # pyright: ignore[reportReturnType]  # there is one contract here


async def test_a_declared_call_goes_through_the_shared_batcher():
    whole = clients()
    client = restricted(whole, "orders", {"things.read"})(Things)
    current.set(acting(Actor(SERVICE_ROLE), clock=SystemClock(), seconds=30.0))

    assert client.read is whole(Things).read
    assert await client.read(Number(n=1)) == Number(n=1)
    assert list(await client.read.many([Number(n=1), Number(n=2)])) == [Number(n=1), Number(n=2)]


async def test_an_undeclared_call_is_refused_before_it_is_sent():
    client = restricted(clients(), "orders", {"things.read"})(Things)

    with pytest.raises(UndeclaredCallError, match=r"orders calls things\.change"):
        await client.change(Number(n=1))
    with pytest.raises(UndeclaredCallError):
        await client.change.many([Number(n=1)])
