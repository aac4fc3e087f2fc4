"""Links between the processes of a shop fail under load; `make network SECONDS=600` has more of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mercato.testing.cluster import Cluster
from system.chaos.network import campaign

SECONDS = 25.0


@pytest.mark.long
@pytest.mark.parametrize("transport", ["http", "nats", "grpc"])
def test_links_that_fail_lose_nothing_and_let_nothing_wait_for_ever(cluster: Cluster, tmp_path: Path, transport: str):
    result = campaign(cluster.server.admin_dsn, tmp_path, seconds=SECONDS, seed=1, transport=transport)

    assert result.errors == []
    assert result.unanswered == 0
    assert result.audit_holds
    assert result.ok
    # Not for nothing: links failed, and orders came meanwhile.
    assert result.failures
    assert result.orders > 0
