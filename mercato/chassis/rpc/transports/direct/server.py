"""The receiving end: admits a batch, runs it, encodes the outcomes. See the top of this package."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Final

import msgspec
import structlog

from mercato.chassis.contract import Context, DeadlineExceeded, Operation, Unauthenticated
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.codec import decode_requests, encode_outcomes
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.stats import OperationRecorder, Stats
from mercato.chassis.rpc.transports.encoded import answer_decoded
from mercato.chassis.rpc.trust import Trust

from .wire import BEARER, NotStarted

log = structlog.stdlib.get_logger("mercato.rpc.direct")

SHOWN_CHARACTERS: Final = 200
"""How much of a caller's input may be written in a line of the log."""


class RefusedBatch(Exception):
    """Nothing was started. `detail` is a sentence for the caller's engineer.

    `draining_seconds`: this process will have ended after so many seconds.
    """

    def __init__(self, reason: NotStarted, detail: str, draining_seconds: float | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.draining_seconds = draining_seconds


class BatchReceiver:
    """Serves `servers`, by the name of their contract; servers may be added to the mapping later."""

    def __init__(self, servers: Mapping[str, Server], trust: Trust, clock: Clock, stats: Stats | None = None) -> None:
        self._servers = servers
        self._trust = trust
        self._clock = clock
        self._stats = stats or Stats("", "")
        self._ends_at: float | None = None

    def drain(self, seconds: float) -> None:
        """From now on refuses each batch unstarted, so that its caller uses another instance; running ones go on.

        `seconds`: this process has ended by then; until then callers send nothing to it.
        """
        self._ends_at = self._clock.monotonic() + seconds

    def check_not_draining(self) -> None:
        """Raises `RefusedBatch`."""
        if self._ends_at is not None:
            seconds = max(0.0, self._ends_at - self._clock.monotonic())
            raise RefusedBatch(NotStarted.DRAINING, "This process is about to end.", seconds)

    def find(self, service: str, name: str) -> tuple[Server, Operation[Any, Any]]:
        """Raises `RefusedBatch`."""
        server = self._servers.get(service)
        operation = server.contract.operations.get(name) if server else None
        if server is None or operation is None:
            raise RefusedBatch(NotStarted.UNKNOWN_OPERATION, "This process does not serve such an operation.")
        return server, operation

    def caller(self, service: str, authorization: str) -> str:
        """The service that calls, by the token in its header. Raises `RefusedBatch`."""
        scheme, _, token = authorization.partition(" ")
        try:
            return self._trust.caller(token if f"{scheme} " == BEARER else None, service)
        except Unauthenticated as error:
            raise RefusedBatch(NotStarted.UNTRUSTED, error.reason) from None

    def describe(self, service: str, authorization: str) -> bytes:
        """The `InstanceStats` of a service as JSON, for any authenticated caller. Raises `RefusedBatch`."""
        self.admit(service, authorization)
        return msgspec.json.encode(self._stats.of(service))

    def admit(self, service: str, authorization: str) -> None:
        """Raises `RefusedBatch` for a caller that is not authenticated, and where it would get no outcomes anyway."""
        if service not in self._servers:
            raise RefusedBatch(NotStarted.UNKNOWN_OPERATION, "This process does not serve such a service.")
        self.check_not_draining()
        self.caller(service, authorization)

    @contextlib.contextmanager
    def recording(self, operation: Operation[Any, Any]) -> Generator[OperationRecorder]:
        """Counts what is refused in the block."""
        recorder = self._stats.recorder(operation.service, operation.name)
        try:
            yield recorder
        except RefusedBatch:
            recorder.failed()
            raise

    async def run(
        self,
        server: Server,
        operation: Operation[Any, Any],
        recorder: OperationRecorder,
        caller: str,
        body: bytes,
        remaining_s: float,
        *,
        traceparent: str,
        version: str,
    ) -> bytes:
        """The outcomes of a batch, encoded. Raises `RefusedBatch`."""
        # Checked again, for the body may have taken long; from here to the handler there is no further wait.
        self.check_not_draining()
        requests, contexts = self._decode(operation, body, traceparent, version)
        refusals = self._trust.refusals(caller, operation, contexts)
        requests = [refusals.get(place, request) for place, request in enumerate(requests)]
        started = self._clock.monotonic()
        try:
            async with asyncio.timeout(remaining_s):
                return await answer_decoded(server, operation, requests, contexts)
        except TimeoutError:
            return encode_outcomes(operation, [DeadlineExceeded(operation=operation.full_name) for _ in requests])
        finally:
            recorder.answered(len(requests), self._clock.monotonic() - started)

    def _decode(
        self, operation: Operation[Any, Any], body: bytes, traceparent: str, version: str
    ) -> tuple[Sequence[Any], Sequence[Context]]:
        try:
            requests, contexts = decode_requests(operation, body, self._clock.monotonic(), traceparent)
        except (msgspec.MsgspecError, RecursionError) as error:  # RecursionError: deeply nested lists
            version = version[:SHOWN_CHARACTERS]
            log.warning("rpc_malformed", operation=operation.full_name, caller_version=version, reason=str(error))
            raise RefusedBatch(NotStarted.MALFORMED_BODY, "The body is not a batch in MessagePack.") from error
        if not 1 <= len(requests) <= operation.size:
            raise RefusedBatch(NotStarted.WRONG_BATCH_SIZE, f"A batch has 1 to {operation.size} requests here.")
        return requests, contexts
