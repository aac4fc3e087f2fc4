"""Values: each is documented and has bounds, and a wrong one ends the installation with a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import helm_python
import pytest

from charts.chart import CLUSTER, GRPC, HTTP, SERVICES, SERVING, Values, chart, rendered

TARGET: Final = {"to": [{"ipBlock": {"cidr": "10.0.0.9/32"}}], "port": 4318}
ALL: Final = list(SERVICES)


def servers(*given: Mapping[str, Any]) -> Values:
    return {"databases": {"servers": list(given)}}


WRONG: Final[Mapping[str, tuple[Values, str]]] = {
    "a server with an unknown service": (
        servers({"name": "main", "services": ["shop"]}),
        "'/databases/servers/0/services/0': value must be one of 'users', 'products', 'inventory'",
    ),
    "a service on no server": (
        servers({"name": "main", "services": ALL[:-1]}),
        "databases.servers: the service events is on no server: each service is on exactly one.",
    ),
    "a service on two servers": (
        servers({"name": "main", "services": ALL}, {"name": "b", "services": ["orders"], "adminSecret": "b"}),
        "databases.servers: the service orders is on two servers, main and b: each service is on exactly one.",
    ),
    "a service twice on one server": (
        servers({"name": "main", "services": [*ALL, "orders"]}),
        "'/databases/servers/0/services': items at 5 and 7 are equal",
    ),
    "two servers of one name": (
        servers({"name": "main", "services": ALL[:3]}, {"name": "main", "services": ALL[3:], "adminSecret": "b"}),
        "databases.servers: two servers have the name main.",
    ),
    "two servers with one secret": (
        servers({"name": "main", "services": ALL[:3]}, {"name": "b", "services": ALL[3:]}),
        "databases.servers: two servers have the adminSecret mercato-admin, and so the same DSN: give each its own.",
    ),
    "a server with a long name": (
        servers({"name": "a-name-of-16-let", "services": ALL}),
        "'/databases/servers/0/name': 'a-name-of-16-let' does not match pattern",
    ),
    "a server without services": (servers({"name": "main"}), "'/databases/servers/0': missing property 'services'"),
    "more synchronous replicas than standbys": (
        {"databases": {"cloudNativePG": {"enabled": True, "instances": 2, "synchronousReplicas": 2}}},
        "databases.cloudNativePG: 2 synchronousReplicas need more than 2 instances: one of these is the primary.",
    ),
    "TLS without encryption of NATS": (
        {"tls": {"enabled": True}},
        "tls.enabled: nats.url is nats://nats:4222, which is not encrypted: write tls://HOST:PORT.",
    ),
    "a name that no certificate has": (
        {**HTTP, "tls": {"enabled": True, "name": "*.shop.svc"}},
        "'/tls/name': '*.shop.svc' does not match pattern",
    ),
    "an authority in two places": (
        {"databases": {"ca": {"secret": "a", "configMap": "b"}}},
        "databases.ca: it names the Secret a and the ConfigMap b: name one of them.",
    ),
    "an authority of a server in two places": (
        servers({"name": "main", "services": ALL, "ca": {"secret": "a", "configMap": "b"}}),
        "databases.servers: the ca of main: it names the Secret a and the ConfigMap b: name one of them.",
    ),
    "an authority in a folder of the system": (
        {"databases": {"ca": {"secret": "a", "mountPath": "/etc/ssl"}}},
        "databases.ca: the folder /etc/ssl has something else in the pods: take another mountPath, such as /postgres.",
    ),
    "an authority in a folder without a name": (
        {"databases": {"ca": {"secret": "a", "mountPath": "postgres"}}},
        "'/databases/ca/mountPath': 'postgres' does not match pattern",
    ),
    "an authority of NATS in two places": (
        {"nats": {"url": "tls://nats", "ca": {"secret": "a", "configMap": "b"}}},
        "nats.ca: it names the Secret a and the ConfigMap b: name one of them.",
    ),
    "an authority of NATS in the clear": (
        {"nats": {"ca": {"secret": "a"}}},
        "nats.ca: nats.url is nats://nats:4222, which is not encrypted: write tls://HOST:PORT.",
    ),
    "an authority of NATS over HTTP": (
        {**HTTP, "nats": {"url": "tls://nats", "ca": {"secret": "a"}}},
        "nats.ca: with transport http there is no NATS: leave it out.",
    ),
    "an authority of NATS over gRPC": (
        {**GRPC, "nats": {"url": "tls://nats", "ca": {"secret": "a"}}},
        "nats.ca: with transport grpc there is no NATS: leave it out.",
    ),
    "diagnostics without a certificate": (
        {"nats": {"url": "tls://nats", "ca": {"secret": "a"}}, "diagnostics": {"enabled": True}},
        "nats.ca: with diagnostics.enabled the pods need certificates of their own too: enable tls.",
    ),
    "a URL of NATS with a password": (
        {"nats": {"url": "nats://orders:secret@nats:4222"}},
        "'/nats/url': 'nats://orders:secret@nats:4222' does not match pattern",
    ),
    "an unknown transport": ({"transport": "amqp"}, "'/transport': value must be one of 'nats', 'http', 'grpc'"),
    "a ServiceMonitor without a token": (
        {"metrics": {"serviceMonitor": {"enabled": True}}},
        "metrics.serviceMonitor.enabled: Prometheus needs a token to read /metrics",
    ),
    "a collector that may not be reached": (
        {"tracing": {"endpoint": "http://collector:4318"}},
        "tracing.endpoint: the pods may not reach it: name the collector and its port in networkPolicy.otlp.",
    ),
    "a mail server that may not be reached": (
        {"mail": {"secret": {"name": "mail"}, "shopAddress": "https://shop.example"}},
        "mail.secret.name: the pods of users may not reach the mail server",
    ),
    "letters without the address of the shop": (
        {"mail": {"secret": {"name": "mail"}}, "networkPolicy": {"mail": [TARGET]}},
        "mail.shopAddress is empty: the links in letters need the public address of the shop.",
    ),
    "an Ingress without hosts": ({"ingress": {"enabled": True}}, "ingress.hosts is empty: name the hosts of the shop."),
    "a route without a Gateway": (
        {"httpRoute": {"enabled": True}},
        "httpRoute.parentRefs is empty: name the Gateway that the route belongs to.",
    ),
    "a route for gRPC without a Gateway": (
        {"grpc": {"enabled": True}, "grpcRoute": {"enabled": True}},
        "grpcRoute.parentRefs is empty: name the Gateway that the route belongs to.",
    ),
    "a route for gRPC to a gateway without a port for it": (
        {"grpcRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}},
        "grpcRoute.enabled: the gateway has no port for gRPC: set grpc.enabled.",
    ),
    "more replicas at least than at most": (
        {"services": {"orders": {"autoscaling": {"minReplicas": 4, "maxReplicas": 3}}}},
        "services.orders.autoscaling: minReplicas (4) is more than maxReplicas (3).",
    ),
    "autoscaling by a request that there is not": (
        {"services": {"orders": {"resources": {"requests": {"cpu": ""}}}}},
        "'/services/orders/resources/requests/cpu': '' does not match pattern",
    ),
    "autoscaling without a request of CPU": (
        {"defaults": {"resources": {"requests": {"cpu": None}}}},
        "services.gateway.autoscaling: cpuPercent is a share of resources.requests.cpu, which is not set.",
    ),
    "no replica": ({"services": {"users": {"replicas": 0}}}, "'/services/users/replicas': minimum: got 0, want 1"),
    "too many replicas": ({"services": {"users": {"replicas": 51}}}, "replicas': maximum: got 51, want 50"),
    "a part of a replica": ({"services": {"users": {"replicas": 1.5}}}, "replicas': got number, want integer"),
    "the sandbox left out over HTTP": (
        {**HTTP, "services": {"sandbox": {"enabled": False}}},
        "services.sandbox.enabled: with transport http payments finds the sandbox in this release alone: leave it on.",
    ),
    "the sandbox left out over gRPC": (
        {**GRPC, "services": {"sandbox": {"enabled": False}}},
        "services.sandbox.enabled: with transport grpc payments finds the sandbox in this release alone: leave it on.",
    ),
    "the transport as a variable": (
        {"extraEnv": {"MERCATO_RPC_TRANSPORT": "grpc"}},
        "extraEnv: MERCATO_RPC_TRANSPORT is set by the chart from other values: change those.",
    ),
    "a service left out": (
        {"services": {"orders": {"enabled": False}}},
        "'/services/orders': additional properties 'enabled' not allowed",
    ),
    "an unknown service": ({"services": {"order": {}}}, "'/services': additional properties 'order' not allowed"),
    "an unknown value": ({"replicaCount": 2}, "at '': additional properties 'replicaCount' not allowed"),
    "a variable of the chart": (
        {"extraEnv": {"MERCATO_LISTEN_PORT": "80"}},
        "extraEnv: MERCATO_LISTEN_PORT is set by the chart from other values: change those.",
    ),
    "a credential of a service": (
        {"services": {"orders": {"extraEnv": {"DATABASE_URL_ORDERS": "postgresql://db"}}}},
        "extraEnv: DATABASE_URL_ORDERS is a credential: the processes take it from their Secrets.",
    ),
    "the secret of the shop": (
        {"extraEnv": {"MERCATO_SECRET": "x" * 32}},
        "extraEnv: MERCATO_SECRET is a credential: the processes take it from their Secrets.",
    ),
    "a number as a variable": (
        {"extraEnv": {"MERCATO_POOL_SIZE": 6}},
        "'/extraEnv/MERCATO_POOL_SIZE': got number, want string",
    ),
    "a name that is no variable": ({"extraEnv": {"log-level": "info"}}, "'log-level' does not match pattern"),
    "a policy that allows every peer": (
        {"networkPolicy": {"postgres": [{"to": [], "port": 5432}]}},
        "'/networkPolicy/postgres/0/to': minItems: got 0, want 1",
    ),
    "a peer that is not named": (
        {"networkPolicy": {"gateway": {"from": [{}]}}},
        "'/networkPolicy/gateway/from/0': minProperties: got 0, want 1",
    ),
    "no way to NATS": ({"networkPolicy": {"nats": []}}, "'/networkPolicy/nats': minItems: got 0, want 1"),
    "a port that there is not": (
        {"networkPolicy": {"postgres": [{**TARGET, "port": 70_000}]}},
        "'/networkPolicy/postgres/0/port': maximum: got 70,000, want 65,535",
    ),
    "a digest that is a tag": (
        {"image": {"digests": {"orders": "0.2.0"}}},
        "'/image/digests/orders': '0.2.0' does not match pattern",
    ),
    "an image that there is not": ({"image": {"digests": {"order": "x"}}}, "additional properties 'order' not allowed"),
    "an origin with a path": ({"corsOrigins": ["https://shop.example/"]}, "'/corsOrigins/0': "),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_end_the_installation_with_a_sentence(name: str):
    values, sentence = WRONG[name]
    with pytest.raises((helm_python.HelmValuesError, helm_python.HelmRenderError)) as failure:
        rendered(values)
    assert sentence in str(failure.value)


@pytest.mark.parametrize(
    "values",
    [
        {"global": {"imageRegistry": "registry.example"}},
        {"networkPolicy": {"enabled": False}, "tracing": {"endpoint": "http://collector:4318"}},
        {"services": {"sandbox": {"enabled": False}}},
        {**CLUSTER, "networkPolicy": {"prometheus": {"from": []}}},
        {"extraEnv": {"MERCATO_PLAINTEXT": "everywhere"}, "tls": {"enabled": True}, "nats": {"url": "tls://nats"}},
    ],
    ids=["below-another-chart", "no-policies", "no-sandbox", "no-prometheus", "database-without-tls"],
)
def test_values_that_look_wrong_and_are_not_are_taken(values: Values):
    assert rendered(values)


# --------------------------------------------------------------------------------------------- the schema of the values

PASSED_DOWN: Final = {"global"}
"""What is no value of the chart."""
DEFAULTED: Final = {f"services.{name}" for name in SERVING}
"""Values that have their defaults elsewhere: in `defaults`."""


def schema() -> Any:
    return chart().schema


def resolved(part: Any) -> Any:
    while "$ref" in part:
        part = schema()["definitions"][part["$ref"].rpartition("/")[2]]
    return part


def objects(part: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All objects with named properties, with their paths."""
    part = resolved(part)
    if "properties" in part:
        yield path, part
        for name, below in part["properties"].items():
            yield from objects(below, f"{path}.{name}".lstrip("."))
    if isinstance(part.get("items"), dict):
        yield from objects(part["items"], f"{path}[]")


