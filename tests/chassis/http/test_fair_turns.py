"""What one client does, and others must not feel: silence, floods, many connections, half-closed ones."""

from __future__ import annotations

import asyncio
import logging.handlers
import socket
from queue import SimpleQueue

import pytest

from chassis.http.serving import GET, SHORT, Client, Serving, on_both_loops, serve
from mercato.chassis.http import network_of

pytestmark = pytest.mark.slow

WAIT = GET.replace(b"/hello", b"/wait")


async def until_idle(serving: Serving, count: int) -> None:
    """Until a sweep has seen so many connections wait for another request than their first."""
    await serving.until(lambda: len(serving.server._table.idle) == count)


async def until_silent(serving: Serving, count: int) -> None:
    await serving.until(lambda: len(serving.server._table.silent) == count)


def end_half(client: Client) -> None:
    client.writer.write_eof()


# Silence, and room


@on_both_loops
async def test_connection_that_sends_nothing_is_closed_before_one_that_did() -> None:
    async with serve(first_byte_seconds=0.3, keep_alive_seconds=60.0) as serving:
        silent, used = await serving.connect(), await serving.connect()
        assert (await used.ask(GET))[0] == 200
        assert await silent.rest() == b""
        assert (await used.ask(GET))[0] == 200
        for client in (silent, used):
            client.close()


@on_both_loops
async def test_silent_connections_give_their_places_to_new_ones() -> None:
    async with serve(connections=4, first_byte_seconds=60.0) as serving:
        used = await serving.connect()
        assert (await used.ask(GET))[0] == 200
        silent: list[Client] = []
        for count in range(1, 4):
            silent.append(await serving.connect())
            await until_silent(serving, count)
        for place in range(3):
            assert await serving.is_usable()
            assert await silent[place].rest() == b""  # the longest silent one
            await serving.until(lambda: serving.server.open_connections == 3)
            silent.append(await serving.connect())
            await until_silent(serving, 3)
        assert (await used.ask(GET))[0] == 200  # it has sent something, and was not among them
        assert serving.refused == ["idle_closed_for_room"] * 3
        for client in (*silent, used):
            client.close()


@on_both_loops
async def test_connection_with_a_request_keeps_its_place() -> None:
    async with serve(connections=2) as serving:
        busy, idle = await serving.connect(), await serving.connect()
        for client in (busy, idle):
            assert (await client.ask(GET))[0] == 200
        await until_idle(serving, 2)
        await busy.send(WAIT)  # after the sweep that noted it as idle
        await serving.until(lambda: "/wait" in serving.app.paths)
        assert await serving.is_usable()
        assert await idle.rest() == b""
        serving.app.release.set()
        assert (await busy.read())[2] == b"waited"
        for client in (busy, idle):
            client.close()


@on_both_loops
async def test_one_address_does_not_take_all_places() -> None:
    async with serve(connections=10, connections_of_one=2) as serving:
        first, second = await serving.connect(), await serving.connect()
        assert (await first.ask(GET))[0] == (await second.ask(GET))[0] == 200
        third = await serving.connect()
        await third.send(GET)
        headers = await third.problem(503, "too_many_connections_of_one")
        assert headers["retry-after"] == "1"
        other = socket.create_connection(("127.0.0.1", serving.port), source_address=("127.0.0.2", 0))
        client = Client(*await asyncio.open_connection(sock=other))
        assert (await client.ask(GET))[0] == 200
        for each in (first, client):
            each.close()
        await serving.until(lambda: serving.server.open_connections == 1)
        assert await serving.is_usable()
        second.close()
        await serving.until(lambda: serving.server.open_connections == 0)
        assert not serving.server._table.by_network


# Turns


@on_both_loops
async def test_pipelined_requests_take_turns_between_connections() -> None:
    async with serve(pipelined_at_once=1) as serving:
        flood, other = await serving.connect(), await serving.connect()
        await flood.send(GET + WAIT + GET.replace(b"/hello", b"/hello/flood") * 3)
        await serving.until(lambda: "/wait" in serving.app.paths)  # it has the one turn
        await other.send(GET + GET.replace(b"/hello", b"/hello/other"))
        assert (await other.read())[2] == b"/hello"
        third = await serving.connect()
        assert (await third.ask(GET))[2] == b"/hello"  # that is behind no other needs no turn
        assert "/hello/other" not in serving.app.paths
        serving.app.release.set()
        assert (await other.read())[2] == b"/hello/other"
        assert [(await flood.read())[2] for _ in range(5)] == [b"/hello", b"waited", *[b"/hello/flood"] * 3]
        assert serving.app.paths.index("/hello/other") < serving.app.paths.index("/hello/flood")
        for client in (flood, other, third):
            client.close()


