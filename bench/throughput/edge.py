"""What others feel while clients abuse the public edge: silent connections, slow ones, pipelined floods.

    make bench-edge [ARGS="--seconds 10"]

A few buyers look at products at a fixed pace, half of them over a connection of their own for each request, while the
clients of one kind do what they do, from addresses of loopback and in a process of their own. Each row has what the
buyers measured, from the time at which a request was due, and the CPU time of the abusing process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.throughput import shops  # noqa: E402
from bench.throughput.report import Progress  # noqa: E402

BUYERS: Final = 10
EACH_SECONDS: Final = 0.05
"""Between the requests of one buyer: 200 requests a second together."""
SILENT: Final = 5_000
SLOW: Final = 500
PIPELINING: Final = 300
PIPELINED: Final = 40
ADDRESSES: Final = 20
"""Of loopback, 127.0.1.1 and on, that the abusing clients come from."""
ANSWER_SECONDS: Final = 30.0
FEWEST: Final = 100
"""Percentiles are of so many requests at least."""
READ_BYTES: Final = 65_536


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-edge", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each kind of clients is at it")
    parser.add_argument("--kind", choices=tuple(KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        asyncio.run(_abuse(options.kind, options.address, options.seconds))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="mercato-bench-"))
    folder.chmod(0o755)  # under root, PostgreSQL runs under another account
    try:
        asyncio.run(_measure(folder, options.seconds))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


async def _measure(folder: Path, seconds: float) -> None:
    progress = Progress(silent=False)
    async with shops.server_in(folder / "mercato") as server, shops.mercato(folder, server) as shop:
        await _buy(shop.address, 2.0)
        for kind in ("nothing", *KINDS):
            progress.line(f"{kind} ...")
            async with _abusing(kind, shop.address, seconds + 4.0) as spent:
                await asyncio.sleep(2.0)  # until all are there
                took, failed = await _buy(shop.address, seconds)
            if len(took) < FEWEST:
                print(f"{kind:<44} {failed} of {len(took) + failed} failed")
                continue
            cuts = statistics.quantiles(took, n=100)
            figures = f"p50 {cuts[49] * 1e3:6.1f} ms  p99 {cuts[98] * 1e3:6.1f} ms  longest {max(took) * 1e3:6.1f} ms"
            print(f"{kind:<44} {figures}  failed {failed} of {len(took) + failed}  {spent()}")


# -------------------------------------------------------------------------------------------------------------- buyers


async def _buy(address: str, seconds: float) -> tuple[list[float], int]:
    """Seconds of each request that was answered with 200, and how many were not."""
    took: list[float] = []
    failed = 0

    async def buyer(number: int) -> None:
        nonlocal failed
        start = time.perf_counter() + number * EACH_SECONDS / BUYERS
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        for turn in range(int(seconds / EACH_SECONDS)):
            due = start + turn * EACH_SECONDS
            await asyncio.sleep(due - time.perf_counter())
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    connection = connection or await _connected(address)
                    is_answered = await _asked(address, *connection)
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                is_answered = False
            if is_answered:
                took.append(time.perf_counter() - due)
            else:
                failed += 1
            if connection is not None and (not is_answered or number % 2):
                connection[1].close()
                connection = None
        if connection is not None:
            connection[1].close()

    await asyncio.gather(*(buyer(number) for number in range(BUYERS)))
    return took, failed


def _request(address: str) -> bytes:
    return f"GET /products/100 HTTP/1.1\r\nHost: {address}\r\n\r\n".encode()


async def _asked(address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    writer.write(_request(address))
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(int(length.split(b":")[1]))
    return head.startswith(b"HTTP/1.1 200 ")


async def _connected(address: str, source: str | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port), local_addr=(source, 0) if source else None)


# ----------------------------------------------------------------------------------------------------- abusing clients


async def _silent(address: str, source: str) -> None:
    """Connects, sends nothing, and comes back when it is closed."""
    reader, writer = await _connected(address, source)
    try:
        while await reader.read(READ_BYTES):
            pass
    finally:
        writer.close()


async def _slow(address: str, source: str) -> None:
    """Sends a byte of a request every half second."""
    reader, writer = await _connected(address, source)
    try:
        for byte in itertools.cycle(_request(address)[:-4]):
            writer.write(bytes([byte]))
            await asyncio.sleep(0.5)
            if reader.at_eof() or writer.is_closing():
                return
    finally:
        writer.close()


async def _pipelined(address: str, source: str) -> None:
    """Sends many requests at once, reads all answers, and does it again."""
    reader, writer = await _connected(address, source)
    try:
        while True:
            writer.write(_request(address) * PIPELINED)
            answers = 0
            while answers < PIPELINED:
                data = await reader.read(READ_BYTES)
                if not data:
                    return
                answers += data.count(b"HTTP/1.1 ")
    finally:
        writer.close()


KINDS: Final[Mapping[str, tuple[int, Callable[[str, str], Awaitable[None]]]]] = {
    f"{SILENT} silent connections": (SILENT, _silent),
    f"{SLOW} slow requests": (SLOW, _slow),
    f"{PIPELINING} connections of {PIPELINED} pipelined requests": (PIPELINING, _pipelined),
}


@contextlib.asynccontextmanager
async def _abusing(kind: str, address: str, seconds: float) -> AsyncGenerator[Callable[[], str]]:
    """Runs clients of a kind in a process of their own; gives what says, after the block, how much CPU it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if kind not in KINDS:
        yield lambda: ""
        return
    program = (sys.executable, __file__, "--kind", kind, "--address", address, "--seconds", str(seconds))
    process = await asyncio.create_subprocess_exec(*program)

    def spent() -> str:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return f"clients' CPU {cpu / seconds:.0%} of a core"

    try:
        yield spent
    finally:
        await process.wait()


async def _abuse(kind: str, address: str, seconds: float) -> None:
    count, client = KINDS[kind]

    async def again(source: str) -> None:
        while True:
            with contextlib.suppress(OSError):
                await client(address, source)
            await asyncio.sleep(0.1)

    clients = [asyncio.create_task(again(f"127.0.1.{number % ADDRESSES + 1}")) for number in range(count)]
    await asyncio.sleep(seconds)
    for task in clients:
        task.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


if __name__ == "__main__":
    sys.exit(main())
