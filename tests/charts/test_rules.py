"""Every document of every scenario keeps the rules in `rules.py`, and each rule finds what violates it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Final

import pytest

from charts.chart import SCENARIOS, scenario
from charts.rules import RULES

SWITCHED_OFF: Final = frozenset({("open", "isolated")})
"""What a scenario does not keep, and why it is there."""

Documents = list[Any]
Change = Callable[[Documents], object]


def one(documents: Documents, kind: str, name: str) -> Any:
    return next(each for each in documents if (each["kind"], each["metadata"]["name"]) == (kind, name))


def pod_of(documents: Documents, name: str = "mercato-orders", kind: str = "Deployment") -> Any:
    return one(documents, kind, name)["spec"]["template"]["spec"]


def container_of(documents: Documents) -> Any:
    return pod_of(documents)["containers"][0]


def set_at(path: str, value: object) -> Change:
    """Sets a field of the pod of orders; `container.` is that of its container."""
    first, *keys = path.split(".")

    def change(documents: Documents) -> None:
        place = container_of(documents) if first == "container" else pod_of(documents)
        *parents, last = keys if first == "container" else [first, *keys]
        for key in parents:
            place = place.setdefault(key, {})
        if value is None:
            del place[last]
        else:
            place[last] = value

    return change


def remove(kind: str, name: str) -> Change:
    return lambda documents: documents.remove(one(documents, kind, name))


def in_spec(kind: str, name: str, change: Callable[[Any], object]) -> Change:
    return lambda documents: change(one(documents, kind, name)["spec"])


def in_metadata(kind: str, name: str, change: Callable[[Any], object]) -> Change:
    return lambda documents: change(one(documents, kind, name)["metadata"])


def annotated(kind: str, name: str, key: str, value: str) -> Change:
    return in_metadata(kind, name, lambda metadata: metadata["annotations"].update({key: value}))


def mount_others(documents: Documents) -> None:
    """Mounts a folder that has another file."""
    pod = pod_of(documents)
    pod["volumes"].append({"name": "postgres", "secret": {"secretName": "a", "items": [{"key": "b", "path": "b"}]}})
    container = pod["containers"][0]
    container["volumeMounts"].append({"name": "postgres", "mountPath": "/postgres", "readOnly": True})
    container["env"] = [{"name": "A", "value": "/postgres/ca.crt"}]


VIOLATIONS: Final[dict[str, list[tuple[Change, str]]]] = {
    "restricted": [
        (set_at("hostNetwork", True), "Deployment/mercato-orders: hostNetwork is True"),
        (set_at("hostPID", True), "hostPID is True"),
        (set_at("hostIPC", True), "hostIPC is True"),
        (set_at("container.securityContext.windowsOptions.hostProcess", True), "hostProcess is True"),
        (set_at("container.securityContext.privileged", True), "privileged is True"),
        (set_at("container.securityContext.procMount", "Unmasked"), "procMount is Unmasked"),
        (set_at("securityContext.appArmorProfile.type", "Unconfined"), "appArmorProfile.type is Unconfined"),
        (set_at("securityContext.seLinuxOptions.type", "spc_t"), "seLinuxOptions.type is spc_t"),
        (set_at("securityContext.seLinuxOptions.user", "root"), "seLinuxOptions.user is root"),
        (set_at("securityContext.seLinuxOptions.role", "sysadm"), "seLinuxOptions.role is sysadm"),
        (set_at("container.securityContext.allowPrivilegeEscalation", None), "allowPrivilegeEscalation is None"),
        (set_at("securityContext.runAsNonRoot", None), "runAsNonRoot is None"),
        (set_at("container.securityContext.runAsNonRoot", False), "runAsNonRoot is False"),
        (set_at("securityContext.runAsUser", 0), "runAsUser is 0"),
        (set_at("container.securityContext.runAsUser", 0), "runAsUser is 0"),
        (set_at("securityContext.seccompProfile.type", "Unconfined"), "seccompProfile.type is Unconfined"),
        (set_at("container.securityContext.capabilities.drop", ["NET_RAW"]), "capabilities.drop lacks ALL"),
        (set_at("container.securityContext.capabilities.add", ["SYS_PTRACE"]), "capabilities.add has SYS_PTRACE"),
        (set_at("volumes", [{"name": "tmp", "hostPath": {"path": "/"}}]), "the volume tmp is a hostPath"),
        (set_at("securityContext.sysctls", [{"name": "kernel.msgmax", "value": "1"}]), "kernel.msgmax is set"),
        (set_at("container.ports", [{"containerPort": 8080, "hostPort": 8080}]), "hostPort is 8080"),
        (set_at("container.livenessProbe.httpGet.host", "10.0.0.1"), "httpGet.host is 10.0.0.1"),
        (set_at("container.lifecycle.postStart.tcpSocket.host", "10.0.0.1"), "tcpSocket.host is 10.0.0.1"),
        (
            lambda documents: one(documents, "Job", "mercato-migrate-main")["spec"]["template"]["spec"].update(
                hostPID=True
            ),
            "Job/mercato-migrate-main: hostPID is True",
        ),
        (lambda documents: one(documents, "Pod", "mercato-test")["spec"].update(hostPID=True), "Pod/mercato-test"),
    ],
    "hardened": [
        (set_at("automountServiceAccountToken", True), "automountServiceAccountToken is True, not False"),
        (set_at("enableServiceLinks", None), "enableServiceLinks is None, not False"),
        (set_at("serviceAccountName", "mercato-users"), "serviceAccountName is not mercato-orders"),
        (remove("ServiceAccount", "mercato-orders"), "ServiceAccount/mercato-orders is not there"),
        (remove("ServiceAccount", "mercato-migrate"), "ServiceAccount/mercato-migrate is not there"),
        (set_at("container.securityContext.readOnlyRootFilesystem", False), "the root file system may be written"),
        (set_at("container.volumeMounts", []), "volumes and mounts differ"),
        (set_at("volumes", [{"name": "tmp", "emptyDir": {}}]), "/tmp is not a folder in memory"),
    ],
    "mounted": [
        (set_at("container.env", [{"name": "A", "value": "/tls/ca.crt"}]), "A names /tls/ca.crt, which is in no mount"),
        (
            set_at("container.env", [{"name": "A", "value": "postgresql://h/d?sslrootcert=/tmp/ca.crt&sslmode=x"}]),
            "A names /tmp/ca.crt, which is in no mount",
        ),
        (mount_others, "A names /postgres/ca.crt, which is in no mount"),
    ],
    "bounded": [
        (set_at("container.resources.requests.cpu", None), "resources.requests.cpu is not set"),
        (set_at("container.resources.limits", None), "resources.limits.memory is not set"),
        (
            in_spec("Job", "mercato-migrate-main", lambda spec: spec.pop("activeDeadlineSeconds")),
            "Job/mercato-migrate-main: activeDeadlineSeconds is not set",
        ),
    ],
    "serves": [
        (set_at("container.startupProbe", None), "startupProbe.httpGet.path is None"),
        (
            set_at("container.livenessProbe.httpGet.path", "/health/ready"),
            "livenessProbe.httpGet.path is /health/ready",
        ),
        (set_at("container.readinessProbe", None), "readinessProbe.httpGet.path is None"),
        (set_at("container.lifecycle", None), "lifecycle.preStop.sleep.seconds is None"),
        (set_at("terminationGracePeriodSeconds", 12), "it is killed before it has drained"),
        (set_at("topologySpreadConstraints", []), "it is not spread across hosts and zones"),
        (
            lambda documents: pod_of(documents)["topologySpreadConstraints"][0]["labelSelector"][
                "matchLabels"
            ].popitem(),
            "it is spread by the labels of others",
        ),
        (
            in_spec(
                "Deployment",
                "mercato-orders",
                lambda spec: spec["strategy"]["rollingUpdate"].update(maxSurge=0),
            ),
            "strategy.rollingUpdate.maxSurge is 0, not 1",
        ),
    ],
    "scaled": [
        (
            in_spec("Deployment", "mercato-orders", lambda spec: spec.update(replicas=2)),
            "Deployment/mercato-orders: it has replicas and an autoscaler, or neither",
        ),
        (remove("HorizontalPodAutoscaler", "mercato-orders"), "it has replicas and an autoscaler, or neither"),
        (
            in_spec("HorizontalPodAutoscaler", "mercato-orders", lambda spec: spec.pop("behavior")),
            "it has no behaviour",
        ),
        (
            in_spec(
                "HorizontalPodAutoscaler",
                "mercato-orders",
                lambda spec: spec["scaleTargetRef"].update(name="x"),
            ),
            "it scales another Deployment",
        ),
        (
            remove("PodDisruptionBudget", "mercato-users"),
            "Deployment/mercato-users: its budget for disruptions is missing",
        ),
        (
            in_spec("Deployment", "mercato-users", lambda spec: spec.update(replicas=1)),
            "Deployment/mercato-users: its budget for disruptions is missing, or blocks its only pod",
        ),
        (
            in_spec("PodDisruptionBudget", "mercato-users", lambda spec: spec.update(maxUnavailable=0)),
            "maxUnavailable is not 1",
        ),
        (
            in_spec("PodDisruptionBudget", "mercato-users", lambda spec: spec["selector"]["matchLabels"].popitem()),
            "it selects the pods of others",
        ),
    ],
    "reachable": [
        (
            in_spec("Service", "mercato-users", lambda spec: spec["selector"].popitem()),
            "Service/mercato-users: it does not select the pods of one component",
        ),
        (remove("Deployment", "mercato-users"), "Service/mercato-users: it does not select the pods of one component"),
        (
            in_spec("Service", "mercato-users", lambda spec: spec["ports"][0].update(targetPort="rpc")),
            "Service/mercato-users: its pods have no port rpc",
        ),
    ],
    "isolated": [
        (remove("NetworkPolicy", "mercato-default-deny"), "Deployment/mercato-orders: nothing refuses its connections"),
        (
            in_spec("NetworkPolicy", "mercato-default-deny", lambda spec: spec.update(policyTypes=["Ingress"])),
            "Job/mercato-migrate-main: nothing refuses its connections",
        ),
        (remove("NetworkPolicy", "mercato-orders"), "Deployment/mercato-orders: it has 1 policies"),
        (
            in_spec("NetworkPolicy", "mercato-orders", lambda spec: spec["egress"][0].update(to=[])),
            "NetworkPolicy/mercato-orders: a rule allows every peer, or every port",
        ),
        (
            in_spec("NetworkPolicy", "mercato-orders", lambda spec: spec["ingress"][0].pop("ports")),
            "NetworkPolicy/mercato-orders: a rule allows every peer, or every port",
        ),
    ],
    "prepared": [
        (
            in_metadata(
                "Job",
                "mercato-migrate-main",
                lambda metadata: metadata["annotations"].update({"helm.sh/hook": "x"}),
            ),
            "the hooks of the migration are not of the same phases",
        ),
        (
            annotated("NetworkPolicy", "mercato-migrate", "helm.sh/hook-weight", "0"),
            "a Job that migrates runs before what it needs is there",
        ),
        (
            lambda documents: documents.append(deepcopy(one(documents, "Job", "mercato-migrate-main"))),
            "two Jobs that migrate run at once",
        ),
        (
            annotated("Job", "mercato-migrate-main", "helm.sh/hook-delete-policy", "hook-succeeded"),
            "is deleted at once",
        ),
    ],
    "labelled": [
        (
            lambda documents: documents.append(deepcopy(one(documents, "Service", "mercato-users"))),
            "Service/mercato-users: there are two",
        ),
        (
            in_metadata("Service", "mercato-users", lambda metadata: metadata.pop("namespace")),
            "it is not in the namespace of the release",
        ),
        (
            in_metadata("Service", "mercato-users", lambda metadata: metadata["labels"].clear()),
            "it lacks labels of the release",
        ),
    ],
}
"""By rule: a change of the documents of the default scenario, and what the rule says of it."""


@pytest.mark.parametrize(
    ("name", "rule"), [(name, rule) for name in SCENARIOS for rule in RULES if (name, rule) not in SWITCHED_OFF]
)
def test_every_document_keeps_the_rules(name: str, rule: str):
    assert list(RULES[rule](scenario(name))) == []


def test_each_rule_is_violated():
    assert VIOLATIONS.keys() == RULES.keys()


@pytest.mark.parametrize(
    ("rule", "change", "says"),
    [
        pytest.param(rule, *each, id=f"{rule}-{number}")
        for rule, changes in VIOLATIONS.items()
        for number, each in enumerate(changes)
    ],
)
def test_a_violation_of_a_rule_is_found(rule: str, change: Change, says: str):
    documents: Documents = deepcopy(list(scenario("default")))
    change(documents)
    found = list(RULES[rule](documents))
    assert any(says in line for line in found), found
