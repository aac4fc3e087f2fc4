"""The paths beside the table: health, metrics, keys, the API's description and its documentation."""

from __future__ import annotations

import asyncio
import gzip
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route as PageRoute

from mercato.chassis.contract import Context, Forbidden, Internal, ServiceError, current
from mercato.chassis.observability.telemetry import Telemetry
from mercato.contracts.roles import STAFF
from mercato.gateway import asyncapi, docs, openapi, problems, representations
from mercato.gateway.auth import Authenticator, Verifier
from mercato.gateway.headers import RequestHeaders
from mercato.gateway.route import Route

KEYS_SECONDS = 5.0
NO_STORE = "no-store"


class Pages:
    """An ASGI application for the paths beside the table."""

    def __init__(
        self,
        *,
        routes: Sequence[Route],
        authenticator: Authenticator,
        verifier: Verifier,
        telemetry: Telemetry,
        problems: Callable[[], Awaitable[Mapping[str, str]]],
        own_problems: Callable[[], Awaitable[Mapping[str, str]]],
        details: Callable[[], Mapping[str, Any]],
        metrics_token: str = "",
    ) -> None:
        """`problems`: for each service why it cannot work, empty where it can; `own_problems`: the same of this process
        alone, whatever others do. `details`: further members of `/health/ready`. `metrics_token`: the token of a
        collector of metrics; empty where there is none."""
        self._authenticator = authenticator
        self._verifier = verifier
        self._telemetry = telemetry
        self._problems = problems
        self._own_problems = own_problems
        self._details = details
        self._metrics_token = f"Bearer {metrics_token}".encode() if metrics_token else None
        self._app = Starlette(
            routes=[
                PageRoute("/", self._root),
                PageRoute("/health/live", self._live),
                PageRoute("/health/ready", self._readiness),
                PageRoute("/health/self", self._own_readiness),
                PageRoute("/metrics", self._metrics),
                PageRoute("/.well-known/jwks.json", self._jwks),
                PageRoute("/openapi.json", _Described(_openapi(routes, open_shop=authenticator.open)).answer),
                PageRoute("/asyncapi.json", _Described(asyncapi.document).answer),
                *(PageRoute(path, _prepared(page)) for path, page in docs.pages(routes).items()),
            ],
            exception_handlers={HTTPException: _http_problem, ServiceError: _problem, Exception: _bug},
        )
        # A redirect to the path without its last slash would repeat any Host that the client sends.
        self._app.router.redirect_slashes = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)

    async def _root(self, _: Request) -> Response:
        return RedirectResponse("/docs")

    async def _live(self, _: Request) -> Response:
        return _json({"status": "live"})

    async def _readiness(self, _: Request) -> Response:
        """200 while every service can work, else 503; says which cannot, and why."""
        return _ready(await self._problems(), self._details())

    async def _own_readiness(self, _: Request) -> Response:
        """The same of this process alone: one that others cannot help stays in the list of a load balancer."""
        return _ready(await self._own_problems(), {})

    async def _metrics(self, request: Request) -> Response:
        """For staff, a collector with its token, and one on this machine: metrics say how much a shop sells.

        A collector on this machine must name loopback in Host: a page whose own name resolves to it reads nothing.
        """
        if not self._is_collector(request):
            await self._require_staff(request)
        return await rendered_metrics(self._telemetry, request)

    async def _jwks(self, _: Request) -> Response:
        self._cap_deadline()
        keys = await self._verifier.jwks()
        return _json({"keys": keys.keys}, headers={"cache-control": "public, max-age=300"})

    def _is_collector(self, request: Request) -> bool:
        given = request.headers.get("authorization", "").encode("latin-1")
        if self._metrics_token is not None and hmac.compare_digest(given, self._metrics_token):
            return True
        return is_of_this_machine(request)

    async def _require_staff(self, request: Request) -> None:
        self._cap_deadline()
        authorization = request.headers.get("authorization")
        actor = (
            await self._authenticator.actor(authorization.encode("latin-1"))
            if authorization
            else self._authenticator.anonymous_actor
        )
        if actor.role != STAFF:
            raise problems.SignInFirst() if not authorization else Forbidden(operation="metrics", role=actor.role)

    def _cap_deadline(self) -> None:
        """Limits calls of other services, such as the users service for its keys, to `KEYS_SECONDS`."""
        call = current.get()
        deadline = min(call.deadline, time.monotonic() + KEYS_SECONDS)
        current.set(Context(call.actor, deadline, call.trace_id, call.request_id))


