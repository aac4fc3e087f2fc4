"""A server and clients of raw bytes, for the tests of this folder: no client library would send what they send."""

import asyncio
import contextlib
import contextvars
import inspect
import socket
import struct
import urllib.parse
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import uvloop

from mercato.chassis.http import COMPLETE_RESPONSE, LONG_RESPONSE, EarlyRefusals, HttpLimits, HttpServer, bind
from mercato.chassis.http.connection_table import RefusalHeaders
from mercato.testing.waiting import BOUND_SECONDS

GET = b"GET /hello HTTP/1.1\r\nHost: shop\r\n\r\n"
CHUNKED = b"POST /echo HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\n\r\n"
SHORT = {"request_seconds": 0.3, "response_grace_seconds": 0.2}


class Variant(msgspec.Struct, frozen=True):
    """A loop, and whether the application answers in one message or in the two of plain ASGI."""

    new_loop: Callable[[], asyncio.AbstractEventLoop]
    in_one_message: bool = False


VARIANTS = {
    "uvloop": Variant(uvloop.new_event_loop),
    "asyncio": Variant(asyncio.new_event_loop),
    "uvloop-one-message": Variant(uvloop.new_event_loop, in_one_message=True),
}
answers_in_one_message = contextvars.ContextVar("answers_in_one_message", default=False)


