"""How a batch reaches a service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mercato.chassis.contract import Context, Operation
from mercato.chassis.rpc.batching import Outcome


class Transport(Protocol):
    """How a batch reaches a service.

    `send` takes the requests of one operation and their contexts, and answers with as many outcomes, in the same
    order. It raises `ServiceError` when the batch as a whole did not reach a service: then no request was started, or
    it is not known whether it was.
    """

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]: ...