def at(path: str) -> Any:
    """The default of a value."""
    value: Any = chart().values
    for key in path.split("."):
        value = value[key] if key else value
    return value


def test_the_schema_refuses_what_it_does_not_name():
    found = dict(objects(schema()))
    assert len(found) > 40
    assert [path for path, part in found.items() if part.get("additionalProperties") is not False] == []
    assert schema()["$schema"] == "http://json-schema.org/draft-07/schema#"


def test_every_reference_of_the_schema_leads_somewhere_and_every_definition_is_used():
    text = str(schema())
    assert {name for name in schema()["definitions"] if f"'#/definitions/{name}'" not in text} == set()
    assert len(list(objects(schema()))) == len({path for path, _ in objects(schema())})


def test_every_value_of_the_schema_is_in_values_yaml():
    missing: list[str] = []
    for path, part in objects(schema()):
        if "[]" in path or path.startswith("image.digests") or any(path.startswith(each) for each in DEFAULTED):
            continue
        defaults = at(path)
        missing += [f"{path}.{name}" for name in part["properties"] if name not in defaults and name not in PASSED_DOWN]
    assert missing == []


def test_every_number_of_the_schema_has_bounds():
    def numbers(part: Any) -> Iterator[Any]:
        if isinstance(part, dict):
            if part.get("type") in ("integer", "number"):
                yield part
            for below in part.values():
                yield from numbers(below)

    found = list(numbers(schema()))
    assert len(found) > 10
    assert [part for part in found if not {"minimum", "maximum"} <= part.keys()] == []
