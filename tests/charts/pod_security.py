"""The level `restricted` of Kubernetes' Pod Security Standards, as data; the levels below it are part of it.

After https://kubernetes.io/docs/concepts/security/pod-security-standards/ as of Kubernetes 1.34.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from charts.chart import Pod

UNSET: Final = None


class Control(NamedTuple):
    """The values that a field may have. A field of the pod counts for a container that has none of its own."""

    path: str
    allowed: tuple[object, ...]
    """`UNSET`: the field may be left out."""
    of_pod: bool = True
    of_container: bool = False


CONTROLS: Final = (
    Control("hostNetwork", (UNSET, False)),
    Control("hostPID", (UNSET, False)),
    Control("hostIPC", (UNSET, False)),
    Control("securityContext.windowsOptions.hostProcess", (UNSET, False), of_container=True),
    Control("securityContext.privileged", (UNSET, False), of_pod=False, of_container=True),
    Control("securityContext.procMount", (UNSET, "Default"), of_pod=False, of_container=True),
    Control("securityContext.appArmorProfile.type", (UNSET, "RuntimeDefault", "Localhost"), of_container=True),
    Control(
        "securityContext.seLinuxOptions.type",
        (UNSET, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"),
        of_container=True,
    ),
    Control("securityContext.seLinuxOptions.user", (UNSET, ""), of_container=True),
    Control("securityContext.seLinuxOptions.role", (UNSET, ""), of_container=True),
    Control("securityContext.allowPrivilegeEscalation", (False,), of_pod=False, of_container=True),
)
"""What each place that has the field is checked for."""

INHERITED: Final = (
    Control("securityContext.runAsNonRoot", (True,)),
    Control("securityContext.seccompProfile.type", ("RuntimeDefault", "Localhost")),
)
"""What holds for a container if it, or else its pod, has it."""

NOT_ROOT: Final = "securityContext.runAsUser"
VOLUMES: Final = frozenset(
    {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
)
CAPABILITIES: Final = frozenset({"NET_BIND_SERVICE"})
"""Those that may be added."""
SYSCTLS: Final = frozenset(
    {
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.tcp_syncookies",
        "net.ipv4.ping_group_range",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
    }
)
PROBES: Final = ("startupProbe", "livenessProbe", "readinessProbe")
HOOKS: Final = ("postStart", "preStop")


def field(of: Mapping[str, Any], path: str) -> Any:
    """The value at a path; `UNSET` if there is none."""
    value: Any = of
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else UNSET
    return value


def violations(pod: Pod) -> Iterator[str]:
    """What the level `restricted` forbids of a pod."""
    for control in CONTROLS:
        places = [pod.spec] if control.of_pod else []
        places += pod.containers if control.of_container else []
        for place in places:
            if field(place, control.path) not in control.allowed:
                yield f"{control.path} is {field(place, control.path)}"
    for container in pod.containers:
        yield from _of_container(container, pod)
    if field(pod.spec, NOT_ROOT) == 0:
        yield f"{NOT_ROOT} is 0"
    for volume in pod.spec.get("volumes", ()):
        if kinds := volume.keys() - {"name"} - VOLUMES:
            yield f"the volume {volume['name']} is a {sorted(kinds)[0]}"
    for sysctl in field(pod.spec, "securityContext.sysctls") or ():
        if sysctl["name"] not in SYSCTLS:
            yield f"the sysctl {sysctl['name']} is set"


def _of_container(container: Mapping[str, Any], pod: Pod) -> Iterator[str]:
    for control in INHERITED:
        own = field(container, control.path)
        value = field(pod.spec, control.path) if own is UNSET else own
        if value not in control.allowed:
            yield f"{control.path} is {value}"
    if field(container, NOT_ROOT) == 0:
        yield f"{NOT_ROOT} is 0"
    if "ALL" not in (field(container, "securityContext.capabilities.drop") or ()):
        yield "securityContext.capabilities.drop lacks ALL"
    if added := set(field(container, "securityContext.capabilities.add") or ()) - CAPABILITIES:
        yield f"securityContext.capabilities.add has {sorted(added)[0]}"
    for port in container.get("ports", ()):
        if port.get("hostPort"):
            yield f"hostPort is {port['hostPort']}"
    handlers = [container.get(probe, {}) for probe in PROBES]
    handlers += [field(container, f"lifecycle.{hook}") or {} for hook in HOOKS]
    for handler in handlers:
        for action in ("httpGet", "tcpSocket"):
            if host := handler.get(action, {}).get("host"):
                yield f"{action}.host is {host}"