def on_both_loops(scenario: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a scenario on uvloop, which serves in production, and on asyncio: transports differ in their corners.

    On uvloop it runs again with an application that answers in one message, as the gateway does.
    """

    def run(variant: Variant, **arguments: Any) -> None:
        async def in_variant() -> None:
            answers_in_one_message.set(variant.in_one_message)
            await scenario(**arguments)

        with asyncio.Runner(loop_factory=variant.new_loop) as runner:
            runner.run(in_variant())

    variant, *_ = inspect.signature(run).parameters.values()
    signature = inspect.Signature([variant, *inspect.signature(scenario).parameters.values()])
    run.__name__, run.__doc__, run.__module__ = scenario.__name__, scenario.__doc__, scenario.__module__
    vars(run)["__signature__"] = signature
    return pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)(run)


class App:
    """Answers by path, and remembers what it was given."""

    def __init__(self) -> None:
        self.in_one_message = answers_in_one_message.get()
        self.paths: list[str] = []
        self.body_bytes_seen = 0
        self.disconnects = 0
        self.interruptions = 0
        self.cancelled = 0
        self.failures: list[Exception] = []
        self.headers: list[tuple[bytes, bytes]] = []
        self.entered = asyncio.Event()
        self.release = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        self.entered.set()
        try:
            await getattr(self, scope["path"].strip("/").split("/")[0])(scope, receive, send)
        except Exception as error:
            self.failures.append(error)
            raise

    async def answer(self, send: Any, body: bytes) -> None:
        if self.in_one_message:
            await send({"type": COMPLETE_RESPONSE, "status": 200, "lines": [b"x-answer: whole"], "body": body})
            return
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def hello(self, scope: Any, receive: Any, send: Any) -> None:
        await self.answer(send, scope["path"].encode())

    async def echo(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnects += 1
                return
            body += message["body"]
            self.body_bytes_seen = max(self.body_bytes_seen, len(body))
            if not message["more_body"]:
                break
        self.headers = list(scope["headers"])
        await self.answer(send, body)

    async def wait(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        await self.answer(send, b"waited")

    async def long(self, scope: Any, receive: Any, send: Any) -> None:
        """Waits by intention: until it is released, or interrupted, for as many seconds as the query string says."""
        assert LONG_RESPONSE in scope["extensions"]
        seconds, interrupted = float(scope["query_string"]), asyncio.Event()
        released = asyncio.ensure_future(self.release.wait())
        await send({"type": LONG_RESPONSE, "seconds": seconds, "interrupt": interrupted.set})
        stopped = asyncio.ensure_future(interrupted.wait())
        self.entered.set()
        await asyncio.wait((released, stopped), return_when=asyncio.FIRST_COMPLETED)
        self.interruptions += interrupted.is_set()
        for task in (released, stopped):
            task.cancel()
        await self.answer(send, b"interrupted" if interrupted.is_set() else b"released")

    async def wait_and_echo(self, scope: Any, receive: Any, send: Any) -> None:
        await self.release.wait()
        await self.echo(scope, receive, send)
        await self.answer(send, b"too late")

    async def early(self, scope: Any, receive: Any, send: Any) -> None:
        await self.answer(send, b"early")

    async def started(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
        await send({"type": "http.response.body", "body": b"half ", "more_body": True})
        await self.release.wait()

    async def large(self, scope: Any, receive: Any, send: Any) -> None:
        await self.answer(send, b"x" * 32_000_000)

    async def whole(self, scope: Any, receive: Any, send: Any) -> None:
        """An answer in one message, whatever the variant; its status and its header are in the query string."""
        assert COMPLETE_RESPONSE in scope["extensions"]
        status, _, value = scope["query_string"].partition(b"&")
        line = b"x-answer: " + urllib.parse.unquote_to_bytes(value)
        await send({"type": COMPLETE_RESPONSE, "status": int(status), "lines": [line], "body": b"whole"})

    async def twice(self, scope: Any, receive: Any, send: Any) -> None:
        await self.whole(scope, receive, send)
        await self.whole(scope, receive, send)

    async def stream(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
            await asyncio.sleep(0)

    async def fail(self, scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    async def silent(self, scope: Any, receive: Any, send: Any) -> None:
        return


@dataclass
class Serving:
    app: App
    server: HttpServer
    port: int
    stop: asyncio.Event
    running: asyncio.Task[None]
    refused: list[str] = field(default_factory=list)

    async def connect(self) -> "Client":
        async with asyncio.timeout(BOUND_SECONDS):
            return Client(*await asyncio.open_connection("127.0.0.1", self.port))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(BOUND_SECONDS):
            while not condition():  # what is waited for raises no event
                await asyncio.sleep(0.01)

    async def is_usable(self) -> bool:
        client = await self.connect()
        status, _, body = await client.ask(GET)
        client.close()
        return (status, body) == (200, b"/hello")


class Client:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(BOUND_SECONDS):
            self.writer.write(data)
            await self.writer.drain()

    async def read(self) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(BOUND_SECONDS):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:-1])}
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return int(lines[0].split()[1]), headers, body

    async def ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        await self.send(data)
        return await self.read()

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        async with asyncio.timeout(BOUND_SECONDS):
            return await self.reader.read()

    async def problem(self, status: int, code: str) -> dict[str, str]:
        """Reads the refusal, checks its form and that the server ends the connection after it; gives its headers."""
        got, headers, body = await self.read()
        problem = msgspec.json.decode(body)
        assert (got, problem["code"], problem["status"]) == (status, code, status)
        assert set(problem) == {"type", "title", "status", "code", "detail", "trace_id"}
        assert headers["content-type"] == "application/problem+json"
        assert headers["connection"] == "close"
        assert await self.rest() == b""
        self.close()
        return headers

    def close(self) -> None:
        self.writer.close()

    def abort(self) -> None:
        """Resets the connection; after `close` a server cannot tell whether the client still reads."""
        at_once = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def serve(
    early: EarlyRefusals | None = None, refusal_headers: RefusalHeaders | None = None, /, **limits: Any
) -> AsyncGenerator[Serving]:
    app, stop, ready, refused = App(), asyncio.Event(), asyncio.Event(), list[str]()
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    options = msgspec.convert({"drain_seconds": 0.2, **limits}, HttpLimits)
    server = HttpServer(
        app,
        limits=options,
        sockets=[sock],
        on_ready=ready.set,
        on_refused=refused.append,
        early=early,
        refusal_headers=refusal_headers,
    )
    running = asyncio.create_task(server.run_until(stop))
    try:
        async with asyncio.timeout(BOUND_SECONDS):
            await ready.wait()
        yield Serving(app, server, port, stop, running, refused)
    finally:
        app.release.set()
        stop.set()
        await asyncio.wait([running], timeout=BOUND_SECONDS)
        assert running.done()
        assert running.cancelled() or running.exception() is None
        assert server.open_connections == 0
