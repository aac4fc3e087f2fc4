"""Answers that take longer than others by intention: `http.response.long`."""

import asyncio
import socket
import struct

import pytest

from chassis.http.serving import BOUND_SECONDS, GET, SHORT, on_both_loops, serve

pytestmark = pytest.mark.slow

LONG = GET.replace(b"GET /hello", b"POST /long?%d")  # a read whose connection is lost is cancelled


@on_both_loops
async def test_an_answer_that_takes_long_by_intention_is_not_cut_off() -> None:
    async with serve(**SHORT) as serving:
        long, hanging = await serving.connect(), await serving.connect()
        await long.send(LONG % 60)
        await serving.app.entered.wait()
        await hanging.send(GET.replace(b"/hello", b"/wait"))
        await serving.until(lambda: serving.refused == ["response_timeout"])
        assert await hanging.rest() == b""
        serving.app.release.set()
        assert (await long.read())[::2] == (200, b"released")
        assert (await long.ask(GET))[::2] == (200, b"/hello")
        assert serving.refused == ["response_timeout"]
        for client in (long, hanging):
            client.close()


@on_both_loops
async def test_a_request_behind_one_that_takes_long_does_not_shorten_its_time() -> None:
    async with serve(**SHORT) as serving:
        long, hanging = await serving.connect(), await serving.connect()
        await long.send(LONG % 60 + GET)
        await serving.app.entered.wait()
        await hanging.send(GET.replace(b"/hello", b"/wait"))
        await serving.until(lambda: serving.refused == ["response_timeout"])
        serving.app.release.set()
        assert [(await long.read())[2] for _ in range(2)] == [b"released", b"/hello"]
        for client in (long, hanging):
            client.close()


@on_both_loops
async def test_the_time_that_was_asked_for_is_the_longest() -> None:
    async with serve(**SHORT) as serving:
        client = await serving.connect()
        await client.send(LONG % 0)
        assert await client.rest() == b""
        assert serving.refused == ["response_timeout"]
        await serving.until(lambda: serving.app.interruptions == 1)
        client.close()


@on_both_loops
async def test_a_drain_interrupts_answers_that_take_long_and_sends_them() -> None:
    async with serve(drain_seconds=BOUND_SECONDS) as serving:
        client = await serving.connect()
        await client.send(LONG % 60)
        await serving.app.entered.wait()
        serving.stop.set()
        status, headers, body = await client.read()
        assert (status, headers["connection"], body) == (200, "close", b"interrupted")
        async with asyncio.timeout(BOUND_SECONDS):
            await serving.running
        client.close()


@on_both_loops
async def test_a_connection_that_is_lost_interrupts_its_own_answer_alone() -> None:
    async with serve() as serving:
        leaving, staying = await serving.connect(), await serving.connect()
        for client in (leaving, staying):
            await client.send(LONG % 60)
            await serving.app.entered.wait()
            serving.app.entered.clear()
        # With a reset: an ordinary end might be that of a client which has sent all that it wants to, and waits.
        leaving.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        leaving.writer.transport.abort()
        await serving.until(lambda: serving.app.interruptions == 1)
        serving.app.release.set()
        assert (await staying.read())[2] == b"released"
        staying.close()
