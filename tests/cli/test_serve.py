"""`mercato serve`: a process that is configured by its environment, as a container is, and `mercato migrate`."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import grpc
import pytest

from gateway.calls import Calls
from mercato import topology
from mercato.chassis.postgres.dsn import with_database
from mercato.testing.caller import Caller, everything
from mercato.testing.certificates import certificate
from mercato.testing.cluster import Cluster
from mercato.testing.command import run_command
from mercato.testing.responses import assert_problem
from mercato.testing.served import Served, free_address, nats_server, variables
from mercato.testing.waiting import BOUND_SECONDS, wait_until
from pgbouncer.pooler import Pooler, needs_new_pgbouncer, needs_pgbouncer
from registries.consul import consul_beside
from registries.etcd import Etcd, needs_etcd

SECRET = "a secret of at least thirty-two characters"
SERVICES = tuple(topology.SERVICES)


@pytest.fixture(scope="module")
def folder(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a migrated shop with the demo data."""
    data = tmp_path_factory.mktemp("shop") / "data"
    environment = {"MERCATO_POSTGRES_DSN": cluster.server.admin_dsn, "MERCATO_SECRET": SECRET}
    done = run_command("migrate", "--demo", "--data", str(data), environment=environment)
    assert done.returncode == 0, done.stderr
    return data / "environment"


