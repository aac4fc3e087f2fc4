"""The matrix of versions over gRPC, which 0.2.0 does not have: it comes with the first release that does.

Until then this checkout stands for both versions.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

import grpc
import pytest
import pytest_asyncio

from contracts.release import Releases
from mercato.testing.cluster import Cluster
from mercato.testing.waiting import BOUND_SECONDS, wait_until
from system.versions.code import SERVING, THIS, TRANSPORTS, Code, transports_of, why_not
from system.versions.load import PayingBuyers, unmendable
from system.versions.shop import Databases, Shop

ORDERS: Final = 6

pytestmark = [pytest.mark.long, pytest.mark.slow]

needs_commits = pytest.mark.skipif(bool(why_not()), reason=why_not())


@needs_commits
def test_the_matrix_has_the_transports_that_the_code_of_the_last_release_has():
    assert transports_of(Releases().entries()["0.2.0"].commit) == ("nats", "http")
    assert transports_of("HEAD") == TRANSPORTS


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server() -> AsyncGenerator[Cluster]:
    started = await Cluster.start()
    yield started
    await started.stop()


def answered_by(address: str) -> grpc.StatusCode | None:
    """The status of a method that there is not: no server but one of gRPC gives UNIMPLEMENTED."""
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/mercato.None/None")(b"", timeout=BOUND_SECONDS)
        except grpc.RpcError as error:
            return error.code()  # pyright: ignore[reportAttributeAccessIssue]: the stubs do not have it
        return None


@pytest.mark.postgres
def test_two_codes_of_a_process_serve_over_grpc(server: Cluster, tmp_path: Path):
    before = Code("this checkout as the release before", THIS.version)
    databases = Databases(server.server.admin_dsn, tmp_path, before)
    with Shop(databases, "grpc", (before, THIS)) as shop:
        shop.become({**{name: [before] for name in SERVING}, "orders": [before, THIS]})
        assert {answered_by(shop.address("orders", code)) for code in (before, THIS)} == {grpc.StatusCode.UNIMPLEMENTED}
        buyers = PayingBuyers(shop.caller, count=2)
        with buyers:
            wait_until(
                lambda: len(buyers.placed) >= ORDERS and all(shop.served("orders")[code] for code in (before, THIS)),
                explain=lambda: str(vars(buyers)),
            )
        assert unmendable(buyers.statuses, 201) == set()
        shop.become({name: [THIS] for name in SERVING})
        with shop.caller() as caller:
            buyers.assert_nothing_lost(caller)
        databases.audit()