def _ready(found: Mapping[str, str], details: Mapping[str, Any]) -> Response:
    detail = {name: "down" if problem else "up" for name, problem in found.items()}
    body: dict[str, Any] = {"status": "ready", "services": detail, **details}
    headers: Mapping[str, str] = {}
    if reasons := {name: problem for name, problem in found.items() if problem}:
        body |= {"status": "not_ready", "reasons": reasons}
        headers = {"retry-after": "1"}
    return _json(body, 503 if reasons else 200, headers)


async def rendered_metrics(telemetry: Telemetry, request: Request) -> Response:
    """The metrics of `telemetry`, in the format that a request accepts."""
    text, content_type = await asyncio.to_thread(telemetry.exposition, request.headers.get("accept", ""))
    return Response(text, headers={"content-type": content_type, "cache-control": NO_STORE, "vary": "Accept"})


def is_of_this_machine(request: Request) -> bool:
    """Whether a program on this machine has sent a request, without a proxy, and names loopback in Host."""
    proxied = any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip", "via"))
    is_here = request.client is not None and ip_address(request.client.host).is_loopback
    return is_here and not proxied and _is_loopback(request.headers.get("host", "localhost"))


def _is_loopback(host: str) -> bool:
    """Whether a Host is a name of loopback, with any port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _openapi(routes: Sequence[Route], *, open_shop: bool) -> Callable[[], Mapping[str, Any]]:
    return lambda: openapi.document(routes, open_shop=open_shop, server_url=None)


class _Described:
    """A description of the API, rendered at the first request for it, so that the start is quick."""

    def __init__(self, document: Callable[[], Mapping[str, Any]]) -> None:
        self._document = document
        self._rendering = asyncio.Lock()
        self._answer: Callable[[Request], Awaitable[Response]] | None = None

    async def answer(self, request: Request) -> Response:
        async with self._rendering:
            if self._answer is None:
                self._answer = await asyncio.to_thread(self._render)  # other requests continue meanwhile
        return await self._answer(request)

    def _render(self) -> Callable[[Request], Awaitable[Response]]:
        body = msgspec.json.encode(self._document())
        return _prepared(docs.DocsPage("application/json", body, {"cache-control": "no-cache"}))


def _prepared(page: docs.DocsPage) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint whose answer never changes: rendered, and compressed, before the first request."""
    tag = representations.tag_of(page.body)
    kept = {**page.headers, "vary": "Accept-Encoding", "etag": tag}
    headers = {**kept, "content-type": page.content_type}
    plain = Response(page.body, headers=headers)
    packed = Response(gzip.compress(page.body, mtime=0), headers={**headers, "content-encoding": "gzip"})
    known = Response(status_code=304, headers=kept)

    async def answer(request: Request) -> Response:
        asked = RequestHeaders(request.scope["headers"])
        if representations.is_known(asked.if_none_match, tag):
            return known
        return packed if representations.takes_gzip(asked.accept_encoding) else plain

    return answer


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    given = {"cache-control": NO_STORE, **(headers or {})}
    return Response(msgspec.json.encode(value), status, media_type="application/json", headers=given)


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    status, lines, body = problems.render(error, current.get().trace_id)
    return Response(body, status, headers=dict(line.decode().split(": ", 1) for line in lines))


async def _bug(request: Request, _: Exception) -> Response:
    # The framework raises the error again after this answer, and the gateway logs it.
    return await _problem(request, Internal(operation=request.url.path))


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = tuple(sorted(["OPTIONS", *(error.headers or {}).get("Allow", "GET, HEAD").split(", ")]))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": ", ".join(allowed)})
        return await _problem(request, problems.MethodNotAllowed(path=request.url.path, allowed=allowed))
    return await _problem(request, problems.RouteNotFound(path=request.url.path))
