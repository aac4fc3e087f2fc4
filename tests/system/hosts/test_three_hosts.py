"""Gateway, services and NATS on hosts of their own, in network namespaces: a link is cut under load, and healed."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from mercato.embedded_nats.server import program
from mercato.testing.caller import Buyers, Caller
from mercato.testing.cluster import Cluster
from mercato.testing.command import run_command
from mercato.testing.hosts import Host, hosts, why_not
from mercato.testing.served import Served, variables
from mercato.testing.waiting import BOUND_SECONDS, wait_until

SECRET = "a secret of at least thirty-two characters"
SERVICES = ("users", "products", "inventory", "sandbox", "payments", "orders", "events")
ORDERS = 20
PORT = 4222

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(why_not()), reason=why_not())]


@contextlib.contextmanager
def broker_on(host: Host, users: Path, folder: Path) -> Generator[str]:
    """NATS on a host."""
    configuration = folder / "server.conf"
    configuration.write_text(f'listen: "{host.address}:{PORT}"\ninclude "{os.path.relpath(users, folder)}"\n')
    process = subprocess.Popen([*host.inside, str(program()), "-c", str(configuration)], stderr=subprocess.DEVNULL)
    try:
        yield f"nats://{host.address}:{PORT}"
    finally:
        process.terminate()
        process.wait(BOUND_SECONDS)


@pytest.mark.parametrize("cut", ["services", "gateway", "broker"])
def test_a_link_that_is_cut_and_healed_loses_nothing(cluster: Cluster, tmp_path: Path, cut: str):
    admin = {"MERCATO_POSTGRES_DSN": cluster.server.admin_dsn, "MERCATO_SECRET": SECRET}
    done = run_command("migrate", "--demo", "--data", str(tmp_path / "data"), environment=admin)
    assert done.returncode == 0, done.stderr
    given = tmp_path / "data" / "environment"
    with hosts(3) as (front, back, middle), broker_on(middle, given / "nats.conf", tmp_path) as url:
        common = {"NATS_URL": url, "MERCATO_PLAINTEXT": "everywhere"}
        own = {name: value for service in SERVICES for name, value in variables(given / f"{service}.env").items()}
        own |= {"MERCATO_ORDERS_CUSTOMER_OPEN_ORDERS": "0", "MERCATO_ORDERS_CUSTOMER_HELD_UNITS": "0"}
        gateway_environment = {**variables(given / "gateway.env"), **common}
        with (
            Served(*SERVICES, environment={**own, **common}, host=back.address, inside=back.inside) as services,
            Served("gateway", environment=gateway_environment, host=front.address, inside=front.inside) as gateway,
        ):
            services.ready()
            with gateway.ready().caller() as alice:
                alice.sign_in("alice@example.com", "demo-password")
                token = alice.token
            with Buyers(lambda: Caller(gateway.url, token)) as buyers:
                wait_until(lambda: len(buyers.placed) >= ORDERS, BOUND_SECONDS, lambda: str(buyers.statuses))
                link = {"services": back, "gateway": front, "broker": middle}[cut]
                link.cut()
                missed = buyers.statuses[503] + buyers.statuses[504] + buyers.unanswered
                if cut == "gateway":  # its clients are cut off as well, and only wait
                    placed = len(buyers.placed)
                else:
                    wait_until(
                        lambda: buyers.statuses[503] + buyers.statuses[504] + buyers.unanswered > missed, BOUND_SECONDS
                    )
                    placed = len(buyers.placed)
                link.heal()
                wait_until(lambda: len(buyers.placed) >= placed + ORDERS, BOUND_SECONDS, lambda: str(buyers.statuses))
            with Caller(gateway.url, token) as caller:
                buyers.assert_nothing_lost(caller)
            wait_until(lambda: audited(admin), BOUND_SECONDS)


def audited(admin: dict[str, str]) -> bool:
    """Whether everything has come to rest, and holds."""
    done = run_command("audit", "--settled", "0", "--dsn", admin["MERCATO_POSTGRES_DSN"], environment=admin)
    return done.returncode == 0
