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

Guaranteed
    - A batch is sent to another instance only if nothing was started: there was no connection, or the answer says so.
    - If it is unknown whether a request was started, its caller gets `Unavailable` if repeating it is safe
      (`safe`, or `keyed` with a key), and `OutcomeUnknown` if not. Nothing is repeated here.
    - The texts of exceptions stay in the process that raised them.
    - Bodies are bounded in both directions, connections for each instance, and calls of one operation in flight.
    - No handler sees a batch without a valid token, of an operation that its caller is not granted, or a request in the
      name of a role that its caller is not granted.

`client.py` and `remote.py` import a client library, which takes a while: a process that only serves does not need it.
Tokens and bodies are sent in the clear: outside of loopback, TLS has to protect them.
"""
