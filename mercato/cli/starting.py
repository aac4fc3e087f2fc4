"""Shared by the start of every process that serves."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Generator, Iterable, Sequence
from typing import Literal

import structlog

from mercato import topology
from mercato.chassis.contract import Unavailable
from mercato.chassis.hosting.host import GATEWAY
from mercato.chassis.hosting.settings import Settings
from mercato.chassis.observability import faults
from mercato.chassis.postgres.connections import translated

Auth = Literal["open", "required"]

log = structlog.stdlib.get_logger("mercato.start")


class CannotStart(Exception):
    """A sentence for the operator."""


@contextlib.contextmanager
def explained(what: str) -> Generator[None]:
    """Raises `CannotStart`, with a sentence, if the server becomes unavailable."""
    try:
        yield
    except Exception as error:  # the driver's, which only the chassis knows by name
        if isinstance(translated(error, what), Unavailable):
            raise CannotStart(f"{what}: {str(error).rstrip('.')}") from error
        raise


def inject_faults(wanted: str, names: Iterable[str] = tuple(topology.SERVICES)) -> None:
    """Injects the faults of `MERCATO_FAULTS` into the services that this process will host. Raises `CannotStart`."""
    if not wanted:
        return
    topology.builds([name for name in names if name != GATEWAY])  # importing a service declares its fault points
    try:
        faults.inject_from_environment(wanted)
    except ValueError as error:
        raise CannotStart(str(error)) from error


def announce_test_modes(settings: Settings, *, is_open: bool) -> Sequence[str]:
    """Logs settings for tests, and gives them as sentences. Raises `CannotStart` for them if tokens are required.

    A shop that requires tokens may be in production: such settings kill processes, and send calls twice.
    """
    found: list[tuple[str, str]] = []
    if settings.faults:
        found.append(("faults_injected", f"MERCATO_FAULTS injects faults: {settings.faults}"))
    if settings.transport == "loopback":
        found.append(("calls_are_repeated", "MERCATO_TRANSPORT=loopback sends every call that may be repeated twice"))
    if found and not is_open:
        raise CannotStart(f"{found[0][1]}; that is for tests, and is refused where tokens are required: unset it")
    for event, sentence in found:
        log.warning(event, reason=sentence)
    return [sentence for _, sentence in found]


def is_open(host: str, auth: Auth | None) -> bool:
    """Whether callers without a token act as staff: the default on loopback, `CannotStart` elsewhere."""
    if auth == "open" and not is_loopback(host):
        raise CannotStart(
            f"--auth open is for loopback only, and {host} is reachable from elsewhere: leave it away, "
            "and tokens are required"
        )
    return auth == "open" or (auth is None and is_loopback(host))


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def open_to(host: str, listener: socket.socket, *, open_: bool) -> tuple[str, int] | None:
    """The address of a shop that requires no tokens; None if it requires them."""
    return (host, listener.getsockname()[1]) if open_ else None


def url_of(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    bare = host.strip("[]")
    return f"http://[{bare}]:{port}" if ":" in bare else f"http://{bare}:{port}"


def names_of(given: Sequence[str], *, gateway: bool) -> tuple[str, ...]:
    """The services of the command line, each once. Raises `CannotStart` for an unknown one."""
    known = (*topology.SERVICES, GATEWAY) if gateway else tuple(topology.SERVICES)
    for name in given:
        if name not in known:
            raise CannotStart(f"there is no service {name!r}: choose of {', '.join(known)}")
    return tuple(dict.fromkeys(given))
