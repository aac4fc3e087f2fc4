"""Certificate authorities of databases, of NATS and of the processes are where DSNs and settings name them."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Final
from urllib.parse import quote

import helm_python
import pytest
import yaml

from charts.chart import (
    AUTHORITIES,
    CLUSTER,
    GRPC,
    HTTP,
    MIGRATE,
    NAMESPACE,
    RELEASE,
    SERVICES,
    Values,
    chart,
    pods,
    rendered,
    scenario,
)
from mercato.chassis.hosting.host import GATEWAY
from mercato.chassis.hosting.settings import ServeSettings
from mercato.chassis.rpc.discovery import Instance
from mercato.cli import environment

MAIN: Final = frozenset({"users", "products", "events"})
VERIFIED: Final = "postgresql://orders:p@db/mercato_orders?sslmode=verify-full"
PUBLIC: Final = "/etc/ssl/certs/ca-certificates.crt"


# --------------------------------------------------------------------------------------------------- what pods mount


def mounts(pod: Any) -> dict[str, Any]:
    """What is mounted besides /tmp and /data, by folder."""
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    found = {mount["mountPath"]: volumes[mount["name"]] for mount in pod.spec["containers"][0]["volumeMounts"]}
    return {folder: volume for folder, volume in found.items() if folder not in ("/tmp", "/data")}


def authority(name: str, kind: str, named: str, key: str) -> dict[str, Any]:
    naming = {"secretName": named} if kind == "secret" else {"name": named}
    return {"name": name, kind: {**naming, "defaultMode": 0o440, "items": [{"key": key, "path": key}]}}


def test_each_process_has_the_authority_of_its_own_database_and_of_nats():
    main = {"/postgres": authority("postgres", "secret", "postgres-ca", "ca.crt")}
    sales = {"/sales/ca": authority("postgres", "configMap", "sales-ca", "root.pem")}
    nats = {"/nats": authority("nats", "configMap", "nats-ca", "ca.crt")}
    for pod in pods(scenario("authorities")):
        if pod.component in (*SERVICES, GATEWAY):
            own = {} if pod.component == GATEWAY else main if pod.component in MAIN else sales
            assert mounts(pod) == {**own, **nats}, pod.component
            values = {each["name"]: each.get("value") for each in pod.spec["containers"][0]["env"]}
            assert values["MERCATO_TLS_CA"] == "/nats/ca.crt"
            assert values["MERCATO_PLAINTEXT"] == "everywhere"
    jobs = {pod.owner: mounts(pod) for pod in pods(scenario("authorities")) if pod.component == MIGRATE}
    assert jobs == {"Job/mercato-migrate-main": main, "Job/mercato-migrate-sales": sales}


def test_the_authority_of_a_cluster_is_its_own_unless_another_one_is_named():
    own = authority("postgres", "secret", "mercato-db-main-ca", "ca.crt")
    assert {
        json.dumps(mounts(pod).get("/postgres")) for pod in pods(scenario("cluster")) if pod.component in SERVICES
    } == {json.dumps(own)}
    named = rendered(
        {"databases": {**CLUSTER["databases"], "ca": {"secret": "ours", "key": "root.pem", "mountPath": "/ca"}}}
    )
    [job] = [pod for pod in pods(named) if pod.component == MIGRATE]
    assert mounts(job) == {"/ca": authority("postgres", "secret", "ours", "root.pem")}
    assert "&sslrootcert=/ca/root.pem" in str(job.spec["containers"][0]["env"])


@pytest.mark.parametrize(
    ("name", "verified"),
    [("", "mercato-orders-rpc"), ("{service}.shop.svc", "orders.shop.svc"), ("{address}", "10.0.0.5")],
)
@pytest.mark.parametrize("transport", [HTTP, GRPC], ids=["http", "grpc"])
def test_without_a_broker_a_process_is_verified_by_the_name_of_its_service(
    transport: Values, name: str, verified: str, monkeypatch: pytest.MonkeyPatch
):
    documents = rendered({**transport, "tls": {"enabled": True, "name": name}})
    [gateway] = [pod for pod in pods(documents) if pod.component == GATEWAY]
    assert mounts(gateway) == {"/tls": {"name": "tls", "secret": {"secretName": "mercato-tls", "defaultMode": 0o440}}}
    for variable in gateway.spec["containers"][0]["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    settings = ServeSettings()
    listed = dict(entry.split("=") for entry in settings.services.split("; "))
    instance = Instance("orders", "10.0.0.5:9080", "1", name=listed["orders"].partition(":")[0])
    assert environment.server_name_of(settings)(instance) == verified


# ------------------------------------------------------------------------------- DSNs in the Secrets that are there


class ApiServer:
    """The part of a Kubernetes API server that Helm's `lookup` asks for: Secrets of the namespace."""

    def __init__(self, secrets: Mapping[str, Mapping[str, str]]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(secrets))
        self._thread = Thread(target=self._server.serve_forever)

    def __enter__(self) -> helm_python.Config:
        self._thread.start()
        url = f"http://127.0.0.1:{self._server.server_address[1]}"
        where = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tests", "cluster": {"server": url}}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests"}}],
            "users": [{"name": "tests", "user": {}}],
            "current-context": "tests",
        }
        return helm_python.Config(kubeconfig_content=yaml.safe_dump(where), namespace=NAMESPACE)

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _handler(secrets: Mapping[str, Mapping[str, str]]) -> type[BaseHTTPRequestHandler]:
    folder = f"/api/v1/namespaces/{NAMESPACE}/secrets/"
    resource = {"name": "secrets", "singularName": "secret", "namespaced": True, "kind": "Secret", "verbs": ["get"]}
    known: dict[str, Any] = {
        "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
        "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [resource]},
    }
    for name, values in secrets.items():
        data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
        metadata = {"name": name, "namespace": NAMESPACE}
        known[folder + name] = {"kind": "Secret", "apiVersion": "v1", "metadata": metadata, "data": data}
    missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name that http.server calls
            answer = known.get(self.path.partition("?")[0])
            body = json.dumps(answer or missing).encode()
            self.send_response(200 if answer else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def installed(values: Values, secrets: Mapping[str, Mapping[str, str]]) -> Mapping[str, str]:
    with ApiServer(secrets) as config:
        return config.render(chart(), dict(values), name=RELEASE, namespace=NAMESPACE)


def of_orders(dsn: str) -> dict[str, dict[str, str]]:
    return {"mercato-orders": {"DATABASE_URL_ORDERS": dsn, "MERCATO_PUBLIC_KEYS": "orders=x"}}


NAMED: Final[Values] = {"databases": {"ca": {"secret": "postgres-ca"}}}
REFUSED: Final[Mapping[str, tuple[Values, Mapping[str, Mapping[str, str]], str]]] = {
    "no authority is named": (
        {},
        of_orders(f"{VERIFIED}&sslrootcert={quote('/postgres/ca.crt', safe='')}"),
        "databases.ca: the DSN in the Secret mercato-orders has sslrootcert=/postgres/ca.crt, a file that the pods do "
        "not have: name the Secret or the ConfigMap that is mounted as /postgres/ca.crt.",
    ),
    "another file is mounted": (
        NAMED,
        of_orders(f"{VERIFIED}&sslrootcert=/postgres/root.pem"),
        "the DSN in the Secret mercato-orders has sslrootcert=/postgres/root.pem, a file that the pods do not "
        "have: the authority is mounted as /postgres/ca.crt.",
    ),
    "the authority of another server": (
        AUTHORITIES,
        of_orders(f"{VERIFIED}&sslrootcert=/postgres/ca.crt"),
        "a file that the pods do not have: the authority is mounted as /sales/ca/root.pem.",
    ),
    "no file is named": (
        NAMED,
        of_orders(VERIFIED),
        "databases.ca: the DSN in the Secret mercato-orders verifies the server without a file to do it by: add "
        "sslrootcert to it.",
    ),
    "the administrator's": (
        {},
        {"mercato-admin": {"postgres-dsn": f"{VERIFIED}&sslrootcert=/here/ca.crt", "secret": "x" * 32}},
        "the DSN in the Secret mercato-admin has sslrootcert=/here/ca.crt, a file that the pods do not have",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_dsn_that_names_a_file_which_no_mount_has_is_refused(name: str):
    values, secrets, sentence = REFUSED[name]
    with pytest.raises(helm_python.HelmRenderError) as failure:
        installed(values, secrets)
    assert sentence in str(failure.value)
    assert "orders:p@" not in str(failure.value)


def accepted() -> Iterator[tuple[Values, Mapping[str, Mapping[str, str]]]]:
    for dsn in (f"{VERIFIED}&sslrootcert={PUBLIC}", "postgresql://orders:p@db/mercato_orders?sslmode=require"):
        yield {}, of_orders(dsn)
        yield NAMED, of_orders(dsn)
    yield NAMED, of_orders("postgresql://orders:p@db/mercato_orders?sslrootcert=%2Fpostgres%2fca.crt&sslmode=verify-ca")
    yield AUTHORITIES, of_orders(f"{VERIFIED}&sslrootcert=/sales/ca/root.pem")
    yield CLUSTER, of_orders(f"{VERIFIED}&sslrootcert=/postgres/ca.crt")


@pytest.mark.parametrize(("values", "secrets"), list(accepted()))
def test_a_dsn_that_names_a_file_of_the_pods_is_taken(values: Values, secrets: Mapping[str, Mapping[str, str]]):
    assert installed(values, secrets).keys() == chart().render(dict(values), name=RELEASE, namespace=NAMESPACE).keys()
