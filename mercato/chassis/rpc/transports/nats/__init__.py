"""The transport between processes over NATS: one message a batch, MessagePack in both directions.

    mercato.orders.place            the subject of an operation; instances of a service share it as a queue group
      authorization                 the token of the calling service (`rpc/trust.py`)
      mercato-remaining-ms          how long the last of the callers still waits
      mercato-trace-id              of the first request, for logs on the way; each request has its own in the body
      mercato-version               the release of the caller, and so of its contracts

The parts
    `NatsTransport`  in the calling process: publishes, and receives the answers in an inbox of its own.
    `NatsServer`     in the serving process: bounded handlers before the `Server`s, and the NATS micro protocol, by
                     which services are found, inspected and measured with the tools of NATS.
    `NatsConnection` what both stand on. It reconnects by itself.
    `permissions`    what the user of a process may publish and subscribe.
    `instances`      which instances there are, and what they have done.
    `NatsRemote`     all of it, with the lifecycle of a process; it also wakes the consumers of event logs.

What an answer says about the batch
    outcomes                        done: an outcome for each request, errors of the service included
    `mercato-not-started`           nothing was started, and why; `draining`: it is sent again, to another instance
    `Nats-Service-Error-Code`       not known: it failed unexpectedly
    no responder                    nothing was started: no instance has subscribed
    nothing, and the connection is lost, or the time is over: not known

Guaranteed
    - A batch is sent again only where an instance that drains says that it has started nothing. What was published
      before a connection was lost is not published on the next one, and its answers are dropped.
    - Without a connection a call fails at once, and calls in flight end when it is lost.
    - Where it is not known whether a request was started, its caller gets `Unavailable` if repeating it is safe
      (`safe`, or `keyed` with a key), and `OutcomeUnknown` if not.
    - A batch, or an answer, that is larger than the server's `max_payload` travels in parts. A single request that is
      larger is refused with `InvalidRequest`.
    - The time that a batch waits for a slot is part of its time. When it is over, the batch is not started.
    - An instance that closes answers all batches that it has taken, and starts no other.
    - No handler sees a batch without a valid token, of an operation that its caller is not granted, or a request in the
      name of a role that its caller is not granted.
    - The texts of exceptions stay in the process that raised them.

Tokens and bodies travel as they are: outside of loopback, TLS has to protect them (`tls://`).
"""

from .client import NatsTransport
from .connection import NatsConnection, NotConnected, Subscribed
from .instances import FoundEndpoint, FoundInstance, instances
from .permissions import Permissions, inbox_prefix, permissions
from .remote import NatsRemote
from .server import NatsServer, NatsServerLimits

__all__ = [
    "FoundEndpoint",
    "FoundInstance",
    "NatsConnection",
    "NatsRemote",
    "NatsServer",
    "NatsServerLimits",
    "NatsTransport",
    "NotConnected",
    "Permissions",
    "Subscribed",
    "inbox_prefix",
    "instances",
    "permissions",
]
