"""The public gRPC API: every public operation (`mercato/gateway/public.py`), with the policy of its route.

`descriptors.py`  the protobuf files as descriptors, made at the start from the contracts: no generated code.
`codecs.py`       between the messages of the contracts and those of protobuf.
`methods.py`      a method: its route, its codecs, and what the gateway fills its request with.
`statuses.py`     errors as `google.rpc.Status`; the only place that knows the codes of gRPC.
`edge.py`         answers calls.
`serving.py`      the server with health and reflection, and how it stops.

Nothing here is imported by a process without a port for gRPC.
"""
