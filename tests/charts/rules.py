"""What holds for each document of the chart. A rule gives a line for each violation."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from charts import pod_security
from charts.chart import COMPONENT, MIGRATE, SERVING, Document, Pod, name_of, of_kind, pods, selector
from charts.pod_security import field

Rule = Callable[[Sequence[Document]], Iterator[str]]

EVERY_POD: Final[Mapping[str, object]] = {
    "automountServiceAccountToken": False,
    "enableServiceLinks": False,
    "securityContext.runAsUser": 10_001,
    "securityContext.runAsGroup": 10_001,
    "securityContext.fsGroup": 10_001,
}
"""What each pod has, by path."""
SERVING_POD: Final[Mapping[str, object]] = {"terminationGracePeriodSeconds": 30}
SERVING_CONTAINER: Final[Mapping[str, object]] = {
    "startupProbe.httpGet.path": "/health/live",
    "livenessProbe.httpGet.path": "/health/live",
    "readinessProbe.httpGet.path": "/health/self",
    "startupProbe.httpGet.port": "http",
    "livenessProbe.httpGet.port": "http",
    "readinessProbe.httpGet.port": "http",
    "lifecycle.preStop.sleep.seconds": 5,
}
DEPLOYMENT: Final[Mapping[str, object]] = {
    "strategy.type": "RollingUpdate",
    "strategy.rollingUpdate.maxUnavailable": 0,
    "strategy.rollingUpdate.maxSurge": 1,
}
DRAIN_SECONDS: Final = 10
"""In which a process ends after SIGTERM."""
FILES: Final = re.compile(r"(?:^|sslrootcert=)(/[^&]+\.[a-z]+)")
"""What a variable names: a file, or a DSN with one."""
SPREAD: Final = ("kubernetes.io/hostname", "topology.kubernetes.io/zone")


def restricted(documents: Sequence[Document]) -> Iterator[str]:
    for pod in pods(documents):
        for violation in pod_security.violations(pod):
            yield f"{pod.owner}: {violation}"


def hardened(documents: Sequence[Document]) -> Iterator[str]:
    """What this chart demands beyond `restricted`."""
    accounts = of_kind(documents, "ServiceAccount")
    for pod in pods(documents):
        yield from _lacks(pod.owner, pod.spec, EVERY_POD)
        account = f"mercato-{pod.component}"
        if pod.spec.get("serviceAccountName") != account:
            yield f"{pod.owner}: serviceAccountName is not {account}"
        elif account not in accounts or accounts[account].get("automountServiceAccountToken") is not False:
            yield f"{pod.owner}: ServiceAccount/{account} is not there, or mounts its token"
        for container in pod.containers:
            if field(container, "securityContext.readOnlyRootFilesystem") is not True:
                yield f"{pod.owner}: the root file system may be written"
            mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
            if mounts.keys() != volumes.keys():
                yield f"{pod.owner}: volumes and mounts differ"
            elif mounts["tmp"]["mountPath"] != "/tmp" or field(volumes["tmp"], "emptyDir.medium") != "Memory":
                yield f"{pod.owner}: /tmp is not a folder in memory"


def mounted(documents: Sequence[Document]) -> Iterator[str]:
    """Each file that a variable names is in a folder that is mounted, and may not be written."""
    for pod in pods(documents):
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        for container in pod.containers:
            files = dict[str, set[str]]()
            for mount in container["volumeMounts"]:
                if mount.get("readOnly"):
                    files[mount["mountPath"]] = files_of(volumes[mount["name"]])
            for variable in container.get("env", ()):
                for file in FILES.findall(variable.get("value", "")):
                    folder, _, name = file.rpartition("/")
                    if folder not in files or (files[folder] and name not in files[folder]):
                        yield f"{pod.owner}: {variable['name']} names {file}, which is in no mount"


def bounded(documents: Sequence[Document]) -> Iterator[str]:
    """Each container asks for CPU and memory, and has a limit of memory; each Job ends."""
    for pod in pods(documents):
        for container in pod.containers:
            for path in ("requests.cpu", "requests.memory", "limits.memory"):
                if not field(container, f"resources.{path}"):
                    yield f"{pod.owner}: resources.{path} is not set"
    for job in of_kind(documents, "Job").values():
        for name in ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"):
            if job["spec"].get(name) is None:
                yield f"{name_of(job)}: {name} is not set"


def serves(documents: Sequence[Document]) -> Iterator[str]:
    """Each Deployment has probes, ends without a failed request, and is spread."""
    deployments = of_kind(documents, "Deployment")
    for deployment in deployments.values():
        owner = name_of(deployment)
        [pod] = pods([deployment])
        [container] = pod.containers
        yield from _lacks(owner, deployment["spec"], DEPLOYMENT)
        yield from _lacks(owner, pod.spec, SERVING_POD)
        yield from _lacks(owner, container, SERVING_CONTAINER)
        seconds = field(container, "lifecycle.preStop.sleep.seconds") or 0
        if pod.spec.get("terminationGracePeriodSeconds", 0) < seconds + DRAIN_SECONDS:
            yield f"{owner}: it is killed before it has drained"
        spread = {each["topologyKey"]: each for each in pod.spec.get("topologySpreadConstraints", ())}
        if sorted(spread) != sorted(SPREAD):
            yield f"{owner}: it is not spread across hosts and zones"
        for each in spread.values():
            if each["labelSelector"]["matchLabels"] != selector(pod.component):
                yield f"{owner}: it is spread by the labels of others"


def scaled(documents: Sequence[Document]) -> Iterator[str]:
    """Either replicas or an autoscaler; a budget for disruptions where there may be two pods."""
    budgets = of_kind(documents, "PodDisruptionBudget")
    scalers = of_kind(documents, "HorizontalPodAutoscaler")
    for name, deployment in of_kind(documents, "Deployment").items():
        replicas, scaler = deployment["spec"].get("replicas"), scalers.get(name)
        if (replicas is None) is (scaler is None):
            yield f"{name_of(deployment)}: it has replicas and an autoscaler, or neither"
        if scaler is not None and scaler["spec"]["scaleTargetRef"]["name"] != name:
            yield f"{name_of(scaler)}: it scales another Deployment"
        if scaler is not None and not scaler["spec"].get("behavior"):
            yield f"{name_of(scaler)}: it has no behaviour"
        if (name in budgets) is not (scaler is not None or (replicas or 0) > 1):
            yield f"{name_of(deployment)}: its budget for disruptions is missing, or blocks its only pod"
    for name, budget in budgets.items():
        if budget["spec"].get("maxUnavailable") != 1:
            yield f"{name_of(budget)}: maxUnavailable is not 1"
        if budget["spec"]["selector"]["matchLabels"] != selector(name.removeprefix("mercato-")):
            yield f"{name_of(budget)}: it selects the pods of others"


def reachable(documents: Sequence[Document]) -> Iterator[str]:
    """Each Service selects the pods of one component, and leads to a port that they have."""
    found = list(pods(documents))
    for service in of_kind(documents, "Service").values():
        chosen = [pod for pod in found if selects(service["spec"]["selector"], pod)]
        if [pod.component for pod in chosen] not in [[name] for name in SERVING]:
            yield f"{name_of(service)}: it does not select the pods of one component"
            continue
        ports = {port["name"] for container in chosen[0].containers for port in container["ports"]}
        for port in service["spec"]["ports"]:
            if port["targetPort"] not in ports:
                yield f"{name_of(service)}: its pods have no port {port['targetPort']}"


def isolated(documents: Sequence[Document]) -> Iterator[str]:
    """Each pod is refused all connections, in both directions, but for those of its own policy."""
    policies = of_kind(documents, "NetworkPolicy").values()
    for pod in pods(documents):
        selecting = [policy for policy in policies if selects(policy["spec"]["podSelector"]["matchLabels"], pod)]
        empty = [policy for policy in selecting if not {"ingress", "egress"} & policy["spec"].keys()]
        if not any(sorted(policy["spec"]["policyTypes"]) == ["Egress", "Ingress"] for policy in empty):
            yield f"{pod.owner}: nothing refuses its connections"
        if len(selecting) != 2:
            yield f"{pod.owner}: it has {len(selecting)} policies, not its own and the one of all"
    for policy in policies:
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"].get(direction, ()):
                if not rule.get(peers) or not rule.get("ports") or not all(rule[peers]):
                    yield f"{name_of(policy)}: a rule allows every peer, or every port"


def prepared(documents: Sequence[Document]) -> Iterator[str]:
    """What the Jobs that migrate need is made before them, in the same phases of a release."""
    hooks = [document for document in documents if "helm.sh/hook" in document["metadata"].get("annotations", {})]
    of_migrate = [hook for hook in hooks if hook["metadata"]["labels"][COMPONENT] == MIGRATE]
    if len({hook["metadata"]["annotations"]["helm.sh/hook"] for hook in of_migrate}) != 1:
        yield "the hooks of the migration are not of the same phases"
    weights: dict[bool, list[int]] = {True: [], False: []}
    for hook in of_migrate:
        weights[hook["kind"] == "Job"].append(int(hook["metadata"]["annotations"].get("helm.sh/hook-weight", 0)))
    if not weights[True] or max(weights[False], default=0) >= min(weights[True], default=0):
        yield "a Job that migrates runs before what it needs is there"
    if len(weights[True]) != len(set(weights[True])):
        yield "two Jobs that migrate run at once"
    for job in of_kind(documents, "Job").values():
        policy = field(job["metadata"], "annotations") or {}
        if "hook-succeeded" in policy.get("helm.sh/hook-delete-policy", ""):
            yield f"{name_of(job)}: its log, which has the password of the first staff account, is deleted at once"


def labelled(documents: Sequence[Document]) -> Iterator[str]:
    """Each document is in the namespace of the release, has a name of its own, and the labels of the release."""
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    for (kind, name), document in zip(names, documents, strict=True):
        if names.count((kind, name)) > 1:
            yield f"{kind}/{name}: there are two"
        if document["metadata"].get("namespace") != "shop":
            yield f"{kind}/{name}: it is not in the namespace of the release"
        labels = document["metadata"]["labels"]
        if not selector().items() <= labels.items() or labels.get("app.kubernetes.io/managed-by") != "Helm":
            yield f"{kind}/{name}: it lacks labels of the release"


RULES: Final[Mapping[str, Rule]] = {
    rule.__name__: rule
    for rule in (restricted, hardened, mounted, bounded, serves, scaled, reachable, isolated, prepared, labelled)
}


def files_of(volume: Mapping[str, Any]) -> set[str]:
    """The files of a volume of a Secret or a ConfigMap; empty: all keys."""
    return {item["path"] for kind in ("secret", "configMap") for item in volume.get(kind, {}).get("items", ())}


def selects(labels: Mapping[str, str], pod: Pod) -> bool:
    return labels.items() <= pod.labels.items()


def _lacks(owner: str, of: Mapping[str, Any], wanted: Mapping[str, object]) -> Iterator[str]:
    for path, value in wanted.items():
        if field(of, path) != value:
            yield f"{owner}: {path} is {field(of, path)}, not {value}"


# ---------------------------------------------------------------------------------------------- secrets and connections


def secrets_of(pod: Pod) -> set[str]:
    """The names of all Secrets that a pod reads."""
    found: set[str] = set()
    for container in pod.containers:
        found |= {each["secretRef"]["name"] for each in container.get("envFrom", ()) if "secretRef" in each}
        references = [field(variable, "valueFrom.secretKeyRef.name") for variable in container.get("env", ())]
        found |= {name for name in references if name}
    for volume in pod.spec.get("volumes", ()):
        projected = field(volume, "projected.sources") or ()
        for name in (field(volume, "secret.secretName"), *(field(source, "secret.name") for source in projected)):
            found |= {name} if name else set()
    return found


def connections(documents: Sequence[Document], pod: Pod, direction: str) -> set[str]:
    """The peers and ports, as in `orders:9080`, that the policies of a pod allow: `ingress` or `egress`."""
    key = "from" if direction == "ingress" else "to"
    found: set[str] = set()
    for policy in of_kind(documents, "NetworkPolicy").values():
        if not selects(policy["spec"]["podSelector"]["matchLabels"], pod):
            continue
        for rule in policy["spec"].get(direction, ()):
            for peer, port in itertools.product(rule[key], rule["ports"]):
                found.add(f"{peer_name(peer)}:{port['port']}")
    return found


def peer_name(peer: Mapping[str, Any]) -> str:
    """A component of the release by its name; of others the address, or the values of the labels."""
    if "ipBlock" in peer:
        return peer["ipBlock"]["cidr"]
    parts: list[str] = []
    for key, whole in (("namespaceSelector", "cluster"), ("podSelector", "namespace")):
        if key not in peer:
            continue
        labels = peer[key].get("matchLabels", {})
        if peer[key].keys() - {"matchLabels"}:
            parts.append(json.dumps(peer[key]))
        elif COMPONENT in labels and labels == selector(labels[COMPONENT]):
            parts.append(labels[COMPONENT])
        else:
            parts.append("/".join(labels.values()) or whole)
    return " ".join(parts)
