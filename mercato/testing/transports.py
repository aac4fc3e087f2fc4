"""The transports over which tests run: each test that takes the fixture `transport`, once over each."""

from __future__ import annotations

import os
from typing import Final, Literal, cast

AnyTransport = Literal["local", "loopback", "http", "nats", "grpc"]

TRANSPORTS: Final = [
    cast(AnyTransport, name) for name in os.environ.get("MERCATO_TEST_TRANSPORTS", "local,loopback").split(",")
]
"""`make test-split` sets the transports between processes."""
