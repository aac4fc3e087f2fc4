"""The chart has the services of `topology.py`, and gives each the settings, Secrets and connections that it needs."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any, Final

import pytest

from charts.chart import (
    EVERYTHING,
    MIGRATE,
    SCENARIOS,
    SERVICES,
    SERVING,
    TEST,
    Document,
    Pod,
    called_by,
    chart,
    of_kind,
    pods,
    rendered,
    scenario,
)
from charts.rules import connections, secrets_of
from mercato import topology
from mercato.chassis.hosting import settings as config
from mercato.chassis.hosting.host import GATEWAY
from mercato.chassis.hosting.settings import SettingsError
from mercato.chassis.rpc.discovery.dns import DnsRegistry
from mercato.cli import credentials, environment, nats, settings

DIRECT: Final[Mapping[str, str]] = {
    "http": "http",
    "grpc": "grpc",
    "everything-over-http": "http",
    "everything-over-grpc": "grpc",
}
"""By scenario, the transport without a broker."""
OTEL: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""Of OpenTelemetry, which reads it by itself."""
PASSED_ON: Final = "POSTGRES_PASSWORD"
"""A part of another variable."""
SECRET: Final = "x" * 32
SERVER: Final = f"postgresql://admin:password@db.internal/postgres?sslmode=verify-full&sslrootcert={__file__}"
"""Certificates that are there; no connection is made."""


def pod_of(documents: Sequence[Document], component: str) -> Pod:
    return next(pod for pod in pods(documents) if pod.component == component)


def variables(pod: Pod) -> dict[str, str]:
    """Those of the first container; a value from a Secret is `SECRET`."""
    return {each["name"]: each.get("value", SECRET) for each in pod.containers[0].get("env", ())}


# ------------------------------------------------------------------------------------------------------------- services


def has_grpc(name: str, component: str) -> bool:
    """Whether a component answers the API over gRPC."""
    return component == GATEWAY and bool(SCENARIOS[name].get("grpc"))


def test_the_services_are_those_of_the_topology():
    values = chart().values
    assert set(values["services"]) == set(SERVING)
    for name in SCENARIOS:
        deployments = of_kind(scenario(name), "Deployment")
        assert set(deployments) == {f"mercato-{component}" for component in SERVING}
        for pod in pods(list(deployments.values())):
            grpc = ["--grpc-port", "9090"] if has_grpc(name, pod.component) else []
            assert [container["args"] for container in pod.containers] == [["serve", pod.component, *grpc]]


def test_the_databases_of_all_services_are_migrated():
    schema: Any = chart().schema
    assert schema["definitions"]["server"]["properties"]["services"]["items"]["enum"] == list(SERVICES)
    given = EVERYTHING["databases"]["servers"]
    assert sorted(name for server in given for name in server["services"]) == sorted(SERVICES)


@pytest.mark.parametrize("name", SCENARIOS)
def test_ports_are_those_of_the_transport_and_of_the_diagnostics(name: str):
    for component in SERVING:
        ports = {
            each["name"]: each["containerPort"] for each in pod_of(scenario(name), component).containers[0]["ports"]
        }
        rpc = {"rpc": 9080} if name in DIRECT and component != GATEWAY else {}
        diagnostics = {"diagnostics": 9190} if SCENARIOS[name].get("diagnostics") else {}
        grpc = {"grpc": 9090} if has_grpc(name, component) else {}
        assert ports == {"http": 8080, **rpc, **grpc, **diagnostics}, component
        service = of_kind(scenario(name), "Service")[f"mercato-{component}"]["spec"]
        assert {each["targetPort"]: each["port"] for each in service["ports"]} == {"http": 8080, **grpc}


@pytest.mark.parametrize("name", ["http", "grpc"])
def test_without_a_broker_a_service_is_found_by_the_addresses_of_all_its_pods(name: str):
    """Also of those that are not ready: otherwise services that need each other would never find each other.

    By one address for all pods, a connection of gRPC would bring all calls of a process to the same pod.
    """
    services = of_kind(scenario(name), "Service")
    assert set(services) == {
        *(f"mercato-{name}" for name in SERVING),
        *(f"mercato-{name}-rpc" for name in SERVICES),
    }
    for name in SERVICES:
        spec = services[f"mercato-{name}-rpc"]["spec"]
        assert (spec["clusterIP"], spec["publishNotReadyAddresses"]) == ("None", True)
        assert [(port["name"], port["port"], port["targetPort"]) for port in spec["ports"]] == [("rpc", 9080, "rpc")]


