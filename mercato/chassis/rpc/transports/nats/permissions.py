"""The subjects that a user of NATS may publish and subscribe to, from the operations that it serves and calls.

A service may subscribe to its own operations and its own inbox, and publish to the operations that it calls. Subjects
are listed one by one: `mercato.orders.>` would also match `mercato.orders.log.read`, of another contract.

Answers go to the inbox of the caller, so a user that serves may publish to all inboxes. It can use only the reply
subjects that callers have sent to it, because each ends with a random token. `allow_responses` of NATS would be
stricter. But for answers in several parts, the server keeps each reply subject until a time limit, which has to be
longer than any call: that costs memory and CPU for each batch. And it drops them when the service reconnects: it
would refuse the answers that are ready then.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from mercato.chassis.contract import Contract, Operation

from .wire import MICRO, micro_name, subject_of, wake_subject

INBOXES: Final = "_INBOX"
VERBS: Final = ("PING", "INFO", "STATS")
USER: Final = re.compile(r"[A-Za-z0-9_-]+")


class Permissions(msgspec.Struct, frozen=True):
    """Subjects that a user may publish to, and subscribe to. Everything else is refused."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def inbox_prefix(user: str) -> str:
    """The prefix of the inboxes of a user. No other user may subscribe there."""
    assert USER.fullmatch(user), f"{user!r} is no name of a user of NATS"
    return f"{INBOXES}.{user}"


def permissions(
    user: str,
    *,
    serves: Iterable[type[Contract]] = (),
    calls: Iterable[Operation[Any, Any]] = (),
    reads: Iterable[str] = (),
    watches: bool = False,
    besides: Iterable[str] = (),
) -> Permissions:
    """The permissions of a user that serves contracts and calls operations.

    `reads` are the services whose wake-ups it receives. `watches`: it may ask which instances there are. `besides` are
    further subjects that it may publish to.
    """
    called = tuple(calls)
    publish = [*(subject_of(operation) for operation in called), *besides]
    # PING shows whether an instance of a called service is there: a process that cannot reach it is not ready.
    publish += [f"{MICRO}.PING.{micro_name(operation.service)}" for operation in called]
    subscribe = [f"{inbox_prefix(user)}.>", *(wake_subject(source) for source in reads)]
    served = tuple(serves)
    for contract in served:
        subscribe += [subject_of(operation) for operation in contract.operations.values()]
        name = micro_name(contract.service)
        for verb in VERBS:
            subscribe += [f"{MICRO}.{verb}", f"{MICRO}.{verb}.{name}", f"{MICRO}.{verb}.{name}.*"]
    if served:
        publish += [f"{INBOXES}.>", wake_subject(user)]
    if watches:
        for verb in VERBS:
            publish += [f"{MICRO}.{verb}", f"{MICRO}.{verb}.>"]
    return Permissions(tuple(dict.fromkeys(publish)), tuple(dict.fromkeys(subscribe)))
