"""Services as consumers: the real service on a real database, and Pact's servers in the places of its providers."""

from __future__ import annotations

from collections.abc import Mapping

from mercato import topology
from mercato.chassis.hosting.host import Host
from mercato.chassis.hosting.keys import service_secrets
from mercato.chassis.hosting.service import Build
from mercato.testing.cluster import Cluster
from mercato.testing.harness import TEST_SECRET, ServiceHarness
from pacts.book import PactBook
from pacts.rpc import Idle, Stage


class ConsumerHarness(ServiceHarness):
    """One service, whose calls go to `stage`."""

    def __init__(self, cluster: Cluster, service: str, book: PactBook, idle: Mapping[str, Idle] | None = None) -> None:
        super().__init__(cluster, "local")
        self.service = service  # pyright: ignore[reportAttributeAccessIssue]  # of this instance
        self.stage = Stage(book, idle)
        self.expects = self.stage.expects

    async def start(self) -> None:
        await self.open(topology.builds([self.service]))

    async def close(self) -> None:
        await super().close()
        await self.stage.transport.close()

    def _host(self, builds: Mapping[str, Build], dsns: Mapping[str, str]) -> Host:
        return Host(
            builds,
            dsns,
            secrets=service_secrets(TEST_SECRET, topology.CALLERS),
            transport=lambda _: self.stage.transport,
            options=self.options,
            may_call=topology.may_call,
        )
