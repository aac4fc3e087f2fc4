"""What the transports share that reach an instance by its address: `http` and `grpc`.

The parts
    `DirectTransport`  in the calling process: chooses an instance (`rpc/balancing.py`), sends, reports to it.
    `BatchReceiver`    in the serving process: admits a batch, runs it, encodes the outcomes.
    `DirectRemote`     both, with the lifecycle of a process.

Guaranteed
    - A batch is sent to another instance only if nothing was started: there was no connection, or the answer says so.
    - If it is unknown whether a request was started, its caller gets `Unavailable` if repeating it is safe
      (`safe`, or `keyed` with a key), and `OutcomeUnknown` if not. Nothing is repeated here.
    - The texts of exceptions stay in the process that raised them.
    - No handler sees a batch without a valid token, of an operation that its caller is not granted, or a request in the
      name of a role that its caller is not granted.
    - A batch whose caller has left is not cancelled: it may have committed. As within one process, it is cancelled when
      the deadlines of its callers have passed.
"""
