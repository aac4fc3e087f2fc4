"""Custom resources, of which `kubernetes-validate` has no schemas: the whole of what is expected of them.

The Cluster is written against CloudNativePG 1.31, the monitors and the rule against the Prometheus operator's
`monitoring.coreos.com/v1`, the routes against the Gateway API's `v1`.
"""

from __future__ import annotations

import pytest
import yaml

from charts.chart import (
    CUSTOM,
    FOLDER,
    SCENARIOS,
    SERVING,
    annotations_of,
    of_kind,
    pods,
    rendered,
    scenario,
)
from charts.rules import peer_name
from mercato.testing.command import ROOT


def test_only_the_custom_resources_that_are_asked_for_are_rendered():
    asked = {name: {each["kind"] for each in scenario(name)} & CUSTOM for name in SCENARIOS}
    everything = {name: CUSTOM for name in SCENARIOS if name.startswith("everything")}
    wanted = {"cluster": frozenset({"Cluster"}), **everything}
    assert asked == {name: wanted.get(name, frozenset()) for name in SCENARIOS}


def test_a_cluster_of_postgresql_commits_on_two_instances():
    [cluster] = of_kind(scenario("cluster"), "Cluster").values()
    assert cluster["apiVersion"] == "postgresql.cnpg.io/v1"
    assert cluster["metadata"]["name"] == "mercato-db-main"
    assert annotations_of(cluster) == {"helm.sh/resource-policy": "keep"}
    assert cluster["spec"] == {
        "instances": 3,
        "enableSuperuserAccess": True,
        "postgresql": {
            "parameters": {"max_connections": "300"},
            "synchronous": {"method": "any", "number": 1, "dataDurability": "required", "failoverQuorum": True},
        },
        "storage": {"size": "20Gi"},
        "resources": {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "2Gi"}},
        "affinity": {
            "enablePodAntiAffinity": True,
            "podAntiAffinityType": "required",
            "topologyKey": "kubernetes.io/hostname",
        },
    }


def test_each_server_is_a_cluster_of_its_own():
    clusters = of_kind(scenario("everything"), "Cluster")
    assert sorted(clusters) == ["mercato-db-main", "mercato-db-sales"]
    spec = clusters["mercato-db-sales"]["spec"]
    assert spec["imageName"] == "ghcr.io/cloudnative-pg/postgresql:18"
    assert spec["storage"] == {"size": "50Gi", "storageClass": "fast"}
    assert spec["walStorage"] == {"size": "5Gi"}
    assert spec["plugins"] == [{"name": "barman-cloud.cloudnative-pg.io", "isWALArchiver": True}]
    monitor = of_kind(scenario("everything"), "PodMonitor")["mercato-db-sales"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"] == {
        "selector": {"matchLabels": {"cnpg.io/cluster": "mercato-db-sales"}},
        "podMetricsEndpoints": [{"port": "metrics"}],
    }


def test_a_cluster_of_one_instance_waits_for_none():
    one_instance = {"databases": {"cloudNativePG": {"enabled": True, "instances": 1, "synchronousReplicas": 0}}}
    [cluster] = of_kind(rendered(one_instance), "Cluster").values()
    assert cluster["spec"]["postgresql"] == {"parameters": {"max_connections": "300"}}


def test_the_migration_of_a_cluster_runs_behind_the_installation_with_the_superuser_of_the_operator():
    jobs = of_kind(scenario("cluster"), "Job")
    assert {annotations_of(job)["helm.sh/hook"] for job in jobs.values()} == {"post-install,pre-upgrade"}
    [pod] = pods(list(jobs.values()))
    [container] = pod.containers
    password, dsn, secret = container["env"]
    assert password["valueFrom"]["secretKeyRef"] == {"name": "mercato-db-main-superuser", "key": "password"}
    assert dsn["value"] == (
        "postgresql://postgres:$(POSTGRES_PASSWORD)@mercato-db-main-rw:5432/postgres"
        "?sslmode=verify-full&sslrootcert=/postgres/ca.crt"
    )
    assert secret["valueFrom"]["secretKeyRef"] == {"name": "mercato-admin", "key": "secret"}
    [volume] = [volume for volume in pod.spec["volumes"] if volume["name"] == "postgres"]
    items = [{"key": "ca.crt", "path": "ca.crt"}]
    assert volume["secret"] == {"secretName": "mercato-db-main-ca", "items": items, "defaultMode": 0o440}


def test_prometheus_reads_the_metrics_of_all_services_with_the_token():
    [monitor] = of_kind(scenario("everything"), "ServiceMonitor").values()
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint["authorization"] == {"credentials": {"name": "metrics-token", "key": "token"}}
    assert (endpoint["port"], endpoint["path"], endpoint["honorLabels"]) == ("http", "/metrics", True)
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "mercato"}]
    chosen = monitor["spec"]["selector"]["matchLabels"]
    services = of_kind(scenario("everything"), "Service")
    assert {name for name, each in services.items() if chosen.items() <= each["metadata"]["labels"].items()} == {
        f"mercato-{component}" for component in SERVING
    }


def test_the_alerts_are_those_of_observability():
    """The file in the chart is a link, so that there is one; Helm reads what it leads to."""
    [rule] = of_kind(scenario("everything"), "PrometheusRule").values()
    assert rule["apiVersion"] == "monitoring.coreos.com/v1"
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy/observability/rules.yml").read_text())
    assert (FOLDER / "files/rules.yml").resolve() == ROOT / "deploy/observability/rules.yml"


@pytest.mark.parametrize(
    ("kind", "annotation", "host", "port"),
    [("HTTPRoute", "shop", "shop.example", 8080), ("GRPCRoute", "grpc", "grpc.shop.example", 9090)],
)
def test_a_route_leads_to_the_gateway(kind: str, annotation: str, host: str, port: int):
    """A rule that names no path, or no method, is for all of them."""
    [route] = of_kind(scenario("everything"), kind).values()
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    assert annotations_of(route) == {"example.com/route": annotation}
    assert route["spec"] == {
        "parentRefs": [{"name": "public", "namespace": "ingress", "sectionName": "https"}],
        "hostnames": [host],
        "rules": [{"backendRefs": [{"name": "mercato-gateway", "port": port}]}],
    }


def test_the_pods_of_a_cluster_are_reached_by_its_services_and_by_the_operator_alone():
    policy = of_kind(scenario("everything"), "NetworkPolicy")["mercato-db-sales"]["spec"]
    assert policy["podSelector"]["matchLabels"] == {"cnpg.io/cluster": "mercato-db-sales"}
    assert policy["policyTypes"] == ["Ingress"]
    reached = {
        (peer_name(peer), port["port"]) for rule in policy["ingress"] for peer in rule["from"] for port in rule["ports"]
    }
    services = {"inventory", "sandbox", "payments", "orders", "migrate"}
    own = {(peer, port) for peer in ("mercato-db-sales", "cnpg-system") for port in (5432, 8000)}
    assert reached == {*((service, 5432) for service in services), *own, ("monitoring", 9187)}
