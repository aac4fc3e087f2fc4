"""Several hosts on one machine: network namespaces, each with an address and a link that can be cut."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Generator
from typing import Final

NETWORK: Final = "10.213.7"
"""The network of these tests; a machine runs one of them at a time."""


def why_not() -> str:
    """Why this machine cannot create network namespaces; empty where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command ip is missing: apt-get install iproute2"
    probe = f"mercato-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"this machine makes no network namespace: {made.stderr.strip()}"
    _ip("netns", "del", probe)
    return ""


class Host:
    """One host: a process that runs `inside` sees only its address and its own loopback."""

    def __init__(self, network: Network, number: int) -> None:
        self.address = f"{NETWORK}.{number}"
        self._name = f"mercato-{os.getpid()}-{network.number}-{number}"
        # The kernel removes the links of a namespace later than its name, so names are not used again.
        self._link = f"{network.bridge}-{number}"
        self._network = network

    @property
    def inside(self) -> tuple[str, ...]:
        """The prefix of a command that runs on this host."""
        return ("ip", "netns", "exec", self._name)

    def make(self) -> None:
        _ip("netns", "add", self._name)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self._name)
        _ip("link", "set", self._link, "master", self._network.bridge, "up")
        for command in (
            ["addr", "add", f"{self.address}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
        ):
            _ip("-n", self._name, *command)

    def remove(self) -> None:
        for command in (["link", "del", self._link], ["netns", "del", self._name]):
            with contextlib.suppress(subprocess.CalledProcessError):  # it was never made
                _ip(*command)

    def cut(self) -> None:
        """Drops all its packets in both directions; its connections stay open."""
        _ip("link", "set", self._link, "down")

    def heal(self) -> None:
        _ip("link", "set", self._link, "up")


class Network:
    """Hosts that reach each other and this one."""

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.bridge = f"mc{os.getpid() % 100_000}-{self.number}"


@contextlib.contextmanager
def hosts(count: int) -> Generator[list[Host]]:
    """So many hosts for the time of a block."""
    network = Network()
    made = [Host(network, number) for number in range(1, count + 1)]
    with contextlib.ExitStack() as stack:
        _ip("link", "add", network.bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", network.bridge)
        _ip("addr", "add", f"{NETWORK}.254/24", "dev", network.bridge)
        _ip("link", "set", network.bridge, "up")
        for host in made:
            stack.callback(host.remove)
            host.make()
        yield made


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
