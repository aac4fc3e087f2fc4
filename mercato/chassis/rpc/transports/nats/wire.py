"""The protocol of the NATS transport: subjects, headers, and reasons of refusals."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Final

from mercato.chassis.contract import Operation

PREFIX: Final = "mercato"
WAKE: Final = "mercato-wake"
MICRO: Final = "$SRV"
QUEUE_GROUP: Final = "mercato"

AUTHORIZATION: Final = "authorization"
REMAINING_MS: Final = "mercato-remaining-ms"
TRACEPARENT: Final = "traceparent"  # W3C Trace Context
VERSION: Final = "mercato-version"
NOT_STARTED: Final = "mercato-not-started"
"""On an answer: nothing was started, and why, as a `NotStarted`."""
PART: Final = "mercato-part"
"""On each part of an answer that is too large for one message: `2/5`, from 1 on."""
ERROR_CODE: Final = "Nats-Service-Error-Code"
ERROR: Final = "Nats-Service-Error"
"""On an answer without outcomes, as the NATS micro protocol has them: the batch failed unexpectedly."""

PARTS_MAX: Final = 9_999
LARGEST_ANSWER_BYTES: Final = 32 * 1_048_576
"""Of all parts together. NATS ends a connection for which more than 64 MiB wait."""
LONGEST_REMAINING_MS: Final = 600_000.0
"""Ten minutes; the longest deadline of an operation is little more than one."""


class NotStarted(enum.StrEnum):
    """Why the receiving process did not start a batch."""

    DRAINING = "draining"
    OVERLOADED = "overloaded"
    UNTRUSTED = "untrusted"
    MALFORMED_HEADER = "malformed_header"
    MALFORMED_BODY = "malformed_body"
    WRONG_BATCH_SIZE = "wrong_batch_size"


def subject_of(operation: Operation[Any, Any]) -> str:
    return f"{PREFIX}.{operation.full_name}"


def wake_subject(source: str) -> str:
    """The subject on which a service wakes the consumers of its event log."""
    return f"{WAKE}.{source}"


def micro_name(service: str) -> str:
    """The name of a service in the NATS micro protocol, which allows no dot in it."""
    return service.replace(".", "-")


def header_block(headers: Mapping[str, str]) -> bytes:
    """Encoded headers. The server counts their length and that of the body against `max_payload`.

    Nothing is escaped: values from clients are checked before they become headers.
    """
    if not headers:
        return b""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    return f"NATS/1.0\r\n{lines}\r\n".encode()


def frame(subject: str, body: bytes, reply: str = "", block: bytes = b"") -> bytes:
    """One message of the protocol of NATS; `block` has its headers."""
    if not block:
        return b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply.encode(), len(body), body)
    sizes = (len(block), len(block) + len(body))
    return b"HPUB %b %b %d %d\r\n%b%b\r\n" % (subject.encode(), reply.encode(), *sizes, block, body)
