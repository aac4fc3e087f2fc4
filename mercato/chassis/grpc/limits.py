"""The limits of the gRPC server, and the channel arguments that set them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec

Option = tuple[str, int]

NOT_STARTED: Final = "mercato-not-started"
"""In the trailing metadata of a call: no handler has seen it, and why, in a word."""
TOO_MANY_CALLS: Final = "too_many_calls"
"""The value of `NOT_STARTED` for a call beyond `GrpcLimits.calls`."""

LATE: Final = "late"
"""That of a call whose message has not arrived in time."""

IDENTITY_ALONE: Final = 1
"""The set of compressions that has only the one that compresses nothing."""
UNLIMITED: Final = 2**31 - 1
"""What gRPC takes for no limit."""


class GrpcLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits that one server sets its clients. As far as both have one, those of `HttpLimits`."""

    metadata_bytes: int = 16_384  # names and values of a call's metadata together, and 32 bytes for each of them
    message_bytes: int = 1_048_576  # one message of a client
    answer_bytes: int = 16 * 1_048_576  # one message to a client
    receive_seconds: float = 10.0  # from the metadata of a call to the last byte of its first message
    calls: int = 512  # running, of all connections; each holds a message at most
    streams: int = 100  # calls of one connection; a client sends more when these end. RFC 9113 advises not less
    connections: int = 1_024
    handshake_seconds: float = 5.0  # TLS, and until the client has sent its settings
    idle_seconds: float = 60.0  # a connection without calls is closed; longer than clients of ours keep one
    age_seconds: float = math.inf  # then a connection takes no more calls
    age_grace_seconds: float = 30.0  # and those that run have so long
    ping_seconds: float = 20.0  # a connection that is quiet for so long is probed
    ping_answer_seconds: float = 10.0  # and closed if the probe is not answered
    client_ping_seconds: float = 5.0  # clients may probe no more often
    client_ping_strikes: int = 2  # a connection with more probes than that is closed
    drain_seconds: float = 3.0

    def options(self) -> Sequence[Option]:
        """The channel arguments of a server with these limits (`grpc/impl/channel_arg_names.h`)."""
        return (
            # With the soft limit below the hard one, gRPC would refuse a random share of the calls between them.
            ("grpc.max_metadata_size", self.metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.metadata_bytes),
            ("grpc.max_receive_message_length", self.message_bytes),
            ("grpc.max_send_message_length", self.answer_bytes),
            ("grpc.compression_enabled_algorithms_bitset", IDENTITY_ALONE),
            ("grpc.enable_channelz", 0),
            ("grpc.max_concurrent_streams", self.streams),
            ("grpc.max_allowed_incoming_connections", self.connections),
            ("grpc.server_handshake_timeout_ms", milliseconds(self.handshake_seconds)),
            ("grpc.max_connection_idle_ms", milliseconds(self.idle_seconds)),
            ("grpc.max_connection_age_ms", milliseconds(self.age_seconds)),
            ("grpc.max_connection_age_grace_ms", milliseconds(self.age_grace_seconds)),
            ("grpc.keepalive_time_ms", milliseconds(self.ping_seconds)),
            ("grpc.keepalive_timeout_ms", milliseconds(self.ping_answer_seconds)),
            # gRPC 1.85 closes by this one, of a minute by default, and not by the one above.
            ("grpc.http2.ping_timeout_ms", milliseconds(self.ping_answer_seconds)),
            # Else gRPC probes no connection without calls, and allows its client a probe in two hours.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", milliseconds(self.client_ping_seconds)),
            ("grpc.http2.max_ping_strikes", self.client_ping_strikes),
        )


def milliseconds(seconds: float) -> int:
    return UNLIMITED if math.isinf(seconds) else round(seconds * 1_000)
