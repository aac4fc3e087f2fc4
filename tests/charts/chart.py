"""The Helm chart in `deploy/helm/mercato`, rendered for the values of several shops."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import helm_python
import yaml

from mercato import topology
from mercato.chassis.hosting.host import GATEWAY
from mercato.testing.command import ROOT

FOLDER: Final = ROOT / "deploy/helm/mercato"
RELEASE: Final = "mercato"
NAMESPACE: Final = "shop"

SERVICES: Final = tuple(topology.SERVICES)
SERVING: Final = (GATEWAY, *SERVICES)
"""The components that run all the time."""
MIGRATE: Final = "migrate"
TEST: Final = "test"

COMPONENT: Final = "app.kubernetes.io/component"
CUSTOM: Final = frozenset({"Cluster", "GRPCRoute", "HTTPRoute", "PodMonitor", "PrometheusRule", "ServiceMonitor"})
"""The kinds of custom resources."""

Document = Mapping[str, Any]
Values = Mapping[str, Any]

POSTGRES: Final = {"to": [{"ipBlock": {"cidr": "10.0.0.7/32"}}], "port": 6432}
SALES: Final = {"to": [{"ipBlock": {"cidr": "10.0.0.8/32"}}], "port": 5432}
COLLECTOR: Final = {"to": [{"ipBlock": {"cidr": "10.0.0.9/32"}}], "port": 4318}
MAIL: Final = {"to": [{"ipBlock": {"cidr": "10.0.0.10/32"}}], "port": 587}

SERVERS: Final[Values] = {
    "databases": {
        "servers": [
            {"name": "main", "services": ["users", "products", "events"]},
            {
                "name": "sales",
                "services": ["inventory", "sandbox", "payments", "orders"],
                "adminSecret": "mercato-admin-sales",
                "egress": [SALES],
            },
        ]
    },
    "networkPolicy": {"postgres": [POSTGRES]},
}
AUTHORITIES: Final[Values] = {
    "databases": {
        "ca": {"secret": "postgres-ca"},
        "servers": [
            {"name": "main", "services": ["users", "products", "events"]},
            {
                "name": "sales",
                "services": ["inventory", "sandbox", "payments", "orders"],
                "adminSecret": "mercato-admin-sales",
                "ca": {"configMap": "sales-ca", "key": "root.pem", "mountPath": "/sales/ca"},
            },
        ],
    },
    "nats": {"url": "tls://nats.messaging:4222", "ca": {"configMap": "nats-ca"}},
}
"""An authority of its own for each server, and for NATS."""
CLUSTER: Final[Values] = {"databases": {"cloudNativePG": {"enabled": True}}}
HTTP: Final[Values] = {"transport": "http"}
GRPC: Final[Values] = {"transport": "grpc"}
TLS: Final[Values] = {
    "tls": {"enabled": True, "secret": "shop-tls"},
    "nats": {"url": "tls://nats.messaging:4222"},
    "services": {"orders": {"tlsSecret": "orders-tls"}},
}
FIXED: Final[Values] = {
    "services": {
        **{name: {"autoscaling": {"enabled": False}, "replicas": 3} for name in SERVING},
        "events": {"replicas": 1},
    }
}
"""No autoscaling; one process of the events."""
API_OVER_GRPC: Final[Values] = {"grpc": {"enabled": True}}
OPEN: Final[Values] = {"networkPolicy": {"enabled": False}}
EVERYTHING: Final[Values] = {
    "image": {
        "registry": "registry.example:5000/shop/",
        "tag": "0.2.1",
        "digests": {"orders": f"sha256:{'a' * 64}"},
        "pullSecrets": ["registry"],
    },
    **TLS,
    "corsOrigins": ["https://shop.example", "http://localhost:3000"],
    "metrics": {
        "tokenSecret": {"name": "metrics-token"},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "rules": {"enabled": True, "labels": {"release": "prometheus"}},
    },
    "tracing": {"endpoint": "http://collector.observability:4318"},
    "diagnostics": {"enabled": True},
    "mail": {
        "secret": {"name": "mail"},
        "sender": "Shop <shop@example.com>",
        "shopAddress": "https://shop.example",
    },
    "extraEnv": {"MERCATO_LOG_LEVEL": "info", "MERCATO_TRACE_SHARE": "0.1"},
    "defaults": {
        "priorityClassName": "shop",
        "podAnnotations": {"example.com/revision": "2"},
        "nodeSelector": {"kubernetes.io/arch": "amd64"},
        "tolerations": [{"key": "shop", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"nodeAffinity": {}},
        "spread": {"hosts": "DoNotSchedule"},
    },
    "services": {
        **{name: {"autoscaling": {"enabled": True, "maxReplicas": 9}} for name in SERVING},
        "orders": {
            "tlsSecret": "orders-tls",
            "extraEnv": {"MERCATO_LOG_LEVEL": "debug", "MERCATO_ORDERS_LEASE_SECONDS": "3"},
        },
    },
    "databases": {
        "servers": [
            {"name": "main", "services": ["users", "products", "events"]},
            {"name": "sales", "services": ["inventory", "sandbox", "payments", "orders"]},
        ],
        "cloudNativePG": {
            "enabled": True,
            "imageName": "ghcr.io/cloudnative-pg/postgresql:18",
            "walStorage": {"size": "5Gi"},
            "storage": {"size": "50Gi", "storageClass": "fast"},
            "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "extraSpec": {"plugins": [{"name": "barman-cloud.cloudnative-pg.io", "isWALArchiver": True}]},
        },
    },
    "networkPolicy": {
        "otlp": [COLLECTOR],
        "mail": [MAIL],
        "diagnostics": {"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "operators"}}}]},
    },
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "annotations": {"example.com/body": "1m"},
        "hosts": ["shop.example", "*.shop.example"],
        "tlsSecret": "shop-certificate",
    },
    "httpRoute": {
        "enabled": True,
        "annotations": {"example.com/route": "shop"},
        "parentRefs": [{"name": "public", "namespace": "ingress", "sectionName": "https"}],
        "hostnames": ["shop.example"],
    },
    **API_OVER_GRPC,
    "grpcRoute": {
        "enabled": True,
        "annotations": {"example.com/route": "grpc"},
        "parentRefs": [{"name": "public", "namespace": "ingress", "sectionName": "https"}],
        "hostnames": ["grpc.shop.example"],
    },
}
EVERYTHING_BUT_NATS: Final[Values] = {name: value for name, value in EVERYTHING.items() if name != "nats"}

SCENARIOS: Final[Mapping[str, Values]] = {
    "default": {},
    "http": HTTP,
    "grpc": GRPC,
    "servers": SERVERS,
    "authorities": AUTHORITIES,
    "cluster": CLUSTER,
    "tls": TLS,
    "fixed": FIXED,
    "api-over-grpc": API_OVER_GRPC,
    "open": OPEN,
    "everything": EVERYTHING,
    "everything-over-http": {**EVERYTHING_BUT_NATS, **HTTP},
    "everything-over-grpc": {**EVERYTHING_BUT_NATS, **GRPC},
}


class Pod(NamedTuple):
    """A pod, or the template of one."""

    owner: str
    """Its kind and name, or those of what makes it."""
    labels: Mapping[str, str]
    spec: Mapping[str, Any]

    @property
    def component(self) -> str:
        return self.labels[COMPONENT]

    @property
    def containers(self) -> Sequence[Mapping[str, Any]]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


@functools.cache
def chart() -> helm_python.Chart:
    return helm_python.Chart.load(FOLDER)


def files(values: Values, release: str = RELEASE) -> Mapping[str, str]:
    """The text of each template."""
    return chart().render(dict(values), name=release, namespace=NAMESPACE)


def rendered(values: Values, release: str = RELEASE) -> list[Document]:
    """All documents, hooks among them."""
    texts = [text for name, text in sorted(files(values, release).items()) if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.load_all(text, Loader=yaml.CSafeLoader) if document]


@functools.cache
def scenario(name: str) -> Sequence[Document]:
    """The documents of a scenario. A test that changes them copies them first."""
    return rendered(SCENARIOS[name])


def name_of(document: Document) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def of_kind(documents: Sequence[Document], kind: str) -> dict[str, Document]:
    """By name."""
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}


def pods(documents: Sequence[Document]) -> Iterator[Pod]:
    for document in documents:
        template = document if document["kind"] == "Pod" else document.get("spec", {}).get("template")
        if template is not None:
            yield Pod(name_of(document), template["metadata"]["labels"], template["spec"])


def selector(component: str = "") -> Mapping[str, str]:
    """The labels by which the pods of a component, or all of the release, are selected."""
    labels = {"app.kubernetes.io/name": "mercato", "app.kubernetes.io/instance": RELEASE}
    return {**labels, COMPONENT: component} if component else labels


def called_by(component: str) -> set[str]:
    """The services that a process calls in others, whose event logs it reads among them."""
    return {operation.service.removesuffix(".log") for operation in topology.called_by(component)} - {component}


def annotations_of(document: Document) -> Mapping[str, str]:
    return document["metadata"].get("annotations", {})
