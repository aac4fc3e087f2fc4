"""What a host does with the periodic tasks of its services."""

from __future__ import annotations

import asyncio

from mercato.chassis.hosting.host import Host
from mercato.chassis.hosting.periodic import PeriodicTask
from mercato.chassis.hosting.service import Env, Service
from mercato.chassis.rpc.server import Server
from mercato.contracts.events import Events
from mercato.testing.cluster import Cluster
from mercato.testing.harness import TEST_SECRET


async def test_a_task_that_loses_a_cancellation_is_cancelled_again(cluster: Cluster):
    entered, lost = asyncio.Event(), []

    async def work() -> int:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            lost.append(True)
        await asyncio.Event().wait()
        return 0

    def build(env: Env) -> Service:
        task = PeriodicTask("work", work, 1.0)
        return Service(server=Server(Events, env.clock), database=env.database, tasks=(task,))

    host = Host({"events": build}, {"events": cluster.server.admin_dsn}, secrets={"events": TEST_SECRET})
    await host.open()
    await entered.wait()

    async with asyncio.timeout(30):
        await host.close()

    assert lost == [True]