@pytest.mark.parametrize("ending", [b"", b"GARBAGE\r\n\r\n", GET.replace(b"/hello", b"/fail")])
@on_both_loops
async def test_turns_come_back_however_their_connections_end(ending: bytes) -> None:
    async with serve(pipelined_at_once=1) as serving:
        holds, waits, leaves = [await serving.connect() for _ in range(3)]
        await holds.send(GET + WAIT)
        await serving.until(lambda: "/wait" in serving.app.paths)
        await waits.send(GET + GET + ending)
        await leaves.send(GET + GET)
        assert (await waits.read())[0] == (await leaves.read())[0] == 200
        leaves.close()
        serving.app.release.set()
        assert [(await holds.read())[2] for _ in range(2)] == [b"/hello", b"waited"]
        assert (await waits.read())[2] == b"/hello"
        if ending:
            assert (await waits.read())[0] in (400, 500)
            assert await waits.rest() == b""
        for client in (holds, waits):
            client.close()
        await serving.until(lambda: serving.server.open_connections == 0)
        assert serving.server._table.turns._free == 1


@on_both_loops
async def test_too_large_body_that_waits_for_its_turn_is_refused_at_once() -> None:
    async with serve(pipelined_at_once=1, body_bytes=10) as serving:
        holds, waits = await serving.connect(), await serving.connect()
        await holds.send(GET + WAIT)
        await serving.until(lambda: "/wait" in serving.app.paths)
        await waits.send(GET + b"POST /echo HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert (await waits.read())[2] == b"/hello"
        await waits.send(b"14\r\n" + b"x" * 20 + b"\r\n")
        await waits.problem(413, "body_too_large")
        assert "/echo" not in serving.app.paths
        serving.app.release.set()
        holds.close()
        await serving.until(lambda: serving.server.open_connections == 0)
        assert serving.server._table.turns._free == 1


# Half-closed connections


@on_both_loops
async def test_client_that_ends_its_half_gets_its_answers() -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(GET + WAIT)
        end_half(client)
        await serving.until(lambda: "/wait" in serving.app.paths)
        serving.app.release.set()
        assert (await client.read())[2] == b"/hello"
        assert (await client.read())[2] == b"waited"
        assert await client.rest() == b""
        client.close()


@on_both_loops
async def test_client_that_ends_its_half_in_the_middle_of_a_request_gets_a_problem() -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(GET + b"GET /hello HT")
        end_half(client)
        assert (await client.read())[2] == b"/hello"
        await client.problem(400, "malformed_request")


@on_both_loops
async def test_endless_answer_ends_with_the_half_of_its_client() -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(GET.replace(b"/hello", b"/stream"))
        await client.reader.readexactly(100)
        end_half(client)
        await serving.until(lambda: serving.server.open_connections == 0)
        client.close()


@on_both_loops
async def test_caller_that_hangs_up_is_not_waited_for_where_callers_are_processes() -> None:
    async with serve(answers_half_closed=False) as serving:
        client = await serving.connect()
        await client.send(WAIT)
        await serving.until(lambda: serving.app.paths == ["/wait"])
        end_half(client)
        await serving.until(lambda: serving.server.open_connections == 0)
        client.close()


# What the log says of it


@on_both_loops
async def test_what_clients_do_is_counted_and_leaves_no_record() -> None:
    handler = logging.handlers.QueueHandler(queue := SimpleQueue[logging.LogRecord]())
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        async with serve(**SHORT) as serving:
            leaves = await serving.connect()
            await leaves.send(GET.replace(b"/hello", b"/large"))
            await serving.until(lambda: "/large" in serving.app.paths)
            leaves.writer.transport.abort()
            deaf = await serving.connect()
            deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
            await deaf.send(GET.replace(b"/hello", b"/large"))
            await serving.until(lambda: "response_timeout" in serving.refused)
            flood = await serving.connect()
            await flood.send(GET.replace(b"/hello", b"/large") * 20)
            flood.writer.transport.abort()
            serving.app.release.set()
            await serving.until(lambda: serving.server.open_connections == 0)
            deaf.close()
    finally:
        logging.getLogger().removeHandler(handler)
    assert queue.empty(), queue.get().getMessage()


def test_addresses_of_one_network_are_one_place() -> None:
    assert network_of("2001:db8:1:2::1") == network_of("2001:db8:1:2:ffff::9") != network_of("2001:db8:1:3::1")
    assert network_of("::ffff:192.0.2.1") == network_of("192.0.2.1") != network_of("192.0.2.2")
    assert network_of("") == ""
