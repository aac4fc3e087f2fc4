"""The transport between processes over gRPC: one stream for each service of an instance, one message a batch.

    /mercato.rpc.v1.orders/Exchange    a stream of Batch, answered by a stream of Outcomes, as the batches end
                                       (`proto/mercato/rpc/v1/batch.proto`)
    /mercato.rpc.v1.orders/Describe    the stats of the instance (`rpc/stats.py`)
      authorization                    Bearer, and the token of the calling service (`rpc/trust.py`); in each Batch too
      mercato-version                  the release of the caller, and so of its contracts

The parts
    `GrpcTransport`  in the calling process. It has one connection to each instance (`channels.py`), and in it the
                     streams (`streams.py`).
    `RpcHandlers`    in the serving process, behind `mercato.chassis.grpc`.
    `GrpcRemote`     both, with the lifecycle of a process.

What becomes of a batch (docs/decisions/0048)
    Outcomes with its id                     done, or `not_started`: nothing was started, another may be tried
    there is no stream, and none opens       nothing was sent: a batch is sent when the instance has accepted the stream
    the stream ends, whatever its status     unknown, if the batch was sent
    a message with the id 0                  the instance is about to end: the caller ends the stream, and opens none

gRPC repeats nothing: its retries are off, also those that it calls transparent.
What it guarantees is that of `transports/direct`, on which it is built; also, messages are bounded in both directions,
and batches of one stream.

Tokens and bodies are sent in the clear: outside of loopback, TLS has to protect them.
"""
