"""The HTTP server: uvicorn's httptools protocol with a bound on everything that a client can do to it.

uvicorn parses and answers well, but lets a request take for ever, a header or a body grow without end, and
answers some abuses in plain text. Here are the parts that close those gaps:

`HttpLimits`       the bounds.
`bind`             a listening socket, or one sentence that says why not.
`HttpServer`       listens on sockets, sweeps over its connections four times a second, drains on stop.
`BoundedProtocol`  one connection: counts what arrives, refuses what crosses a bound.
`PipelinedTurns`   which requests that came behind another of their connection are in work.
`BoundedCycle`     one request and its answer: takes a whole answer in one message, or one that takes long by intention.
`Refusal`          why a request was refused, as an RFC 9457 problem.
`Shedder`          which requests an application lets into work, by `Priority`, and which it refuses early.

A connection is always in one of these phases:

    IDLE ─ first byte ─> HEAD ─ empty line ─> BODY ─ last byte ─> IDLE
      any of them ─ refused ─> WAITING ─ earlier answers are written ─> LINGERING ─> closed

WAITING exists because of pipelining: the refusal of a second request may not be written into the middle of the
answer to the first. LINGERING exists because of TCP: closing a socket that still has unread input resets the
connection, and a reset may destroy the answer before the client has read it. So the sending half is closed, and
what the client still sends is read and thrown away, for a bounded time.

No client closes the door to others: a connection that has sent nothing is closed within seconds, one address has
half of the places at most, and where all are taken, a new connection gets the place of the longest idle one.

Guaranteed: an application never receives more than `body_bytes` of a body; a refused request gets one answer, in
its turn, and is the last of its connection. Deadlines are up to one sweep late and never early: the hot path reads
no clock, it only forgets the connection's time stamp, and the next sweep sets a new one.
"""

from .addresses import network_of
from .connection_book import ConnectionBook
from .cycle import COMPLETE_RESPONSE, EXTENSIONS, LONG_RESPONSE
from .limits import HttpLimits, Refusal
from .listening import CannotListen, HostUnknown, PortForbidden, PortTaken, bind, translate
from .protocol import BoundedProtocol
from .server import HttpServer
from .shedding import EarlyRefusals, LoadLimits, Priority, Rendered, Shedder

__all__ = [
    "COMPLETE_RESPONSE",
    "EXTENSIONS",
    "LONG_RESPONSE",
    "BoundedProtocol",
    "CannotListen",
    "ConnectionBook",
    "EarlyRefusals",
    "HostUnknown",
    "HttpLimits",
    "HttpServer",
    "LoadLimits",
    "PortForbidden",
    "PortTaken",
    "Priority",
    "Refusal",
    "Rendered",
    "Shedder",
    "bind",
    "network_of",
    "translate",
]
