"""Clients that leave while the application works for them: reads are cancelled, writes go on to their end."""

from __future__ import annotations

import logging

import pytest

from chassis.http.serving import GET, on_both_loops, serve

pytestmark = pytest.mark.slow

WAIT = GET.replace(b"/hello", b"/wait")
WRITE = b"POST /wait HTTP/1.1\r\nHost: shop\r\nContent-Length: 0\r\n\r\n"


@on_both_loops
async def test_read_whose_client_has_left_is_cancelled_and_leaves_no_record(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serve() as serving:
        for request in (WAIT, WAIT.replace(b"GET", b"HEAD"), GET + WAIT):
            serving.app.entered.clear()
            before, waiting = serving.app.cancelled, serving.app.paths.count("/wait")
            client = await serving.connect()
            await client.send(request)
            await serving.until(lambda waiting=waiting: serving.app.paths.count("/wait") > waiting)
            client.abort()
            await serving.until(lambda before=before: serving.app.cancelled == before + 1)
        await serving.until(lambda: not serving.server._table.tasks)
        assert await serving.is_usable()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@on_both_loops
async def test_write_whose_client_has_left_goes_on_to_its_end() -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(WRITE)
        await serving.until(lambda: "/wait" in serving.app.paths)
        client.abort()
        await serving.until(lambda: serving.server.open_connections == 0)
        assert len(serving.server._table.tasks) == 1
        serving.app.release.set()
        await serving.until(lambda: not serving.server._table.tasks)
        assert serving.app.cancelled == 0


@on_both_loops
async def test_client_that_ends_its_half_has_not_left() -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(WAIT)
        await serving.until(lambda: "/wait" in serving.app.paths)
        client.writer.write_eof()
        await serving.until(lambda: all(each._half_closed for each in serving.server._table.admitted))
        serving.app.release.set()
        assert (await client.read())[2] == b"waited"
        assert serving.app.cancelled == 0
        client.close()