# ------------------------------------------------------------------------------------------------------------- settings

READERS: Final[Mapping[str, str]] = {row.name: row.readers for row in settings.rows()}
"""By variable, who reads it: commands, a service, or all."""


def unread(pod: Pod) -> list[str]:
    """The variables of a pod that its process does not read: unknown ones would end its start."""
    wanted = {"all", "migrate"} if pod.component == MIGRATE else {"all", "serve", pod.component}
    names = variables(pod).keys() - {OTEL, PASSED_ON}
    return sorted(name for name in names if not wanted & set(READERS.get(name, "").split(", ")))


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_variable_is_a_setting_that_the_process_reads(name: str):
    found = {pod.owner: unread(pod) for pod in pods(scenario(name)) if pod.component != TEST}
    assert len(found) > len(SERVING)
    assert {owner: names for owner, names in found.items() if names} == {}


def test_a_variable_that_is_not_read_is_found():
    documents: Any = deepcopy(list(scenario("default")))
    pod = pod_of(documents, "orders")
    pod.spec["containers"][0]["env"] += [
        {"name": "MERCATO_LISTEN_PROT", "value": "8080"},
        {"name": "MERCATO_USERS_MAIL", "value": "smtp://mail"},
    ]
    assert unread(pod) == ["MERCATO_LISTEN_PROT", "MERCATO_USERS_MAIL"]


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Mapping[str, str]]:
    """The content of the Secrets that `mercato credentials` prints, by name."""
    monkeypatch.setenv("MERCATO_SECRET", SECRET)
    options = credentials.Options(services=(), dsn=SERVER, pooler=None, prefix="mercato", admin_secret=None)
    assert credentials.run(options) == 0
    monkeypatch.delenv("MERCATO_SECRET")
    return {each["metadata"]["name"]: each["stringData"] for each in json.loads(capsys.readouterr().out)["items"]}


@pytest.fixture
def secrets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Mapping[str, str]]:
    for variable in [variable for variable in os.environ if variable.startswith(("MERCATO_", "DATABASE_URL", "NATS_"))]:
        monkeypatch.delenv(variable)
    return printed(capsys, monkeypatch)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_process_starts_with_its_variables_and_its_secret(
    name: str, secrets: Mapping[str, Mapping[str, str]], monkeypatch: pytest.MonkeyPatch
):
    """As far as `mercato serve` reads them before it connects; the certificates are not there."""
    for component in SERVING:
        with monkeypatch.context() as own:
            for variable, value in {
                **secrets[f"mercato-{component}"],
                **variables(pod_of(scenario(name), component)),
            }.items():
                own.setenv(variable, value)
            start(component, DIRECT.get(name, "nats"))


def start(component: str, transport: str) -> None:
    """Raises `SettingsError` for what the process would refuse."""
    loaded = settings.load(config.ServeSettings)
    given = environment.given([component], loaded)
    assert set(given.dsns) == {component} - {GATEWAY}
    environment.check_origins(loaded.cors_origin)
    if (address := environment.diagnostics_address(loaded)) is not None:
        environment.require_encryption("diagnostics", address[0], loaded, is_encrypted=loaded.tls_ca is not None)
    assert loaded.carrier == transport
    if transport == "nats":
        assert loaded.services == ""
        assert nats.connections({}, loaded) == {}
        return
    assert loaded.nats_url is None
    registry, registrar = environment.registry(loaded)
    assert isinstance(registry, DnsRegistry)
    assert registrar is None
    expected = {service: (f"mercato-{service}-rpc", 9080) for service in called_by(component)}
    assert registry._names == {**expected, **{f"{service}.log": address for service, address in expected.items()}}
    if component != GATEWAY:
        host, port = environment.rpc_address(loaded)
        assert (host, port) == ("0.0.0.0", 9080)
        environment.require_encryption("calls", host, loaded, is_encrypted=loaded.tls_ca is not None)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_secrets_of_the_processes_are_those_that_mercato_credentials_prints(
    name: str, secrets: Mapping[str, Mapping[str, str]]
):
    for pod in pods(scenario(name)):
        for source in pod.containers[0].get("envFrom", ()):
            assert source["secretRef"]["name"] in secrets, pod.owner
        for variable in pod.containers[0].get("env", ()):
            reference = variable.get("valueFrom", {}).get("secretKeyRef", {})
            if reference.get("name") == "mercato-admin":
                assert reference["key"] in secrets["mercato-admin"], pod.owner
    assert set(secrets["mercato-nats"]) == {"mercato.conf"}, "which nats-values.yaml includes"


