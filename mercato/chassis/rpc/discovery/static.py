"""A list in a setting as a registry: `orders=127.0.0.1:8083,127.0.0.1:9083; users=127.0.0.1:8081`.

It never changes. The callers' probes detect that an instance has restarted at its address.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Self

from mercato.chassis.rpc.discovery import Instance

SERVICE_NAME: Final = re.compile(r"[a-z][a-z0-9_.-]{0,63}", re.ASCII)
ADDRESS: Final = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})", re.ASCII)
LARGEST_PORT: Final = 65_535
EXAMPLE: Final = "orders=127.0.0.1:8083,127.0.0.1:9083; users=127.0.0.1:8081"


class MalformedInstances(ValueError):
    """A list of instances cannot be read. The message names the setting and the error, and gives an example."""

    def __init__(self, setting: str, problem: str) -> None:
        super().__init__(f"The setting {setting} is not valid: {problem} Write it as in {EXAMPLE!r}.")


class StaticRegistry:
    """A fixed list of instances for each service."""

    def __init__(self, instances: Mapping[str, Sequence[Instance]]) -> None:
        self._instances = {service: tuple(found) for service, found in instances.items()}

    @classmethod
    def parse(cls, text: str, *, setting: str) -> Self:
        """Reads entries `service=address,address`, separated by semicolons. `setting` is the variable of the text.

        Raises `MalformedInstances`. An empty text is an empty list.
        """
        addresses: dict[str, str] = {}
        for entry in filter(None, map(str.strip, text.split(";"))):
            service, equals, listed = entry.partition("=")
            if not equals:
                raise MalformedInstances(setting, f"{entry!r} has no '=' between a service and its addresses.")
            service = service.strip()
            if service in addresses:
                raise MalformedInstances(setting, f"{service!r} is listed twice; list all its addresses in one entry.")
            addresses[service] = listed
        return cls.of(addresses, setting=setting)

    @classmethod
    def of(cls, addresses: Mapping[str, str], *, setting: str) -> Self:
        """As `parse`, from the addresses of each service: `{"orders": "127.0.0.1:8083,127.0.0.1:9083"}`."""
        return cls({service: _instances(service, listed, setting) for service, listed in addresses.items()})

    async def open(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""

    def instances(self, service: str) -> Sequence[Instance]:
        return self._instances.get(service, ())

    def watch(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """`changed` is never called."""
        return _nothing_to_end

    def problem(self) -> str:
        return ""


def _nothing_to_end() -> None:
    pass


def _instances(service: str, listed: str, setting: str) -> Sequence[Instance]:
    if not SERVICE_NAME.fullmatch(service):
        raise MalformedInstances(setting, f"{service!r} is not the name of a service.")
    addresses = [address.strip() for address in listed.split(",")]
    for address in addresses:
        _check(service, address, setting)
    if len(set(addresses)) < len(addresses):
        raise MalformedInstances(setting, f"an address of {service!r} is listed twice.")
    return tuple(Instance(service, address, id=address) for address in addresses)


def _check(service: str, address: str, setting: str) -> None:
    if not address:
        raise MalformedInstances(setting, f"{service!r} has an empty address.")
    matched = ADDRESS.fullmatch(address)
    if matched is None:
        raise MalformedInstances(setting, f"{address!r} of {service!r} is not an address such as 127.0.0.1:8083.")
    if not 0 < int(matched[1]) <= LARGEST_PORT:
        raise MalformedInstances(setting, f"the port of {address!r} is not one from 1 to {LARGEST_PORT}.")
