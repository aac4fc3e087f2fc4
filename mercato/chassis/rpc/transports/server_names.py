"""The name that the certificate of an instance must have, for transports that connect to addresses.

A registry gives addresses, and a certificate seldom has them: that of a pod is made before the pod has one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from mercato.chassis.rpc.discovery import Instance

SERVICE: Final = "{service}"
ADDRESS: Final = "{address}"
NAME: Final = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]{0,62})(\.[a-z0-9]([-a-z0-9]{0,62}))*", re.ASCII)
"""A name in DNS (RFC 1123)."""

ServerName = Callable[[Instance], str]
"""The name, or the address without its port, by which an instance is verified."""


class MalformedName(ValueError):
    """A sentence that says why a setting cannot be a name in certificates."""


def by_registry(instance: Instance) -> str:
    """The name by which the registry found the instance; where it found an address, that."""
    return instance.name or by_address(instance)


def by_address(instance: Instance) -> str:
    return instance.address.rpartition(":")[0].strip("[]")


def server_name(setting: str) -> ServerName:
    """By a setting: a name in which `{service}` stands for the service, `{address}` for `by_address`, or empty.

    Raises `MalformedName`.
    """
    if not setting:
        return by_registry
    if setting == ADDRESS:
        return by_address
    if not NAME.fullmatch(setting.replace(SERVICE, "orders")):
        raise MalformedName(
            f"{setting!r} is not a name in a certificate, such as {SERVICE}.shop.svc; {ADDRESS} stands alone"
        )

    def named(instance: Instance) -> str:
        # The log of a service is a contract of its own, at the addresses of the service.
        return setting.replace(SERVICE, instance.service.partition(".")[0])

    return named