def test_a_secret_of_another_service_ends_the_start_of_a_process(
    secrets: Mapping[str, Mapping[str, str]], monkeypatch: pytest.MonkeyPatch
):
    for variable, value in {**secrets["mercato-users"], **variables(pod_of(scenario("default"), "orders"))}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match="DATABASE_URL_ORDERS is missing"):
        start("orders", "nats")


def test_settings_of_one_service_are_given_to_it_alone_and_override_those_of_all():
    documents = scenario("everything")
    orders, users = variables(pod_of(documents, "orders")), variables(pod_of(documents, "users"))
    assert (orders["MERCATO_LOG_LEVEL"], users["MERCATO_LOG_LEVEL"]) == ("debug", "info")
    assert orders["MERCATO_ORDERS_LEASE_SECONDS"] == "3"
    assert "MERCATO_ORDERS_LEASE_SECONDS" not in users
    assert variables(pod_of(documents, MIGRATE))["MERCATO_LOG_LEVEL"] == "info"
    origins = {component: variables(pod_of(documents, component)).get("MERCATO_CORS_ORIGIN") for component in SERVING}
    assert origins == {**dict.fromkeys(SERVING), GATEWAY: "https://shop.example, http://localhost:3000"}
    assert users["MERCATO_USERS_MAIL_SENDER"] == "Shop <shop@example.com>"
    assert users["MERCATO_USERS_ADDRESS"] == "https://shop.example"


def test_a_variable_is_set_once():
    for name in SCENARIOS:
        for pod in pods(scenario(name)):
            names = [each["name"] for each in pod.containers[0].get("env", ())]
            assert len(names) == len(set(names)), pod.owner


# -------------------------------------------------------------------------------------------------------------- Secrets

SHARED: Final[Mapping[str, Collection[str]]] = {
    "tls": {"shop-tls"},
    "everything": {"shop-tls", "metrics-token"},
    "everything-over-http": {"shop-tls", "metrics-token"},
    "everything-over-grpc": {"shop-tls", "metrics-token"},
}
"""By scenario, the Secrets that all processes which serve read."""


def allowed_secrets(name: str, component: str) -> set[str]:
    shared = set(SHARED.get(name, ()))
    if component == "orders" and "shop-tls" in shared:
        shared = {*shared - {"shop-tls"}, "orders-tls"}
    mail = {"mail"} if component == "users" and "mail" in SCENARIOS[name] else set[str]()
    return {f"mercato-{component}", *shared, *mail, *authority_of(name, component)}


def authority_of(name: str, component: str) -> set[str]:
    """The Secret with the certificate authority of a service's database server."""
    if component == GATEWAY:
        return set()
    match name:
        case "authorities":
            return {"postgres-ca"} if component in MAIN else set()
        case "cluster":
            return {"mercato-db-main-ca"}
        case "everything" | "everything-over-http" | "everything-over-grpc":
            return {"mercato-db-main-ca" if component in MAIN else "mercato-db-sales-ca"}
        case _:
            return set()


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_process_reads_its_own_secret_and_none_of_others(name: str):
    found = {component: secrets_of(pod_of(scenario(name), component)) for component in SERVING}
    assert found == {component: allowed_secrets(name, component) for component in SERVING}
    assert secrets_of(pod_of(scenario(name), TEST)) == set()


def test_only_the_migration_reads_the_secrets_of_administrators():
    def of_jobs(name: str) -> dict[str, set[str]]:
        return {pod.owner: secrets_of(pod) for pod in pods(scenario(name)) if pod.component == MIGRATE}

    assert of_jobs("default") == {"Job/mercato-migrate-main": {"mercato-admin"}}
    assert of_jobs("servers") == {
        "Job/mercato-migrate-main": {"mercato-admin"},
        "Job/mercato-migrate-sales": {"mercato-admin-sales"},
    }
    assert of_jobs("cluster") == {
        "Job/mercato-migrate-main": {"mercato-admin", "mercato-db-main-superuser", "mercato-db-main-ca"}
    }


def test_a_secret_of_another_service_is_found_wherever_it_is_read():
    documents: Any = deepcopy(list(scenario("default")))
    pod = pod_of(documents, "orders")
    container: Any = pod.spec["containers"][0]
    container["envFrom"].append({"secretRef": {"name": "mercato-users"}})
    container["env"].append({"name": "X", "valueFrom": {"secretKeyRef": {"name": "mercato-admin", "key": "secret"}}})
    volumes: Any = pod.spec["volumes"]
    volumes += [
        {"name": "a", "secret": {"secretName": "mercato-events"}},
        {"name": "b", "projected": {"sources": [{"secret": {"name": "mercato-sandbox"}}]}},
    ]
    others = {"mercato-users", "mercato-admin", "mercato-events", "mercato-sandbox"}
    assert secrets_of(pod) == {"mercato-orders", *others}


