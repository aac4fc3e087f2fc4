"""Checks of a request's head that the parser leaves to its caller: the version, and the form of the target."""

from typing import Final

import httptools

from .limits import MALFORMED, VERSION_NOT_SUPPORTED, Refusal, RequestRefused

VERSIONS: Final = frozenset({"1.1", "1.0"})
NO_VERSION: Final = "0.9"
"""What llhttp takes for the version of a request line that ends behind its target, as those of HTTP/0.9 did."""
VERSION_ERRORS: Final = ("Invalid HTTP version", "Pause on PRI/Upgrade")
"""What llhttp says of a version that it does not know, and of the preface of HTTP/2."""


def refusal_of(error: httptools.HttpParserError) -> Refusal:
    """The refusal of a request that the parser rejects."""
    return VERSION_NOT_SUPPORTED if str(error) in VERSION_ERRORS else MALFORMED


def refusal_of_version(version: str) -> Refusal:
    """The refusal of a request in another version than `VERSIONS`.

    A request line without a version is malformed (RFC 9112 3), and so is `HTTP/0.9`: that version has no name in its
    requests. 505 is for a version that a client may speak, and this server does not (RFC 9110 15.6.6).
    """
    return MALFORMED if version == NO_VERSION else VERSION_NOT_SUPPORTED


SERVER_ITSELF: Final = b"*"
"""Instead of a path: `OPTIONS *` asks about the server, not about a resource (RFC 9110 9.3.7)."""


def path_of_other_form(target: bytes, path: bytes | None, method: bytes) -> bytes:
    """The path of a target whose path does not begin with a slash. Raises `RequestRefused`.

    That is the server itself, which OPTIONS alone may name: `*`, or an address without path and query
    (`OPTIONS http://shop`, RFC 9112 3.2.4).
    """
    names_server = target == SERVER_ITSELF or (path is None and b"://" in target and b"?" not in target)
    if method != b"OPTIONS" or not names_server:
        raise RequestRefused(MALFORMED)
    return SERVER_ITSELF


def check_host_of_target(target: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """For a target with a host (`GET http://shop/orders`): raises `RequestRefused` if `Host` names another one.

    RFC 9112 3.2.2: such a request is for the host of its target, and `Host` must be the same. HTTP/1.0 may leave
    `Host` out; it is then added.
    """
    scheme, _, rest = target.partition(b"://")
    host = rest.partition(b"/")[0].partition(b"?")[0]
    given = [value for name, value in headers if name == b"host"]
    if scheme.lower() not in (b"http", b"https") or not host or b"@" in host:
        raise RequestRefused(MALFORMED)
    if not given:
        headers.append((b"host", host))
    elif given[0].lower() != host.lower():
        raise RequestRefused(MALFORMED)
