"""The transport between processes over HTTP/1.1: one POST a batch, MessagePack in both directions.

    POST /rpc/orders/place            content-type: application/vnd.msgpack
      authorization                   Bearer, and the token of the calling service (`rpc/trust.py`)
      mercato-remaining-ms            how long the last of the callers still waits
      traceparent                     of the first request whose trace is recorded; the body has that of each request
      mercato-version                 the release of the caller, and so of its contracts

The parts
    `HttpTransport`  in the calling process: chooses an instance (`rpc/balancing.py`), sends, reports the result to it.
    `RpcApp`         in the serving process: an ASGI application in front of the `Server`s, behind
                     `mercato.chassis.http`. `GET /rpc/orders` gives the stats of the instance (`rpc/stats.py`).
    `HttpRemote`     both, with the lifecycle of a process.

What an answer means
    200 with outcomes                       done: an outcome for each request, errors of the service included
    any status with `mercato-not-started`   nothing was started; another instance may be tried
    anything else, or no complete answer    unknown

What it guarantees is that of `transports/direct`, on which it is built; also, bodies are bounded in both directions,
connections for each instance, and calls of one operation in flight.

`client.py` and `remote.py` import a client library, which takes a while: a process that only serves does not need it.
Tokens and bodies are sent in the clear: outside of loopback, TLS has to protect them.
"""
