"""Calls of the public gRPC API, with the policy of the gateway: what HTTP requests go through, calls do too.

    1. read the message       size RESOURCE_EXHAUSTED or INVALID_ARGUMENT
    2. identify the caller    token UNAUTHENTICATED, role PERMISSION_DENIED, rate RESOURCE_EXHAUSTED
    3. check the request      INVALID_ARGUMENT, all wrong fields at once
    4. call the operation     while its class is below its limit, else UNAVAILABLE; until the deadline of the client, or
                              of the gateway if that is earlier
    5. answer                 the message, or a status with details

A caller that cancels its call, or is gone, ends it: an operation that was begun is finished by its service.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Collection, Generator, Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import grpc
import grpc.aio
import structlog

from mercato.chassis.contract import (
    ANONYMOUS_ACTOR,
    Contract,
    Internal,
    InvalidRequest,
    ServiceError,
    current,
)
from mercato.chassis.hosting.host import GATEWAY
from mercato.chassis.http import network_of
from mercato.chassis.observability.counting import PendingHistogram
from mercato.chassis.observability.telemetry import Telemetry
from mercato.contracts.field_numbers import Numbers
from mercato.contracts.protos import full_method
from mercato.gateway import access_log
from mercato.gateway.app import ADDRESS_LENGTH, Gateway, address_of
from mercato.gateway.asgi import Client
from mercato.gateway.grpc.codecs import Codecs
from mercato.gateway.grpc.methods import Method
from mercato.gateway.grpc.statuses import DETAILS_KEY, code_of, sentence_of, status_of
from mercato.gateway.headers import RequestHeaders
from mercato.gateway.problems import TooManyRequests
from mercato.gateway.public import proto_files, public_routes
from mercato.gateway.route import RouteRequest
from mercato.gateway.spans import CLIENT_GONE
from mercato.gateway.validation import all_wrong, invalid

if TYPE_CHECKING:
    CallContext = grpc.aio.ServicerContext[Any, Any]

CALL_SECONDS: Final = "mercato_grpc_request_duration_seconds"
OK: Final = grpc.StatusCode.OK
FAILURES: Final = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED})
"""A process that is overloaded answers UNAVAILABLE to many: that is counted, and not logged."""
CALLS_OF_ONE: Final = 256
"""Running calls of one IPv4 address or IPv6 network: half of what a server runs at once (`GrpcLimits.calls`)."""
NO_KEY: Final = "is no metadata here: set the field idempotency_key of the message"

log = structlog.stdlib.get_logger("mercato.gateway", service=GATEWAY)


def answered(telemetry: Telemetry) -> PendingHistogram:
    """Calls by method and code."""
    about = "From a call of the public gRPC API to its answer."
    return telemetry.histogram(CALL_SECONDS, about, ["rpc_method", "rpc_response_status_code"])


class Edge:
    """The methods of `services`. `contracts`: those of all services."""

    def __init__(
        self,
        gateway: Gateway,
        contracts: Mapping[str, type[Contract]],
        services: Collection[str],
        numbers: Numbers,
        telemetry: Telemetry,
    ) -> None:
        files = proto_files(contracts, numbers)
        self._gateway = gateway
        self._codecs = Codecs(files)
        self._tracing = telemetry.tracing
        self._seconds = answered(telemetry)
        self._running: Counter[str] = Counter()
        self._stopping = asyncio.Event()
        routes = public_routes()
        self.methods: dict[str, Method] = {}
        """By their paths: `/mercato.orders.v1.OrdersService/Place`."""
        self.services: list[str] = []
        for file in files:
            if file.service is None or file.service.owner.service not in services:
                continue
            self.services.append(f"{file.package}.{file.service.name}")
            for proto in file.service.methods:
                name = full_method(proto.public.operation, file.service.owner)
                route = routes[proto.public.operation.full_name]
                self.methods[f"/{name}"] = Method(name, proto, route, gateway.bind(route, name=name), self._codecs)

    def stop_waiting(self) -> None:
        """Ends the calls that only wait: they are answered with what is known."""
        self._stopping.set()

    async def call(self, method: Method, raw: bytes, context: CallContext) -> bytes:
        """Answers a call. Raises what `context.abort` raises."""
        started = time.perf_counter()
        headers = RequestHeaders(_pairs(context))
        if self._tracing.is_on:
            headers.span = self._tracing.request(
                method.name, GATEWAY, headers.trace_id, headers.parent_id, asked=headers.asks_for_trace, started=started
            )
        trailer = ("x-request-id", headers.request_id)
        try:
            with self._counted(_client(context)):
                answer = await self._serve(method, raw, headers, context)
        except ServiceError as error:
            refusal = method.reworded(error) if isinstance(error, InvalidRequest) else error
        except asyncio.CancelledError:
            if headers.span is not None:
                headers.span.end(CLIENT_GONE)
            self._note(method, grpc.StatusCode.CANCELLED, started, headers)
            raise
        except Exception as error:  # any bug: the client gets an answer and the log the cause
            log.error("request_failed", trace_id=headers.trace_id, route=method.name, exc_info=error)
            refusal = Internal(operation=method.name)
        else:
            context.set_trailing_metadata((trailer,))
            self._note(method, OK, started, headers)
            return answer
        status = status_of(refusal, headers, self._codecs).SerializeToString()
        self._note(method, code_of(refusal), started, headers)
        await context.abort(code_of(refusal), sentence_of(refusal), (trailer, (DETAILS_KEY, status)))
        raise AssertionError("abort has raised")

    async def _serve(self, method: Method, raw: bytes, headers: RequestHeaders, context: CallContext) -> bytes:
        gateway, bound, client = self._gateway, method.bound, _client(context)
        if (load := gateway.load).waiting and load.in_work >= load.capacity[bound.priority]:
            await load.check(bound.priority, bound.name)
        gateway.authenticator.check_call(headers)
        if headers.idempotency_key is not None:
            raise invalid(("metadata idempotency-key", NO_KEY))
        message = method.parsed(raw)
        values = method.request.read(message)
        access_token = method.access_token(values)
        actor, session_id = await gateway.admit(bound, headers, access_token, client)
        request = RouteRequest(actor, {}, None, None, None, None, b"", None, "")
        request.access_token, request.session_id = access_token, session_id
        request.address = address_of(client)[:ADDRESS_LENGTH]
        try:
            request.idempotency_key = method.key(values)
        except InvalidRequest as error:
            raise all_wrong(error.errors, lambda: method.asked(values, request)) from None
        if request.idempotency_key is not None:
            request.fingerprint = method.fingerprint(message)
        request.body = asked = method.asked(values, request)
        request.counts = getattr(asked, "count", False)
        remaining = _remaining(context)
        if method.is_waiting:
            within = _earlier(gateway.seconds + asked.wait_ms / 1_000, remaining)
            return method.answer.encode(await self._wait(method, request, headers, gateway.monotonic() + within))
        within = _earlier(gateway.seconds, remaining)
        answer = await gateway.perform(bound, request, asked, headers, client, within)
        return method.answer.encode(answer)

    async def _wait(self, method: Method, request: RouteRequest, headers: RequestHeaders, deadline: float) -> Any:
        """The answer of an operation that waits; when the server stops, that to a request which does not."""
        asked = request.body
        headers.concern(asked.id)
        actor = request.actor if request.actor.id or request.access_token is None else ANONYMOUS_ACTOR
        current.set(headers.context(actor, deadline))
        asking = asyncio.ensure_future(method.bound.call(asked))
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((asking, stopping), return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
            return await method.bound.call(method.without_wait(asked))
        finally:
            asking.cancel()
            stopping.cancel()

    @contextlib.contextmanager
    def _counted(self, client: Client) -> Generator[None]:
        """Raises `TooManyRequests` for a client with too many running calls: gRPC cannot bound its connections."""
        network = network_of(address_of(client))
        if self._running[network] >= CALLS_OF_ONE:
            raise TooManyRequests(1)
        self._running[network] += 1
        try:
            yield
        finally:
            self._running[network] -= 1
            if not self._running[network]:
                del self._running[network]

    def _note(self, method: Method, code: grpc.StatusCode, started: float, headers: RequestHeaders) -> None:
        """The metric, the span and the line of a call that has ended."""
        seconds, is_failure = time.perf_counter() - started, code in FAILURES
        self._seconds.labels(rpc_method=method.name, rpc_response_status_code=code.name).add(seconds)
        if headers.span is not None and code is not grpc.StatusCode.CANCELLED:
            headers.span.note(
                {
                    "rpc.system.name": "grpc",
                    "rpc.method": method.name,
                    "rpc.response.status_code": code.name,
                    "mercato.request.id": headers.request_id,
                    "mercato.actor.id": headers.actor_id,
                }
            )
            failure = code.name if is_failure else ""
            self._tracing.end_request(headers.span, headers.trace_id, failure, is_failed=is_failure)
        is_slow = seconds >= self._gateway.slow_seconds
        if self._gateway.log_requests or is_failure or is_slow:
            access_log.note("gRPC", method.name, code.name, seconds, headers, is_slow=is_slow, is_failure=is_failure)


def _earlier(seconds: float, remaining: float | None) -> float:
    return seconds if remaining is None else min(seconds, remaining)


def _remaining(context: CallContext) -> float | None:
    """The seconds until the deadline of the client; None without one, which the stubs of gRPC do not know."""
    return context.time_remaining()


def _pairs(context: CallContext) -> Generator[tuple[bytes, bytes]]:
    for name, value in context.invocation_metadata() or ():
        yield name.encode(), value if isinstance(value, bytes) else value.encode()


def _client(context: CallContext) -> Client:
    """The address and port of the connection: of `ipv4:127.0.0.1:50000`, `ipv6:%5B::1%5D:50000`."""
    kind, _, peer = unquote(context.peer()).partition(":")
    host, _, port = peer.rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdigit():
        return None
    return host.strip("[]"), int(port)
