"""The HTTP server: uvicorn's httptools protocol with a bound on everything that a client can do to it.

uvicorn does not limit how long a request takes or how large a header or a body is, and answers some malformed
requests in plain text. These parts close the gaps:

`HttpLimits`       the limits.
`bind`             a listening socket, or an error of one sentence.
`HttpServer`       listens on sockets, sweeps over its connections four times a second, drains on stop.
`BoundedProtocol`  one connection: counts what arrives, refuses what exceeds a limit.
`PipelinedTurns`   how many pipelined requests are in work.
`BoundedCycle`     one request and its answer: takes a whole answer in one message, or one that takes long on purpose.
`Refusal`          why a request was refused, as an RFC 9457 problem.
`Shedder`          which requests an application lets into work, by `Priority`, and which it refuses early.

A connection is always in one of these phases:

    IDLE ─ first byte ─> HEAD ─ empty line ─> BODY ─ last byte ─> IDLE
      any of them ─ refused ─> WAITING ─ earlier answers are written ─> LINGERING ─> closed

WAITING exists because of pipelining: the refusal of a second request may not be written into the middle of the
answer to the first. LINGERING exists because of TCP: closing a socket that still has unread input resets the
connection, and a reset may destroy the answer before the client has read it. So the sending half is closed, and
what the client still sends is read and dropped, for a bounded time.

No client can take all connections: one that has sent nothing is closed within seconds, one address has
half of the places at most, and if all are taken, a new connection gets the place of the longest idle one.
A connection whose answer is a stream has no such place: the application bounds its streams.

Guaranteed: an application never receives more than `body_bytes` of a body; a refused request gets one answer, in
its turn, and is the last of its connection. Deadlines are up to one sweep late and never early: the hot path reads
no clock, it only clears the connection's time stamp, and the next sweep sets a new one.
"""

from .addresses import network_of
from .connection_table import ConnectionTable
from .cycle import COMPLETE_RESPONSE, EXTENSIONS, LONG_RESPONSE, STREAM_RESPONSE
from .limits import HttpLimits, Refusal
from .listening import CannotListen, HostUnknown, PortForbidden, PortTaken, allow_descriptors, bind, translate
from .protocol import BoundedProtocol
from .server import HttpServer
from .shedding import EarlyRefusals, LoadLimits, Priority, Rendered, Shedder

__all__ = [
    "COMPLETE_RESPONSE",
    "EXTENSIONS",
    "LONG_RESPONSE",
    "STREAM_RESPONSE",
    "BoundedProtocol",
    "CannotListen",
    "ConnectionTable",
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
    "allow_descriptors",
    "bind",
    "network_of",
    "translate",
]
