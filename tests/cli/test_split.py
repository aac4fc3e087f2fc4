"""`mercato up --split`: each service in a process of its own. Any of them may be killed; nothing is lost."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from mercato import __version__, topology
from mercato.cli.logs import OWNER
from mercato.embedded_postgres import processes
from mercato.gateway.spans import HTTP_SECONDS
from mercato.testing.caller import BETWEEN_SECONDS, Buyers, Caller, everything
from mercato.testing.cluster import Cluster
from mercato.testing.command import run_command
from mercato.testing.process import Identity, Process, SharedProcess, command_line
from mercato.testing.waiting import BOUND_SECONDS, wait_until

ORDERS = 20
SERVICES = set(topology.SERVICES)


@pytest.fixture(scope="module")
def keeper(data: Path) -> Iterator[SharedProcess]:
    with SharedProcess(data) as made:
        yield made
        made.stop()


OTHERS = [pytest.param(name, marks=pytest.mark.long) for name in ("http", "grpc")]


@pytest.fixture(params=["nats", *OTHERS], scope="module")
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


over_one_transport = pytest.mark.parametrize("transport", ["nats"], indirect=True)
"""For what the processes do without calls between them, or whatever carries these."""


@pytest.fixture
def shop(keeper: SharedProcess, transport: str) -> Process:
    return keeper.shop("--split", "--replicas", "orders=2,gateway=2", "--transport", transport)


def recovered(shop: Process) -> None:
    """Waits until every process is there and the gateway reaches them all."""
    wait_until(lambda: len(shop.tree().instances) == len(SERVICES) + 3, BOUND_SECONDS)
    with shop.caller() as caller:
        assert caller.read("/health/ready").status == 200


def assert_nothing_lost(shop: Process, buyers: Buyers) -> None:
    recovered(shop)
    with shop.caller() as caller:
        buyers.assert_nothing_lost(caller)


def test_every_service_is_a_process_and_the_gateway_reaches_them(shop: Process):
    assert set(shop.tree().instances) == (SERVICES - {"orders"}) | {"orders.1", "orders.2", "gateway.1", "gateway.2"}
    with shop.caller() as caller:
        placed = caller.paid("reached")
        assert (placed.status, placed.json["user_id"]) == (201, 1)
        wait_until(lambda: caller.get(f"/orders/{placed.json['id']}").json["payment"] == "paid", BOUND_SECONDS)
        wanted = {"order.placed", "order.paid", "order.confirmed"}
        wait_until(lambda: wanted <= event_types(caller, placed.json["id"]), BOUND_SECONDS)
        assert caller.read("/health/ready").json["services"] == dict.fromkeys(SERVICES - {"sandbox"}, "up")


def event_types(caller: Caller, order_id: int) -> set[str]:
    """What the feed says of an order, wherever that stands in it."""
    return {e["type"] for e in everything(caller, "/events?limit=500") if e["subject"] == f"order {order_id}"}


def test_no_process_can_become_another_or_the_administrator(shop: Process):
    """What a process is given is on its standard input, and its environment can be read: it must hold no secret."""
    secret = (shop.data / "secret").read_bytes()
    for name, process in shop.tree().instances.items():
        visible = Path(f"/proc/{process.pid}/environ").read_bytes() + Path(f"/proc/{process.pid}/cmdline").read_bytes()
        for hidden in (secret, secret.hex().encode(), b"postgresql://", b"MERCATO_SERVICE_SECRET", b"DATABASE_URL"):
            assert hidden not in visible, name


@pytest.mark.parametrize("target", ["orders.1", pytest.param("users", marks=pytest.mark.long)])
def test_a_process_that_is_killed_starts_again_and_no_order_is_lost(shop: Process, target: str):
    """One of two, and the only one: how it is missed depends on the transport, and not on the service."""
    assert_survives(shop, target)


@over_one_transport
@pytest.mark.parametrize(
    "target",
    ["gateway.1", *(pytest.param(name, marks=pytest.mark.long) for name in sorted(SERVICES - {"orders", "users"}))],
)
def test_any_other_process_that_is_killed_starts_again_and_no_order_is_lost(shop: Process, target: str):
    assert_survives(shop, target)


def assert_survives(shop: Process, target: str) -> None:
    with Buyers(shop.caller, pause_seconds=BETWEEN_SECONDS) as buyers:
        wait_until(lambda: len(buyers.placed) >= ORDERS, BOUND_SECONDS, lambda: str(buyers.statuses))
        before = shop.tree().instances[target]
        shop.kill(before)
        wait_until(lambda: shop.tree().instances.get(target) not in (before, None), BOUND_SECONDS)
        placed = len(buyers.placed)
        wait_until(lambda: len(buyers.placed) >= placed + ORDERS, BOUND_SECONDS, lambda: str(buyers.statuses))
    assert_nothing_lost(shop, buyers)


def test_a_gateway_is_not_ready_and_says_why_while_a_service_does_not_answer(shop: Process):
    users = shop.tree().instances["users"]
    pause(users)
    try:
        with shop.caller() as caller:
            answer = caller.get("/health/ready")
            assert answer.status == 503
            assert answer.json["services"]["users"] == "down"
            assert set(answer.json["reasons"]) == {"users"}
            assert "within a second" in answer.json["reasons"]["users"]
            assert caller.get("/products").status == 200, "what needs no users goes on"
    finally:
        resume(users)
    recovered(shop)


def pause(process: Identity) -> None:
    processes.send(process, signal.SIGSTOP)


def resume(process: Identity) -> None:
    processes.send(process, signal.SIGCONT)


@over_one_transport
@pytest.mark.parametrize("name", ["nats-server", "postgres"])
def test_a_killed_database_or_nats_server_is_started_again(shop: Process, name: str):
    with Buyers(shop.caller, pause_seconds=BETWEEN_SECONDS) as buyers:
        wait_until(lambda: len(buyers.placed) >= ORDERS, BOUND_SECONDS, lambda: str(buyers.statuses))
        shop.kill(server(shop, name))
        shop.wait_for_line(f"{'NATS' if name == 'nats-server' else 'PostgreSQL'} is running again")
        placed = len(buyers.placed)
        wait_until(lambda: len(buyers.placed) >= placed + ORDERS, BOUND_SECONDS, lambda: str(buyers.statuses))
    assert_nothing_lost(shop, buyers)


def server(shop: Process, name: str) -> Identity:
    tree = shop.tree()
    if name == "postgres":
        assert tree.postmaster is not None
        return tree.postmaster
    return next(p for p in tree.others if name in command_line(p.pid) and "guard.py" not in command_line(p.pid))


@pytest.mark.long
def test_every_process_ends_when_the_owner_is_killed(keeper: SharedProcess):
    shop = keeper.shop("--split", "--replicas", "gateway=2")
    metrics = metrics_folder(shop)
    with Buyers(shop.caller, pause_seconds=BETWEEN_SECONDS) as buyers:
        wait_until(lambda: len(buyers.placed) >= ORDERS, BOUND_SECONDS, lambda: str(buyers.statuses))
        assert metrics.is_dir()
        shop.kill()
        shop.assert_gone()
    assert not metrics.exists()
    for command in (("services",), ("doctor",), ("call", "orders.get", '{"id": 1}')):
        refused = run_command(*command, "--data", str(shop.data), environment={})
        assert (refused.returncode, "no shop that is split runs on" in refused.stderr) == (1, True), refused.stderr
    keeper.end()

    shop = keeper.shop("--split")
    with shop.caller() as caller:
        buyers.assert_nothing_lost(caller)


@pytest.mark.long
def test_a_fault_is_injected_where_its_point_is(keeper: SharedProcess):
    """The orders process dies behind the commit, and no other does. The request is repeated within its time."""
    shop = keeper.shop("--split", MERCATO_FAULTS="orders.place.after_commit=kill")
    before = shop.tree().instances
    with shop.caller() as caller:
        assert caller.order("a-key").status in (201, 503, 504)
    wait_until(lambda: shop.tree().instances.get("orders") not in (before["orders"], None), BOUND_SECONDS)
    assert {n: p for n, p in shop.tree().instances.items() if n != "orders"} == {
        n: p for n, p in before.items() if n != "orders"
    }
    keeper.end()

    with keeper.shop().caller() as caller:
        order = caller.ordered("a-key")
        assert order.status == 201
        assert caller.ordered("a-key").json["id"] == order.json["id"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--replicas", "order=2"], "--replicas names 'order', and there are gateway, users"),
        (["--replicas", "orders=0"], "write it as orders=2"),
        (["--replicas", "orders"], "write it as orders=2"),
        (["--split", "--workers", "2"], "--workers is for a shop in one place"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(tmp_path: Path, options: list[str], words: str):
    with Process(tmp_path / "data", *options) as shop:
        assert words in shop.refusal()
        assert not (tmp_path / "data").exists()


# ------------------------------------------------------------------------------------------------------------- metrics

LISTED_HERE_ALONE = "/stock"
"""No other test asks for it: a request of theirs may be counted late, for its answer comes first."""


def reads_counted(shop: Process) -> int:
    """How often levels were listed, as a gateway says on a new connection."""
    return sum(
        int(sample.value)
        for sample in samples(shop)
        if sample.name == f"{HTTP_SECONDS}_count" and sample.labels["http_route"] == LISTED_HERE_ALONE
    )


def samples(shop: Process) -> list[Sample]:
    """Of the requests, and of the processes, that a gateway shows."""
    with shop.caller() as caller:
        families = list(text_string_to_metric_families(caller.get("/metrics").text))
    wanted = (HTTP_SECONDS, "process_start_time_seconds")
    return [sample for family in families if family.name in wanted for sample in family.samples]


def measured_gateways(shop: Process) -> set[str]:
    return {sample.labels["pid"] for sample in samples(shop) if sample.name.startswith("process_")}


def gateways(shop: Process) -> set[str]:
    return {str(process.pid) for name, process in shop.tree().instances.items() if name.startswith("gateway.")}


def metrics_folder(shop: Process) -> Path:
    """Where the gateways share their metrics."""
    environment = Path(f"/proc/{shop.tree().instances['gateway.1'].pid}/environ").read_bytes().split(b"\0")
    [found] = [line for line in environment if line.startswith(b"PROMETHEUS_MULTIPROC_DIR=")]
    return Path(os.fsdecode(found.partition(b"=")[2]))


@over_one_transport
def test_any_gateway_shows_the_metrics_of_all(shop: Process):
    recovered(shop)
    for _ in range(ORDERS):
        with shop.caller() as caller:  # each on a connection of its own: both gateways answer some
            assert caller.get(LISTED_HERE_ALONE).status == 200
    # A request is counted when its answer has been sent.
    wait_until(lambda: reads_counted(shop) >= ORDERS, BOUND_SECONDS)

    assert {reads_counted(shop) for _ in range(10)} == {ORDERS}
    assert measured_gateways(shop) == gateways(shop)


@over_one_transport
def test_what_a_gateway_has_counted_outlives_it_and_what_it_had_in_work_does_not(shop: Process):
    recovered(shop)
    with shop.caller() as caller:
        assert caller.get("/products").status == 200
    before, killed, folder = reads_counted(shop), shop.tree().instances["gateway.1"], metrics_folder(shop)
    assert list(folder.glob(f"gauge_livesum_{killed.pid}.db"))

    shop.kill(killed)
    wait_until(lambda: shop.tree().instances.get("gateway.1") not in (killed, None), BOUND_SECONDS)
    recovered(shop)

    assert not list(folder.glob(f"gauge_live*_{killed.pid}.db"))
    assert {reads_counted(shop) for _ in range(10)} == {before}
    # The other gateway may have said that all is ready while the new one starts.
    wait_until(lambda: measured_gateways(shop) == gateways(shop), BOUND_SECONDS)


@over_one_transport
def test_the_owner_shows_the_audits_to_a_collector_on_this_machine(shop: Process):
    """No other process makes them."""

    def urls() -> dict[str, str]:
        return json.loads((shop.data / "processes.json").read_text())["urls"]

    # A process that was started again is there when it is ready.
    wait_until(lambda: set(urls()) == {OWNER, *shop.tree().instances}, BOUND_SECONDS)
    with Caller(urls()[OWNER]) as caller:
        text = caller.get("/metrics").text
        assert "mercato_audit_timestamp_seconds" in text
        assert f'mercato_build_info{{python="{platform.python_version()}",version="{__version__}"}} 1.0' in text
        assert caller.get("/metrics", Host="shop.example").status == 403
        assert caller.get("/metrics", Forwarded="for=10.0.0.1").status == 403
        assert caller.get("/products").status == 404


# -------------------------------------------------------------------------------------- commands that look at processes


def command(shop: Process, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command(*arguments, "--data", str(shop.data), environment={})


def test_the_processes_are_listed_with_what_they_have_done(shop: Process, transport: str):
    recovered(shop)
    with shop.caller() as caller:
        assert caller.paid(f"listed-over-{transport}").status == 201
    done = command(shop, "services", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["services"]
    assert Counter(row["service"] for row in rows) == Counter({**dict.fromkeys(SERVICES, 1), "orders": 2})
    assert {row["health"] for row in rows} == {"up"}
    pids = {process.pid for process in shop.tree().instances.values()}
    assert {row["pid"] for row in rows} <= pids
    table = command(shop, "services").stdout.splitlines()
    assert table[0].split() == ["SERVICE", "INSTANCE", "PID", "VERSION", "UP", "CALLS/S", "P99", "ERRORS", "HEALTH"]
    end = table.index("")
    assert end == 1 + len(rows)
    assert table[end + 1].split() == [
        "CALLER",
        "INSTANCE",
        "CALLS",
        "OPERATIONS",
        "BREAKER",
        "IN",
        "FLIGHT",
        "MAY",
        "RETRY",
    ]
    assert called(rows, "orders", "products", "reads"), "an order has been placed"
    assert any("products" in line and "reads" in line and "closed" in line for line in table[end + 2 :])


def called(rows: Sequence[Any], caller: str, service: str, operations: str) -> list[Any]:
    """What `mercato services --json` says about the calls of `caller`, one for each of its processes that made some."""
    found = [c for row in rows if row["service"] == caller for c in row["calls"]]
    return [c for c in found if (c["service"], c["operations"]) == (service, operations)]


def test_doctor_says_what_it_sees_and_what_it_does_not(shop: Process, transport: str):
    users = shop.tree().instances["users"]
    recovered(shop)
    well = command(shop, "doctor")
    assert well.returncode == 0, well.stderr
    where = {"nats": "NATS at 127.0.0.1", "http": "a static list over HTTP", "grpc": "a static list over gRPC"}
    assert where[transport] in well.stdout
    assert f"answers (pid {users.pid}, release" in well.stdout
    pause(users)
    try:
        ill = command(shop, "doctor")
        assert ill.returncode == 1
        words = "not seen: no process has registered it" if transport == "nats" else "no answer within a second"
        assert words in ill.stdout
    finally:
        resume(users)
    recovered(shop)


def test_an_operation_is_called_from_the_command_line(shop: Process):
    recovered(shop)
    done = command(shop, "call", "products.get", '{"id": 100}')
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sku"] == "HEAD-100"
    missing = command(shop, "call", "products.get", '{"id": 999999}', "--json")
    assert (missing.returncode, json.loads(missing.stdout)["error"]["code"]) == (1, "products.not_found")
    # What only services may ask, the operator may not.
    refused = command(shop, "call", "inventory.holds")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "forbidden" in refused.stderr


@over_one_transport
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["call", "order.get"], "there is no service 'order': choose of users"),
        (["call", "orders.gett"], "orders has no operation 'gett': choose of cancel"),
        (["call", "orders.get", "{"], "the request of orders.get is not valid"),
        (["call", "orders.get", "{}"], "missing required field `id`; it needs id"),
    ],
)
def test_a_wrong_call_is_refused_in_a_sentence(shop: Process, arguments: list[str], words: str):
    done = command(shop, *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert words in done.stderr


@pytest.mark.parametrize("name", ["services", "doctor", "call"])
def test_where_no_shop_is_split_the_way_out_is_named(tmp_path: Path, name: str):
    arguments = ["call", "orders.get", '{"id": 1}'] if name == "call" else [name]
    done = run_command(*arguments, "--data", str(tmp_path), environment={})
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "by NATS_URL or MERCATO_SERVICES" in done.stderr


@pytest.mark.long
def test_a_shop_on_a_server_of_others_is_looked_at_through_its_folder(cluster: Cluster, tmp_path: Path):
    environment = {
        "MERCATO_POSTGRES_DSN": cluster.server.admin_dsn,
        "MERCATO_SECRET": "a secret of at least thirty-two characters",
    }
    with Process(tmp_path / "data", "--split", environment=environment) as shop:
        shop.ready()
        done = run_command("services", "--data", str(shop.data), environment=environment)
        assert done.returncode == 0, done.stderr
        shop.stop()
