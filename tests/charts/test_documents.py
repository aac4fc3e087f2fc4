"""What the chart renders is valid for Kubernetes 1.34 in every scenario, and has what its values ask for."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any, Final

import helm_python
import kubernetes_validate
import pytest
from kubernetes_validate import utils

import mercato
from charts.chart import (
    CUSTOM,
    EVERYTHING,
    FOLDER,
    RELEASE,
    SCENARIOS,
    SERVICES,
    SERVING,
    Document,
    annotations_of,
    files,
    name_of,
    of_kind,
    pods,
    rendered,
    scenario,
)

KUBERNETES: Final = "1.34"
WARNING: Final = 2
"""The severity of a warning of `helm lint`."""
LONGEST_NAME: Final = 63
LONGEST_CLUSTER: Final = 50
"""Of a Cluster of CloudNativePG."""


@pytest.fixture(scope="module", autouse=True)
def schemas() -> Iterator[None]:
    """The schemas are read once, not for each document."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "schema_contents", functools.cache(utils.schema_contents))
        yield


@functools.cache
def problem(document: str) -> str:
    """Why Kubernetes refuses a document, in JSON; empty if it does not."""
    try:
        kubernetes_validate.validate(json.loads(document), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    return ""


def problems(documents: Sequence[Document]) -> list[str]:
    """Of those documents that are no custom resources."""
    found = [(name_of(each), problem(json.dumps(each))) for each in documents if each["kind"] not in CUSTOM]
    return [f"{name}: {why}" for name, why in found if why]


@pytest.mark.parametrize("name", SCENARIOS)
def test_lint_has_no_warning(name: str):
    report = helm_python.lint(FOLDER, dict(SCENARIOS[name]), strict=True, kube_version=f"v{KUBERNETES}.0")
    assert report["total_charts_linted"] == 1
    assert [message for message in report["messages"] if message["severity"] >= WARNING] == []


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_document_is_valid(name: str):
    documents = scenario(name)
    assert {pod.component for pod in pods(documents)} >= set(SERVING)
    assert problems(documents) == []


def test_an_unknown_field_is_invalid():
    documents: list[Any] = deepcopy(list(scenario("default")))
    [orders] = [each for each in documents if name_of(each) == "Deployment/mercato-orders"]
    orders["spec"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["slumber"] = {"seconds": 5}
    [found] = problems(documents)
    assert found.startswith("Deployment/mercato-orders: spec.template.spec.containers.0.lifecycle.preStop: ")
    assert "slumber" in found


def test_an_ingress_leads_to_the_gateway():
    [ingress] = of_kind(scenario("everything"), "Ingress").values()
    assert ingress["spec"]["ingressClassName"] == "nginx"
    assert ingress["spec"]["tls"] == [{"secretName": "shop-certificate", "hosts": ["shop.example", "*.shop.example"]}]
    assert [rule["host"] for rule in ingress["spec"]["rules"]] == ["shop.example", "*.shop.example"]
    for rule in ingress["spec"]["rules"]:
        [path] = rule["http"]["paths"]
        assert path["backend"]["service"] == {"name": "mercato-gateway", "port": {"name": "http"}}


def test_by_default_the_services_with_most_work_are_scaled():
    scalers = of_kind(scenario("default"), "HorizontalPodAutoscaler")
    assert sorted(scalers) == [f"mercato-{name}" for name in ("gateway", "inventory", "orders", "payments", "products")]
    for scaler in scalers.values():
        [metric] = scaler["spec"]["metrics"]
        assert metric["resource"]["target"] == {"type": "Utilization", "averageUtilization": 70}
        assert (scaler["spec"]["minReplicas"], scaler["spec"]["maxReplicas"]) == (2, 6)


def test_without_autoscaling_each_deployment_has_its_replicas():
    deployments = of_kind(scenario("fixed"), "Deployment").values()
    replicas = {each["metadata"]["name"]: each["spec"]["replicas"] for each in deployments}
    assert replicas == {f"mercato-{name}": 1 if name == "events" else 3 for name in SERVING}
    assert "mercato-events" not in of_kind(scenario("fixed"), "PodDisruptionBudget")
    assert of_kind(scenario("fixed"), "HorizontalPodAutoscaler") == {}


def test_without_the_sandbox_its_documents_are_left_out_and_its_database_is_still_migrated():
    documents = rendered({"services": {"sandbox": {"enabled": False}}})
    assert {pod.component for pod in pods(documents)} == {*SERVING, "migrate", "test"} - {"sandbox"}
    assert not [name_of(document) for document in documents if "sandbox" in name_of(document)]
    [job] = of_kind(documents, "Job").values()
    assert job["spec"]["template"]["spec"]["containers"][0]["args"] == ["migrate", "--data", "/data"]


def test_images_have_a_registry_a_tag_or_a_digest():
    def images(name: str) -> set[str]:
        return {container["image"] for pod in pods(scenario(name)) for container in pod.containers}

    components = {*SERVING, "migrate"}
    assert images("default") == {f"mercato/{component}:{mercato.__version__}" for component in components}
    registry = "registry.example:5000/shop/mercato"
    by_tag = {f"{registry}/{component}:0.2.1" for component in components - {"orders"}}
    assert images("everything") == {*by_tag, f"{registry}/orders@sha256:{'a' * 64}"}
    assert {each["name"] for pod in pods(scenario("everything")) for each in pod.spec["imagePullSecrets"]} == {
        "registry"
    }


def test_the_databases_of_one_server_are_migrated_together_and_those_of_several_by_a_job_each():
    def jobs(name: str) -> dict[str, list[str]]:
        found = of_kind(scenario(name), "Job")
        assert {annotations_of(job)["helm.sh/hook"] for job in found.values()} == {"pre-install,pre-upgrade"}
        return {key: job["spec"]["template"]["spec"]["containers"][0]["args"] for key, job in found.items()}

    assert jobs("default") == {"mercato-migrate-main": ["migrate", "--data", "/data"]}
    assert jobs("servers") == {
        "mercato-migrate-main": ["migrate", "users", "products", "events", "--data", "/data"],
        "mercato-migrate-sales": ["migrate", "inventory", "sandbox", "payments", "orders", "--data", "/data"],
    }


def test_the_test_of_a_release_asks_the_gateway_and_its_program_compiles():
    [pod] = of_kind(scenario("default"), "Pod").values()
    assert annotations_of(pod)["helm.sh/hook"] == "test"
    [container] = pod["spec"]["containers"]
    python, option, program = container["command"]
    assert (python, option) == ("python", "-c")
    compile(program, "test", "exec")
    assert '"http://mercato-gateway:8080/health/ready"' in program


def test_names_are_short_enough_for_a_release_with_a_long_name():
    release = "a-very-long-name-of-a-release-with-fifty-three-letter"
    documents = rendered({**EVERYTHING, "transport": "nats"}, release)
    names = {(document["kind"], document["metadata"]["name"]) for document in documents}
    names |= {(document["kind"], document["metadata"]["name"]) for document in rendered({"transport": "http"}, release)}
    assert len({name for _, name in names}) > len(SERVICES)
    assert max(len(name) for _, name in names) <= LONGEST_NAME
    assert max(len(name) for kind, name in names if kind == "Cluster") <= LONGEST_CLUSTER
    assert problems(documents) == []


def test_releases_select_their_own_pods():
    labels = {pod.component: pod.labels for pod in pods(rendered({}, "other"))}
    for pod in pods(scenario("default")):
        other = labels[pod.component]
        assert {key for key in other if other[key] != pod.labels[key]} == {"app.kubernetes.io/instance"}


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("default", ["mercato-SERVICE", "mercato-admin\n", "mercato-nats\n", "service/mercato-gateway 8080"]),
        ("servers", ["mercato-admin-sales", "job/mercato-migrate-main"]),
        ("cluster", ["mercato-db-main-rw:5432", "`secret`: the secret of the shop"]),
        ("tls", ["shop-tls", "`ca.crt`, `tls.crt`, `tls.key`"]),
        ("api-over-grpc", ["mercato-gateway.shop:9090, within the cluster"]),
        ("open", ["networkPolicy.enabled` is false"]),
        ("everything", ["metrics-token", "mail\n", "https://shop.example/docs"]),
    ],
)
def test_notes_name_the_secrets_and_what_comes_next(name: str, texts: list[str]):
    notes = files(SCENARIOS[name])[f"{RELEASE}/templates/NOTES.txt"]
    assert [text for text in texts if text not in notes] == []
