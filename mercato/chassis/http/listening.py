"""Opens a listening socket, or raises an error of one sentence that names the fix."""

import contextlib
import errno
import socket
from typing import Any, Final

LISTEN_BACKLOG: Final = 2_048


class CannotListen(Exception):
    """A socket cannot listen at the requested address; the message is one sentence that names the fix."""


class PortTaken(CannotListen):
    """Another process listens there."""


class PortForbidden(CannotListen):
    """The port needs a privilege that this process does not have."""


class HostUnknown(CannotListen):
    """The host is not a name or an address of this machine."""


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket on the first address of `host`; port 0 takes a free one.

    `host` is a name, an IPv4 address, or an IPv6 address with or without brackets. `::` also takes IPv4 where the
    system allows it. Raises a `CannotListen`.
    """
    if not 0 <= port <= 65_535:
        raise CannotListen(f"{port} is not a port: choose one from 0 to 65535 with --port.")
    family, address = resolve(host.removeprefix("[").removesuffix("]"), port)
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
        # So that a restart does not wait for the old process's connections to time out.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
            # Here and not later: of two processes that only bound the port, the second one to listen would fail.
            sock.listen(LISTEN_BACKLOG)
        except OSError as error:
            raise translate(error, host, port) from error
        sock.setblocking(False)
        undo.pop_all()
        return sock


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """The address family and the address of `host`; raises `HostUnknown`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise HostUnknown(f"The host {host!r} is unknown: choose another with --host.") from error
    family, _, _, _, address = found[0]
    return family, address


def translate(error: OSError, host: str, port: int) -> CannotListen:
    """The operating system's error as a sentence that tells the operator what to change."""
    where = f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return PortTaken(f"{where} is taken by another process: stop it, or choose another port with --port.")
    if error.errno in (errno.EACCES, errno.EPERM):
        return PortForbidden(f"{where} needs a privilege: choose a port from 1024 upwards with --port.")
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return HostUnknown(f"{host} is not an address of this machine: choose another with --host.")
    return CannotListen(f"Cannot listen on {where}: {error.strerror}.")


def allow_descriptors(count: int) -> None:
    """Raises the limit of open files of this process to `count`, or as far as the system lets it (RLIMIT_NOFILE).

    Shells often set 1024, which is fewer than the connections and streams of a process.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