# ---------------------------------------------------------------------------------------------------------- connections

DNS: Final = "kube-system/kube-dns:53"
MAIN: Final = frozenset({"users", "products", "events"})
"""The services on the first of two servers."""


def without_spaces(found: Collection[str]) -> set[str]:
    return {each.replace(" ", "/") for each in found}


def database_of(name: str, component: str) -> set[str]:
    """The server of a service, as its policy names it."""
    if component == GATEWAY:
        return set()
    match name:
        case "servers":
            return {"10.0.0.7/32:6432" if component in MAIN else "10.0.0.8/32:5432"}
        case "cluster":
            return {"mercato-db-main:5432"}
        case "everything" | "everything-over-http" | "everything-over-grpc":
            return {"mercato-db-main:5432" if component in MAIN else "mercato-db-sales:5432"}
        case _:
            return {"namespace:5432"}


def wanted_egress(name: str, component: str) -> set[str]:
    services = {f"{service}:9080" for service in called_by(component)} if name in DIRECT else {"nats:4222"}
    observed = {"10.0.0.9/32:4318"} if "tracing" in SCENARIOS[name] else set[str]()
    mail = {"10.0.0.10/32:587"} if component == "users" and "mail" in SCENARIOS[name] else set[str]()
    return {DNS, *database_of(name, component), *services, *observed, *mail}


def wanted_ingress(name: str, component: str) -> set[str]:
    clients = {"cluster:8080", "test:8080"} if component == GATEWAY else set[str]()
    if has_grpc(name, component):
        clients.add("cluster:9090")
    callers = [caller for caller in SERVING if component in called_by(caller)] if name in DIRECT else []
    operators = {"operators:9190"} if "diagnostics" in SCENARIOS[name] else set[str]()
    return {"monitoring:8080", *clients, *(f"{caller}:9080" for caller in callers), *operators}


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "open"])
def test_a_process_reaches_what_it_needs_and_nothing_else(name: str):
    documents = scenario(name)
    found = {
        component: without_spaces(connections(documents, pod_of(documents, component), "egress"))
        for component in SERVING
    }
    assert found == {component: wanted_egress(name, component) for component in SERVING}


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "open"])
def test_a_process_is_reached_by_its_callers_and_by_nothing_else(name: str):
    documents = scenario(name)
    found = {
        component: without_spaces(connections(documents, pod_of(documents, component), "ingress"))
        for component in SERVING
    }
    assert found == {component: wanted_ingress(name, component) for component in SERVING}


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "open"])
def test_the_migration_and_the_test_reach_what_they_need(name: str):
    documents = scenario(name)
    migrate, test = pod_of(documents, MIGRATE), pod_of(documents, TEST)
    databases = {server for component in SERVICES for server in database_of(name, component)}
    assert without_spaces(connections(documents, migrate, "egress")) == {DNS, *databases}
    assert without_spaces(connections(documents, test, "egress")) == {DNS, "gateway:8080"}
    assert connections(documents, migrate, "ingress") == connections(documents, test, "ingress") == set()


def test_the_calls_are_those_of_the_topology():
    """The gateway and each service, and nothing of the operator: `mercato call` is no pod of the release."""
    assert set(topology.CALLERS) - set(SERVING) == {topology.OPERATOR}
    assert called_by("orders") == {"inventory", "payments", "products", "users"}
    assert called_by("users") == {"orders", "products"}, "it reads their events"


def test_a_peer_that_is_allowed_besides_is_found():
    documents: Any = deepcopy(list(scenario("default")))
    rule = {"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [{"port": 443}]}
    of_kind(documents, "NetworkPolicy")["mercato-orders"]["spec"]["egress"].append(rule)
    found = without_spaces(connections(documents, pod_of(documents, "orders"), "egress"))
    assert found - wanted_egress("default", "orders") == {"0.0.0.0/0:443"}


def test_postgresql_is_reached_within_the_namespace_unless_its_address_is_given():
    given = rendered({"networkPolicy": {"postgres": [{"to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}], "port": 5433}]}})
    assert "10.1.0.0/16:5433" in connections(given, pod_of(given, "orders"), "egress")
    assert "namespace:5432" not in connections(given, pod_of(given, "orders"), "egress")
