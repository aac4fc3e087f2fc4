"""The gRPC server: grpc.aio with a bound on everything that a client can do to it.

`GrpcLimits`  the limits, and the channel arguments of gRPC that set them.
`GrpcTls`     the certificate of a server, and the clients that it asks for one.
`Handlers`    collects what generated `add_..._to_server` functions register.
`GrpcServer`  listens, bounds each call, drains on stop.
`NOTHING`     what is read of a stream at its end.

What gRPC bounds by itself (`GrpcLimits.options` sets it): the size of messages and metadata, streams of a connection,
connections, the time of a handshake, idle and old connections, probes of clients, connections whose client is gone
without a word. What it does not, `bounding.py` does around each handler: how many calls run at once, how long the
message of a call may take to arrive, and which text of an error a client may read.

gRPC cannot bound the connections of one address: a public server counts calls by `context.peer()`. A client
that does not read its answer keeps it in memory until its connection is too old (`age_seconds`).

Compressed messages are refused: gRPC checks the size of a message before it decompresses it.
"""

from .bounding import NOTHING
from .handlers import Handlers
from .limits import TOO_MANY_CALLS, GrpcLimits
from .server import GrpcServer
from .tls import GrpcTls

__all__ = ["NOTHING", "TOO_MANY_CALLS", "GrpcLimits", "GrpcServer", "GrpcTls", "Handlers"]
