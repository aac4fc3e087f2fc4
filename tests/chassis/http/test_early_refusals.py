"""Requests that the server refuses by itself: in the order of their connection, without the application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest

from chassis.http.serving import BOUND_SECONDS, CHUNKED, GET, SHORT, Serving, on_both_loops, serve
from mercato.chassis.http import LoadLimits, Priority, Rendered, Shedder
from mercato.chassis.observability.telemetry import Telemetry

pytestmark = pytest.mark.slow

POST = b"POST /echo HTTP/1.1\r\nHost: shop\r\nContent-Length: 5\r\n\r\n"
REFUSED = (503, b"refused /echo")


class Refusing:
    """A shedder that has no place, and what refuses for it all paths but /hello and /wait."""

    def __init__(self, *, refusal_seconds: float = 0.0) -> None:
        limits = msgspec.structs.replace(
            LoadLimits.up_to(1), queue_share=1.0, sweep_seconds=3_600.0, refusal_seconds=refusal_seconds
        )
        self.load = Shedder(limits, monotonic=time.monotonic, telemetry=Telemetry())
        self.load.in_work = 1
        self.rendered = 0

    def refuse(
        self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], seconds: Callable[[], float]
    ) -> Callable[[], Rendered] | None:
        if path in ("/hello", "/wait") or not self.load.is_full(Priority.BROWSE):
            return None

        def render() -> Rendered:
            self.rendered += 1
            assert seconds() >= 0
            return 503, [b"retry-after: 1"], b"refused " + path.encode()

        return render

    def send(self) -> None:
        self.load.send_refusals(asyncio.get_running_loop())


@asynccontextmanager
async def full(*, refusal_seconds: float = 0.0, **limits: float) -> AsyncGenerator[tuple[Serving, Refusing]]:
    refusing = Refusing(refusal_seconds=refusal_seconds)
    waiting = asyncio.create_task(refusing.load.queue(Priority.BROWSE, "waits", time.monotonic() + 3_600))
    await asyncio.sleep(0)
    try:
        async with serve(refusing, **limits) as serving:
            yield serving, refusing
    finally:
        waiting.cancel()
        await asyncio.wait([waiting], timeout=BOUND_SECONDS)


@on_both_loops
async def test_refused_request_does_not_reach_the_application_and_its_connection_goes_on() -> None:
    async with full() as (serving, refusing):
        client = await serving.connect()
        for _ in range(3):
            status, headers, body = await client.ask(POST + b"12345")
            assert (status, body, headers["retry-after"]) == (*REFUSED, "1")
            assert "connection" not in headers
            assert "date" in headers
        assert (await client.ask(GET))[2] == b"/hello"
        assert serving.app.paths == ["/hello"]
        assert refusing.rendered == 3
        client.close()


@on_both_loops
async def test_answer_waits_for_its_turn_and_what_is_pipelined_behind_it_for_the_answer() -> None:
    async with full(refusal_seconds=3_600.0) as (serving, refusing):
        client = await serving.connect()
        await client.send(POST + b"12345" + GET + GET.replace(b"/hello", b"/hello/2"))
        await serving.until(lambda: bool(refusing.load._held))
        assert serving.app.paths == []
        assert refusing.rendered == 0
        refusing.send()
        answers = [(await client.read())[::2] for _ in range(3)]
        assert answers == [REFUSED, (200, b"/hello"), (200, b"/hello/2")]
        client.close()


@on_both_loops
async def test_request_behind_another_is_left_to_the_application() -> None:
    async with full() as (serving, refusing):
        client = await serving.connect()
        await client.send(GET.replace(b"/hello", b"/wait") + POST + b"12345")
        await serving.until(lambda: "/wait" in serving.app.paths)
        serving.app.release.set()
        assert [(await client.read())[2] for _ in range(2)] == [b"waited", b"12345"]
        assert refusing.rendered == 0
        client.close()


@on_both_loops
async def test_body_that_comes_slowly_is_dropped_and_the_answer_follows_it() -> None:
    async with full(body_bytes=1_000_000) as (serving, refusing):
        client = await serving.connect()
        await client.send(CHUNKED)
        for _ in range(4):
            await client.send(b"30d40\r\n" + b"x" * 200_000 + b"\r\n")
        assert refusing.rendered == 0
        assert not refusing.load._held
        await client.send(b"0\r\n\r\n")
        assert (await client.read())[::2] == REFUSED
        assert (await client.ask(GET))[2] == b"/hello"
        client.close()


@on_both_loops
async def test_body_that_is_too_large_or_never_comes_ends_the_connection() -> None:
    async with full(body_bytes=1_000, **SHORT) as (serving, refusing):
        large, late = await serving.connect(), await serving.connect()
        await large.send(CHUNKED + b"7d0\r\n" + b"x" * 2_000)
        await large.problem(413, "body_too_large")
        await late.send(POST + b"123")
        await late.problem(408, "request_timeout")
        assert refusing.rendered == 0
        assert serving.app.paths == []


@on_both_loops
async def test_invitation_to_send_a_body_is_left_to_the_application() -> None:
    async with full() as (serving, refusing):
        client = await serving.connect()
        await client.send(POST.replace(b"Host", b"Expect: 100-continue\r\nHost"))
        assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        await client.send(b"12345")
        assert (await client.read())[2] == b"12345"
        assert refusing.rendered == 0
        client.close()


@on_both_loops
async def test_client_that_left_or_asked_for_the_end_of_its_connection() -> None:
    async with full(refusal_seconds=3_600.0) as (serving, refusing):
        gone, last, head = [await serving.connect() for _ in range(3)]
        await gone.send(POST + b"12345")
        await serving.until(lambda: len(refusing.load._held) == 1)
        gone.abort()
        await serving.until(lambda: serving.server.open_connections == 2)
        await last.send(POST.replace(b"Host", b"Connection: close\r\nHost") + b"12345")
        await head.send(b"HEAD /echo HTTP/1.1\r\nHost: shop\r\n\r\n")
        await serving.until(lambda: len(refusing.load._held) == 3)
        refusing.send()
        status, headers, body = await last.read()
        assert (status, body, headers["connection"]) == (*REFUSED, "close")
        assert await last.rest() == b""
        assert b"content-length: 13\r\n\r\n" in await head.reader.readuntil(b"\r\n\r\n")
        assert (await head.ask(GET))[2] == b"/hello"  # and no body stood before it
        assert refusing.rendered == 2
        for client in (last, head):
            client.close()


@on_both_loops
async def test_drain_waits_for_the_answer() -> None:
    async with full(refusal_seconds=3_600.0, drain_seconds=60.0) as (serving, refusing):
        client = await serving.connect()
        await client.send(POST + b"12345")
        await serving.until(lambda: bool(refusing.load._held))
        serving.stop.set()
        await serving.until(lambda: serving.server._table.draining)
        refusing.send()
        status, _, _ = await client.read()
        assert status == 503
        assert await client.rest() == b""
        client.close()


@on_both_loops
async def test_server_with_room_leaves_all_requests_to_the_application() -> None:
    async with full() as (serving, refusing):
        refusing.load.in_work = 0
        client = await serving.connect()
        assert (await client.ask(POST + b"12345"))[2] == b"12345"
        assert refusing.rendered == 0
        client.close()
