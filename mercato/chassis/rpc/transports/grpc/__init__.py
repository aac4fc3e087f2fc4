"""The transport between processes over gRPC: one call a batch, MessagePack in an envelope of Protocol Buffers.

    /mercato.rpc.v1.orders/place    a Batch, answered by Outcomes (`proto/mercato/rpc/v1/batch.proto`)
    grpc-timeout                    how long the last of the callers still waits; gRPC makes it of the call's deadline
    authorization                   Bearer, and the token of the calling service (`rpc/trust.py`)
    traceparent                     of the first request whose trace is recorded; the body has that of each request
    mercato-version                 the release of the caller, and so of its contracts

The parts
    `GrpcTransport`  in the calling process. It has one connection to each instance (`channels.py`).
    `RpcHandlers`    in the serving process, behind `mercato.chassis.grpc`. `/mercato.rpc.v1.orders/Describe` gives the
                     stats of the instance (`rpc/stats.py`).
    `GrpcRemote`     both, with the lifecycle of a process.

What a call means (docs/decisions/0048)
    OK                                       done: an outcome for each request, errors of the service included
    a connection that cannot be made         nothing was sent; the channel is connected before a batch is given to it
    any status with `mercato-not-started`    nothing was started; another instance may be tried
    DEADLINE_EXCEEDED                        the callers do not wait any more
    any other status                         unknown: UNAVAILABLE too, for gRPC gives it before and after sending

gRPC repeats nothing: its retries are off, also those that it calls transparent.
What it guarantees is that of `transports/direct`, on which it is built; also, messages are bounded in both directions,
and calls of one operation in flight.

Tokens and bodies are sent in the clear: outside of loopback, TLS has to protect them.
"""