def given(folder: Path, *names: str, addresses: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that serves `names`."""
    found: dict[str, str] = {}
    for name in names:
        found |= variables(folder / f"{name}.env")
    where = addresses or {}
    found["MERCATO_SERVICES"] = "; ".join(f"{name}={address}" for name, address in where.items())
    own = [where[name] for name in names if name in where]
    return {**found, "MERCATO_RPC_ADDRESS": own[0] if own else free_address()}


@pytest.fixture(scope="module")
def shop(folder: Path) -> Iterator[Mapping[str, Served]]:
    """Every service and the gateway, each by a command of its own."""
    addresses = {name: free_address() for name in SERVICES}
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(
                Served(name, environment=given(folder, name, addresses=addresses), options=GRPC.get(name, ()))
            )
            for name in (*SERVICES, "gateway")
        }
        yield {name: served.ready() for name, served in running.items()}


GRPC: Final[Mapping[str, tuple[str, ...]]] = dict.fromkeys(("gateway", "orders"), ("--grpc-port", "0"))


def test_each_service_answers_its_own_rows_and_the_gateway_all(shop: Mapping[str, Served]):
    rows = {"users": "/users/1", "products": "/products/100", "orders": "/orders", "payments": "/payments"}
    for name, path in rows.items():
        with shop[name].caller() as own, shop["gateway"].caller() as gateway:
            answer = own.get(path)
            assert answer.status == 200, answer.text
            assert gateway.get(path).json == answer.json
            for other in set(rows.values()) - {path}:
                assert own.get(other).status in (404, 405), "405: POST /payments is a row of orders"
            assert own.get("/health/ready").json["status"] == "ready"
            assert own.get("/health/live").status == 200
            assert "mercato_" in own.get("/metrics").text


def test_an_order_is_paid_for_across_processes(shop: Mapping[str, Served]):
    with shop["gateway"].caller() as caller, shop["orders"].caller() as direct:
        order = caller.paid("key-1").json
        wait_until(lambda: direct.get(f"/orders/{order['id']}").json["payment"] == "paid", BOUND_SECONDS)
        wait_until(lambda: types_of(caller, order["id"]) >= {"order.placed", "order.paid"}, BOUND_SECONDS)


async def test_a_guest_reads_a_payment_across_processes_over_http_and_grpc(shop: Mapping[str, Served]):
    with shop["gateway"].caller() as caller, shop["payments"].caller() as direct:
        placed = caller.post("/orders", {"product_id": 100, "payment_method": "sandbox:ok"}).json
        order, token = placed["id"], placed["access_token"]
        wait_until(lambda: everything(caller, f"/payments?order_id={order}"), BOUND_SECONDS)
        [payment] = everything(caller, f"/payments?order_id={order}")
        path = f"/payments/{payment['id']}?access_token="
        assert caller.get(path + token).json["order_id"] == order
        assert_problem(caller.get(path + "x" * 43), 404, "payments.not_found")
        assert direct.get(path + token).status == 400, "it cannot ask orders"
    asked = {"payment_id": payment["id"], "access_token": token}
    async with Calls(shop["gateway"].grpc) as calls, Calls(shop["orders"].grpc) as of_orders:
        for made in (calls, of_orders):
            assert (await made.call("orders.guest_payment", asked)).order_id == order
        assert (await calls.call("payments.get", {"id": payment["id"]})).order_id == order
        refused = await of_orders.refusal("payments.get", {"id": payment["id"]})
        assert refused.code is grpc.StatusCode.UNIMPLEMENTED


def types_of(caller: Caller, order_id: int) -> set[str]:
    return {e["type"] for e in everything(caller, "/events?limit=500") if e["subject"] == f"order {order_id}"}


def test_each_process_verifies_tokens_itself(folder: Path, shop: Mapping[str, Served]):
    """With the keys that it asks of users."""
    addresses = {"users": variables_address(shop)}
    with (
        Served(
            "products", environment=given(folder, "products", addresses=addresses), options=("--auth", "required")
        ) as own,
        own.ready().caller() as caller,
        shop["gateway"].caller() as gateway,
    ):
        new = {"name": "Lamp", "sku": "LAMP-1", "price": {"amount": "10.00", "currency": "USD"}}
        assert caller.post("/products", new).status == 401
        gateway.sign_in("alice@example.com", "demo-password")
        caller.token = gateway.token
        assert caller.post("/products", new).status == 403
        caller.token = f"{gateway.token}x"
        assert caller.post("/products", new).status == 401


def test_each_process_refuses_the_token_of_a_session_that_has_ended(folder: Path, shop: Mapping[str, Served]):
    addresses = {"users": variables_address(shop)}
    orders = Served(
        "products", environment=given(folder, "products", addresses=addresses), options=("--auth", "required")
    )
    with orders as own, own.ready().caller() as caller, shop["gateway"].caller() as gateway:
        tokens = gateway.sign_in("bob@example.com", "demo-password").json
        caller.token = gateway.token
        assert caller.post("/products", {}).status == 403
        gateway.post("/logout", {"refresh_token": tokens["refresh_token"]})

        wait_until(lambda: caller.post("/products", {}).status == 401, BOUND_SECONDS)
        wait_until(lambda: gateway.get("/users/me").status == 401, BOUND_SECONDS)


def variables_address(shop: Mapping[str, Served]) -> str:
    """Where users takes the calls of others."""
    return address_of(shop["users"])


def address_of(served: Served) -> str:
    """Where a process takes the calls of others."""
    return served.environment["MERCATO_RPC_ADDRESS"]


def test_several_services_in_one_process_call_each_other_directly(folder: Path):
    names = (*SERVICES, "gateway")
    with Served(*names, environment=given(folder, *names)) as whole, whole.ready().caller() as caller:
        order = caller.paid("key-2").json
        wait_until(lambda: caller.get(f"/orders/{order['id']}").json["payment"] == "paid", BOUND_SECONDS)
        whole.ask_to_stop()
        assert whole.exit_code() == 0
        assert [line for line in whole.errors if "error" in line] == []


def test_a_process_whose_peers_are_missing_is_not_ready_and_says_which(folder: Path):
    with Served("gateway", environment=given(folder, "gateway")) as alone, alone.ready().caller() as caller:
        answer = caller.get("/health/ready")
        assert answer.status == 503
        assert answer.json["reasons"]["orders"] == "it cannot be reached: no instance is known"
        assert answer.json["reasons"]["gateway"] == "it has not read which sessions have ended"
        assert_problem(caller.get("/products"), 503, "unavailable")


# --------------------------------------------------------------------------------------------------------- wrong input


def test_a_missing_setting_is_named(folder: Path):
    environment = given(folder, "orders")
    del environment["DATABASE_URL_ORDERS"]
    with Served("orders", environment=environment) as refused:
        assert "The setting DATABASE_URL_ORDERS is missing (or DATABASE_URL" in refused.refusal()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "DATABASE_URL_ORDERS",
            "postgresql://u:hunter2@db.example.com/orders",
            "names the host db.example.com without",
        ),
        (
            "DATABASE_URL_ORDERS",
            "postgresql://u:hunter2@db.example.com/orders?sslmode=verify-full",
            "asks to verify the server, without the certificates to do it by: add &sslrootcert=FILE",
        ),
        (
            "DATABASE_URL_ORDERS",
            "postgresql://u:hunter2@db.example.com/orders?sslmode=verify-ca&sslrootcert=/nowhere.pem",
            "asks to verify the server, and /nowhere.pem is not a file: add &sslrootcert=FILE",
        ),
        ("MERCATO_SERVICE_SECRET_ORDERS", "hunter2", "MERCATO_SERVICE_SECRET of orders is not valid"),
        ("MERCATO_PUBLIC_KEYS", "", "MERCATO_PUBLIC_KEYS is missing"),
        ("MERCATO_PUBLIC_KEYS", "orders=hunter2", "is not a name=key"),
        ("MERCATO_SERVICES", "orders", "The setting MERCATO_SERVICES is not valid"),
        ("MERCATO_REGISTRY", "zookeeper", "MERCATO_REGISTRY is not valid"),
        ("MERCATO_RPC_ADDRESS", "9083", "MERCATO_RPC_ADDRESS is missing or not valid"),
        ("MERCATO_RPC_ADDRESS", "0.0.0.0:9083", "names 0.0.0.0 without encryption"),
        ("MERCATO_TLS_CA", "/nowhere.pem", "MERCATO_TLS_CERT is missing"),
        ("MERCATO_TLS_NAME", "*.shop", "MERCATO_TLS_NAME is not valid: '*.shop' is not a name in a certificate"),
        ("MERCATO_POOL_SIZE", "0", "MERCATO_POOL_SIZE is not valid"),
        ("MERCATO_CURRENCY", "EURO", "MERCATO_CURRENCY is not valid: EURO is no currency of ISO 4217."),
    ],
)
def test_a_wrong_setting_is_named_and_no_secret_is_shown(folder: Path, name: str, value: str, words: str):
    with Served("orders", environment={**given(folder, "orders"), name: value}) as refused:
        sentence = refused.refusal()
    assert words in sentence
    assert "hunter2" not in sentence.replace("orders=hunter2", "")


def test_an_unknown_service_is_named(folder: Path):
    with Served("order", environment=given(folder, "orders")) as refused:
        assert "there is no service 'order': choose of users" in refused.refusal()


def test_a_database_that_is_not_migrated_is_refused(cluster: Cluster, folder: Path):
    environment = given(folder, "orders")
    for dsn, words in (
        (with_database(environment["DATABASE_URL_ORDERS"], "postgres"), "run `mercato migrate orders` first"),
        (cluster.server.admin_dsn, "than `mercato migrate` gives to its role: run that first"),
    ):
        with Served("orders", environment={**environment, "DATABASE_URL_ORDERS": dsn}) as refused:
            assert words in refused.refusal()


def test_migrate_says_which_certificates_are_missing(tmp_path: Path):
    dsn = "postgresql://u:hunter2@127.0.0.1:1/postgres?sslmode=verify-full&sslrootcert=/nowhere.pem"
    done = run_command("migrate", "--dsn", dsn, "--data", str(tmp_path / "data"), environment={})
    assert (done.returncode, "hunter2" in done.stderr) == (1, False)
    assert "asks to verify the server, and /nowhere.pem is not a file: add &sslrootcert=FILE" in done.stderr


def test_migrate_needs_a_server_and_known_services(tmp_path: Path, cluster: Cluster):
    alone = run_command("migrate", "--data", str(tmp_path / "data"), environment={})
    assert (alone.returncode, "name it by --dsn" in alone.stderr) == (1, True)
    wrong = run_command(
        "migrate", "order", "--dsn", cluster.server.admin_dsn, "--data", str(tmp_path / "data"), environment={}
    )
    assert (wrong.returncode, "there is no service 'order'" in wrong.stderr) == (1, True)


@pytest.mark.long
def test_a_shop_is_carried_by_any_nats_server_that_includes_what_migrate_writes(folder: Path, tmp_path: Path):
    """A real server with that configuration, and a process for each service, started by hand."""
    with nats_server(tmp_path, folder / "nats.conf") as address, contextlib.ExitStack() as stack:
        url = f"nats://{address}"
        running = {
            name: stack.enter_context(Served(name, environment={**given(folder, name), "NATS_URL": url}))
            for name in ("users", "products", "gateway")
        }
        for served in running.values():
            served.ready()
        with running["gateway"].caller() as caller:
            assert caller.get("/products/100").status == 200
            assert caller.get("/users/1").status == 200
            missing = caller.get("/health/ready").json["reasons"]
            assert missing["orders"] == "it cannot be reached: no instance answers within a second"
            assert caller.get("/health/self").json == {"status": "ready", "services": {}}
        environment = {"NATS_URL": url, **variables(folder / "operator.env")}
        seen = run_command("doctor", environment=environment)
        assert seen.returncode == 1
        assert "products   " in seen.stdout
        assert "orders     not seen" in seen.stdout


SHOWN = {"http": "HTTP", "grpc": "gRPC"}
OVER_HTTP_AND_GRPC = pytest.mark.parametrize("transport", ["http", pytest.param("grpc", marks=pytest.mark.long)])


@OVER_HTTP_AND_GRPC
def test_processes_encrypt_what_they_say_to_each_other(folder: Path, tmp_path: Path, transport: str):
    cert, key = certificate(tmp_path)
    files = {"MERCATO_TLS_CA": str(cert), "MERCATO_TLS_CERT": str(cert), "MERCATO_TLS_KEY": str(key)}
    addresses = {"products": free_address()}
    plain = {"MERCATO_RPC_TRANSPORT": transport}
    files |= plain
    with (
        Served("products", environment={**given(folder, "products", addresses=addresses), **files}) as products,
        Served("gateway", environment={**given(folder, "gateway", addresses=addresses), **files}) as gateway,
        Served("gateway", environment={**given(folder, "gateway", addresses=addresses), **plain}) as in_the_clear,
    ):
        products.ready()
        with gateway.ready().caller() as caller, in_the_clear.ready().caller() as other:
            assert caller.get("/products/100").status == 200
            assert_problem(other.get("/products/100"), 503, "unavailable")


@pytest.mark.long
@OVER_HTTP_AND_GRPC
def test_services_are_found_through_dns_and_verified_by_their_names(folder: Path, tmp_path: Path, transport: str):
    """Every resolver knows this name, and no certificate has the address."""
    cert, key = certificate(tmp_path, "localhost")
    files = {"MERCATO_TLS_CA": str(cert), "MERCATO_TLS_CERT": str(cert), "MERCATO_TLS_KEY": str(key)}
    files["MERCATO_RPC_TRANSPORT"] = transport
    address = free_address()
    port = address.rpartition(":")[2]
    found = {"MERCATO_SERVICES": f"products=localhost:{port}", "MERCATO_REGISTRY": "dns", **files}
    named = {**given(folder, "gateway"), **found}
    asking = {**found, **variables(folder / "operator.env")}
    with (
        Served("products", environment={**given(folder, "products", addresses={"products": address}), **files}) as own,
        Served("gateway", environment=named) as gateway,
        Served("gateway", environment={**named, "MERCATO_TLS_NAME": "{service}.shop.svc"}) as mistaken,
    ):
        own.ready()
        with gateway.ready().caller() as caller, mistaken.ready().caller() as refused:
            assert caller.get("/products/100").status == 200
            assert_problem(refused.get("/products/100"), 503, "unavailable")
            words = {
                "http": "its certificate is not that of products.shop.svc, which MERCATO_TLS_NAME asks for",
                "grpc": "no connection: is it encrypted by a certificate that this process verifies?",
            }[transport]
            assert refused.get("/health/ready").json["reasons"]["products"] == f"it cannot be reached: {words}"
        seen = run_command("doctor", environment=asking)
        assert f"Services are found through DNS over {SHOWN[transport]}" in seen.stdout
        assert f"127.0.0.1:{port} answers" in seen.stdout
        unseen = run_command("doctor", environment={**asking, "MERCATO_TLS_NAME": "{address}"})
        assert words.replace("products.shop.svc", "127.0.0.1") in unseen.stdout


def test_what_migrate_writes_is_for_one_service_and_its_owner_alone(folder: Path):
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in (*SERVICES, "gateway", "operator"):
        file = folder / f"{name}.env"
        assert file.stat().st_mode & 0o777 == 0o600
        secrets = {key for key in variables(file) if key != "MERCATO_PUBLIC_KEYS"}
        own = {f"MERCATO_SERVICE_SECRET_{name.upper()}"} | {
            f"DATABASE_URL_{name.upper()}" for _ in [name] if name in SERVICES
        }
        assert secrets == own


@pytest.mark.long
@OVER_HTTP_AND_GRPC
def test_processes_find_each_other_by_mdns(folder: Path, tmp_path: Path, transport: str):
    found = {"MERCATO_REGISTRY": "mdns", "MERCATO_MDNS_INTERFACES": "127.0.0.1", "MERCATO_RPC_TRANSPORT": transport}
    names = (("users", "products", "inventory", "events"), ("sandbox", "payments", "orders"), ("gateway",))
    with contextlib.ExitStack() as stack:
        *others, gateway = [
            stack.enter_context(Served(*some, environment={**given(folder, *some), **found})) for some in names
        ]
        with gateway.ready().caller() as caller:
            wait_until(lambda: caller.get("/health/ready").status == 200, BOUND_SECONDS)
            order = caller.paid("key-3").json
            wait_until(lambda: caller.get(f"/orders/{order['id']}").json["payment"] == "paid", BOUND_SECONDS)
        operator = {**variables(folder / "operator.env"), **found}

        def doctor() -> subprocess.CompletedProcess[str]:
            return run_command("doctor", "--data", str(tmp_path), environment=operator)

        # It looks for a moment, in which the processes of a busy machine may not have answered.
        wait_until(lambda: doctor().returncode == 0, BOUND_SECONDS, lambda: doctor().stdout + doctor().stderr)
        assert f"Services are found through mDNS over {SHOWN[transport]}" in doctor().stdout
        others[0].kill()
        others[0].exit_code()

        def is_missed() -> bool:
            said = doctor().stdout
            assert "nats" not in said.lower()
            return "no process has registered it" in said and "the same MERCATO_PUBLIC_KEYS" in said

        wait_until(is_missed, BOUND_SECONDS)


@pytest.mark.long
@needs_etcd
def test_processes_find_each_other_by_etcd(folder: Path, tmp_path: Path):
    with Etcd() as etcd, contextlib.ExitStack() as stack:
        etcd.require_passwords("shop", "hunter2", "/mercato/")
        found = {
            "MERCATO_REGISTRY": "etcd",
            "MERCATO_REGISTRY_URL": f"http://{free_address()},{etcd.urls[0]}",
            "MERCATO_REGISTRY_USER": "shop",
            "MERCATO_REGISTRY_PASSWORD": "hunter2",
        }
        users, products, gateway = [
            stack.enter_context(Served(name, environment={**given(folder, name), **found}))
            for name in ("users", "products", "gateway")
        ]
        operator = {**variables(folder / "operator.env"), **found}

        def doctor() -> str:
            return run_command("doctor", "--data", str(tmp_path), environment=operator).stdout

        users.ready()
        products.ready()
        with gateway.ready().caller() as caller:
            wait_until(lambda: caller.get("/products/100").status == 200, BOUND_SECONDS)
            wait_until(lambda: caller.get("/users/1").status == 200, BOUND_SECONDS)
            assert "registry" not in caller.get("/health/ready").json
            seen = doctor()
            assert "Services are found through etcd over HTTP, by the environment." in seen
            assert "orders     not seen: no process has registered it" in seen
            assert (
                "MERCATO_REGISTRY=etcd, a MERCATO_REGISTRY_URL of the same cluster, and the same MERCATO_PUBL" in seen
            )

            users.ask_to_stop()
            assert users.exit_code() == 0
            wait_until(lambda: "users      not seen" in doctor(), BOUND_SECONDS)
            assert f"{address_of(products)} answers" in doctor()

            etcd.kill()
            wait_until(lambda: "registry" in caller.get("/health/ready").json, BOUND_SECONDS)
            assert "the instances that were known last stay in use" in caller.get("/health/ready").json["registry"]
            assert caller.get("/products/100").status == 200
            assert "What is shown may be old or missing: etcd at 127.0.0.1:" in doctor()

            etcd.start()
            wait_until(lambda: "registry" not in caller.get("/health/ready").json, BOUND_SECONDS)
            products.kill()
            products.exit_code()
            wait_until(lambda: "products   not seen" in doctor(), BOUND_SECONDS)


@pytest.mark.long
def test_processes_find_each_other_by_consul(folder: Path, tmp_path: Path):
    with consul_beside("hunter2") as consul, contextlib.ExitStack() as stack:
        found = {
            "MERCATO_REGISTRY": "consul",
            "MERCATO_REGISTRY_URL": f"http://{free_address()},{consul.url}",
            "MERCATO_REGISTRY_TOKEN": "hunter2",
        }
        users, products, gateway = [
            stack.enter_context(Served(name, environment={**given(folder, name), **found}))
            for name in ("users", "products", "gateway")
        ]
        operator = {**variables(folder / "operator.env"), **found}

        def doctor() -> str:
            return run_command("doctor", "--data", str(tmp_path), environment=operator).stdout

        users.ready()
        products.ready()
        with gateway.ready().caller() as caller:
            wait_until(lambda: caller.get("/products/100").status == 200, BOUND_SECONDS)
            wait_until(lambda: caller.get("/users/1").status == 200, BOUND_SECONDS)
            assert "registry" not in caller.get("/health/ready").json
            seen = doctor()
            assert "Services are found through Consul over HTTP, by the environment." in seen
            assert "orders     not seen: no process has registered it" in seen

            users.ask_to_stop()
            assert users.exit_code() == 0
            wait_until(lambda: "users      not seen" in doctor(), BOUND_SECONDS)
            assert f"{address_of(products)} answers" in doctor()

            consul.failure = (500, "No cluster leader")
            wait_until(lambda: "registry" in caller.get("/health/ready").json, BOUND_SECONDS)
            assert "the instances that were known last stay in use" in caller.get("/health/ready").json["registry"]
            assert caller.get("/products/100").status == 200

            consul.failure = None
            wait_until(lambda: "registry" not in caller.get("/health/ready").json, BOUND_SECONDS)
            products.kill()
            products.exit_code()
            wait_until(lambda: "products   not seen" in doctor(), BOUND_SECONDS)


def test_a_token_that_consul_does_not_accept_is_one_sentence(folder: Path):
    with consul_beside("of the shop") as consul:
        found = {
            "MERCATO_REGISTRY": "consul",
            "MERCATO_REGISTRY_URL": consul.url,
            "MERCATO_REGISTRY_TOKEN": "hunter2",
        }
        with Served("orders", environment={**given(folder, "orders"), **found}) as refused:
            sentence = refused.refusal()
    assert "MERCATO_REGISTRY_TOKEN" in sentence
    assert "hunter2" not in sentence


@needs_etcd
def test_a_password_that_etcd_does_not_accept_is_one_sentence(folder: Path, tmp_path: Path):
    with Etcd() as etcd:
        etcd.require_passwords("shop", "of the shop", "/mercato/")
        found = {
            "MERCATO_REGISTRY": "etcd",
            "MERCATO_REGISTRY_URL": etcd.urls[0],
            "MERCATO_REGISTRY_USER": "shop",
            "MERCATO_REGISTRY_PASSWORD": "hunter2",
        }
        sentence = (
            "etcd does not accept the user 'shop' with this password: look at MERCATO_REGISTRY_USER and "
            "MERCATO_REGISTRY_PASSWORD"
        )
        with Served("orders", environment={**given(folder, "orders"), **found}) as refused:
            assert refused.refusal() == sentence
        asked = run_command(
            "doctor", "--data", str(tmp_path), environment={**variables(folder / "operator.env"), **found}
        )
        assert (asked.returncode, asked.stderr) == (1, f"mercato: {sentence}\n")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"MERCATO_MDNS_INTERFACES": "eth0"}, "'eth0' is not an address of this machine"),
        ({"MERCATO_RPC_ADDRESS": "0.0.0.0:9083"}, "MERCATO_RPC_ADDRESS has 0.0.0.0"),
        ({"MERCATO_PUBLIC_KEYS": ""}, "MERCATO_PUBLIC_KEYS is missing"),
    ],
)
def test_what_mdns_needs_is_named(folder: Path, setting: Mapping[str, str], words: str):
    environment = {**given(folder, "orders"), "MERCATO_REGISTRY": "mdns", **setting}
    with Served("orders", environment=environment) as refused:
        assert words in refused.refusal()


@pytest.mark.long
@needs_new_pgbouncer
def test_services_reach_their_databases_through_a_pooler(folder: Path, cluster: Cluster, tmp_path: Path):
    dsns = [variables(folder / f"{name}.env")[f"DATABASE_URL_{name.upper()}"] for name in SERVICES]
    environment = {"MERCATO_POSTGRES_DSN": cluster.server.admin_dsn, "MERCATO_SECRET": SECRET}
    with Pooler(*dsns) as pooler:
        done = run_command("migrate", "--pooler", pooler.address, "--data", str(tmp_path), environment=environment)
        assert done.returncode == 0, done.stderr
        everything_here = given(tmp_path / "environment", *SERVICES, "gateway")
        assert f"@{pooler.address}/" in everything_here["DATABASE_URL_ORDERS"]
        served = Served(*SERVICES, "gateway", environment=everything_here)
        with served, served.ready().caller() as caller:
            order = caller.paid("key-4").json
            wait_until(lambda: caller.get(f"/orders/{order['id']}").json["payment"] == "paid", BOUND_SECONDS)
            wait_until(lambda: types_of(caller, order["id"]) >= {"order.placed", "order.paid"}, BOUND_SECONDS)
            assert caller.get("/health/ready").status == 200


@pytest.mark.long
@needs_pgbouncer
def test_a_pooler_that_keeps_no_statements_is_refused_at_the_start(folder: Path):
    environment = given(folder, "users")
    with Pooler(environment["DATABASE_URL_USERS"], max_prepared_statements=0) as pooler:
        environment["DATABASE_URL_USERS"] = pooler.dsn(environment["DATABASE_URL_USERS"])
        with Served("users", environment=environment) as served:
            assert "it needs PgBouncer 1.21 or newer" in served.refusal()


@pytest.mark.parametrize("address", ["here", ":6432", "here:", "here:99999"])
def test_the_address_of_a_pooler_is_a_host_and_a_port(address: str, cluster: Cluster, tmp_path: Path):
    environment = {"MERCATO_POSTGRES_DSN": cluster.server.admin_dsn}
    done = run_command("migrate", "--pooler", address, "--data", str(tmp_path), environment=environment)
    assert (done.returncode, "it is HOST:PORT" in done.stderr) == (1, True), done.stderr
