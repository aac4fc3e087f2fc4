"""The transport between processes over NATS: one message a batch, MessagePack in both directions.

    mercato.orders.place            the subject of an operation; instances of a service share it as a queue group
      authorization                 the token of the calling service (`rpc/trust.py`)
      mercato-remaining-ms          how long the last of the callers still waits
      traceparent                   of the first request whose trace is recorded; the body has that of each request
      mercato-version               the release of the caller, and so of its contracts

The parts
    `NatsTransport`  in the calling process: publishes, and receives the answers in its own inbox.
    `NatsServer`     in the serving process: bounded handlers in front of the `Server`s, and the NATS micro protocol,
                     with which the tools of NATS find, inspect and measure services.
    `NatsConnection` the connection that both use. It reconnects by itself.
    `permissions`    what the user of a process may publish and subscribe.
    `instances`      which instances there are, and their stats.
    `NatsRemote`     all of it, with the lifecycle of a process; it also wakes the consumers of event logs.

What an answer means
    outcomes                        done: an outcome for each request, errors of the service included
    `mercato-not-started`           nothing was started, and why; `draining`: it is sent again, to another instance
    `Nats-Service-Error-Code`       unknown: it failed unexpectedly
    no responder                    nothing was started: no instance has subscribed
    none before the deadline, or before the connection is lost: unknown

Guaranteed
    - A batch is sent again only if a draining instance answers that it has started nothing. Messages published before
      a connection was lost are not published on the next one, and their answers are dropped.
    - Without a connection a call fails at once, and calls in flight end when it is lost.
    - If it is unknown whether a request was started, its caller gets `Unavailable` if repeating it is safe
      (`safe`, or `keyed` with a key), and `OutcomeUnknown` if not.
    - A batch, or an answer, that is larger than the server's `max_payload` is sent in parts. A single request that is
      larger is refused with `InvalidRequest`.
    - The deadline of a batch includes its wait for a slot. After the deadline, the batch is not started.
    - An instance that closes answers all batches that it has accepted, and starts no other.
    - No handler sees a batch without a valid token, of an operation that its caller is not granted, or a request in the
      name of a role that its caller is not granted.
    - The texts of exceptions stay in the process that raised them.

Tokens and bodies are sent in the clear: outside of loopback, TLS has to protect them (`tls://`).
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
