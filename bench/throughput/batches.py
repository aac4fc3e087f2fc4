"""What a batch between two processes costs over gRPC, HTTP and NATS: CPU and latency.

    make bench-batches [ARGS="--rounds 5 --batches 3000 --json"]

One process serves `products.get` from memory; this one sends it batches of 1, 16 and 256 requests. The transports take
turns, in one run, so that a busy machine is busy for all of them. CPU is that of both processes, and of the NATS server
where there is one; it is counted with eight batches in flight. The latency is that of batches one after the other.
A ratio is the median over the rounds of a figure divided by that of HTTP in the same round. It writes no file.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Final, Literal, cast

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402
import uvloop  # noqa: E402

from bench.throughput.readings import spent_by  # noqa: E402
from mercato import __version__, topology  # noqa: E402
from mercato.chassis.contract import Actor, Batch, Context, ServiceError  # noqa: E402
from mercato.chassis.http import bind  # noqa: E402
from mercato.chassis.observability.clock import SystemClock  # noqa: E402
from mercato.chassis.observability.telemetry import Telemetry  # noqa: E402
from mercato.chassis.rpc.discovery import Instance  # noqa: E402
from mercato.chassis.rpc.discovery.static import StaticRegistry  # noqa: E402
from mercato.chassis.rpc.server import Server  # noqa: E402
from mercato.chassis.rpc.signatures import public_key  # noqa: E402
from mercato.chassis.rpc.stats import Stats  # noqa: E402
from mercato.chassis.rpc.transports import Remote  # noqa: E402
from mercato.chassis.rpc.transports.nats import Permissions  # noqa: E402
from mercato.chassis.rpc.trust import TokenSigner, Trust  # noqa: E402
from mercato.contracts.products import GetProduct, Product, Products  # noqa: E402
from mercato.contracts.roles import STAFF  # noqa: E402
from mercato.embedded_nats import EmbeddedNats, NatsUser  # noqa: E402
from mercato.testing.builders import product  # noqa: E402

Way = Literal["grpc", "http", "nats"]
WAYS: Final[tuple[Way, ...]] = ("grpc", "http", "nats")
SIZES: Final = (1, 16, 256)
IN_FLIGHT: Final = 8
CALLER, CALLED = topology.OPERATOR, "products"
HOST: Final = "127.0.0.1"
SEEDS: Final = {CALLER: b"1" * 32, CALLED: b"2" * 32}
"""Keys of this program: it is no shop."""
PASSWORD: Final = "of-this-program"
CALL_SECONDS: Final = 60.0
WARM_BATCHES: Final = 200


class Figure(msgspec.Struct, frozen=True):
    """Microseconds a batch."""

    cpu: float
    latency: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-batches", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=2_000, help="how many of one request; larger ones are fewer")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", nargs=2, metavar=("WAY", "URL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        uvloop.run(_serve(*options.serve))
        return 0
    found = uvloop.run(_measure(options.rounds, options.batches))
    if options.json:
        rows = [{"way": way, "size": size, **_row(found, way, size)} for way, size in itertools.product(WAYS, SIZES)]
        print(json.dumps(rows))
        return 0
    for size, way in itertools.product(SIZES, WAYS):
        row = _row(found, way, size)
        print(
            f"{size:>4} requests  {way:<5} {row['cpu']:>7.0f} us of CPU ({row['cpu_ratio']:.2f} of HTTP)   "
            f"{row['latency']:>7.0f} us ({row['latency_ratio']:.2f})"
        )
    return 0


Found = dict[tuple[Way, int], list[Figure]]


def _row(found: Found, way: Way, size: int) -> dict[str, float]:
    own, http = found[way, size], found["http", size]
    return {
        "cpu": statistics.median(figure.cpu for figure in own),
        "latency": statistics.median(figure.latency for figure in own),
        "cpu_ratio": statistics.median(a.cpu / b.cpu for a, b in zip(own, http, strict=True)),
        "latency_ratio": statistics.median(a.latency / b.latency for a, b in zip(own, http, strict=True)),
    }


async def _measure(rounds: int, batches: int) -> Found:
    found: Found = {}
    async with contextlib.AsyncExitStack() as stack:
        calling = {way: await stack.enter_async_context(_calling(way)) for way in WAYS}
        for number in range(rounds):
            for size in SIZES:
                for way in WAYS if number % 2 == 0 else reversed(WAYS):
                    remote, pids = calling[way]
                    count = max(50, batches // (1 + size // 16))
                    found.setdefault((way, size), []).append(await _figure(remote, pids, size, count))
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return found


async def _figure(remote: Remote, pids: Sequence[int], size: int, count: int) -> Figure:
    send = _sender(remote, size)
    for _ in range(WARM_BATCHES if size == 1 else 20):
        await send()
    before = _spent(pids)

    async def some() -> None:
        for _ in range(count // IN_FLIGHT):
            await send()

    await asyncio.gather(*(some() for _ in range(IN_FLIGHT)))
    cpu = (_spent(pids) - before) / (count // IN_FLIGHT * IN_FLIGHT)
    took: list[float] = []
    for _ in range(count // 2):
        began = time.perf_counter()
        await send()
        took.append(time.perf_counter() - began)
    return Figure(cpu * 1e6, statistics.median(took) * 1e6)


def _spent(pids: Sequence[int]) -> float:
    """Seconds of CPU of this process and the others."""
    return sum(spent_by([os.getpid(), *pids], str).ns.values()) / 1e9


def _sender(remote: Remote, size: int) -> Callable[[], Awaitable[None]]:
    transport, clock, actor = remote.transport(CALLER), SystemClock(), Actor(STAFF, 1)
    requests = [GetProduct(id=n + 1) for n in range(size)]

    async def send() -> None:
        deadline = clock.monotonic() + CALL_SECONDS
        contexts = [Context(actor, deadline, f"{n:032x}", f"{n:016x}") for n in range(size)]
        outcomes = await transport.send(Products.get, requests, contexts)
        if len(outcomes) != size or any(isinstance(outcome, ServiceError) for outcome in outcomes):
            raise RuntimeError(f"a batch failed: {outcomes[0]!r}")

    return send


# ------------------------------------------------------------------------------------------------------- two processes


@contextlib.asynccontextmanager
async def _calling(way: Way) -> AsyncGenerator[tuple[Remote, Sequence[int]]]:
    """A connection to a process that serves, and the pids of what carries batches besides this process."""
    async with contextlib.AsyncExitStack() as stack:
        url, pids = "-", list[int]()
        if way == "nats":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mercato-bench-")))
            users = [NatsUser(name, PASSWORD, a.publish, a.subscribe) for name, a in _permissions().items()]
            broker = await EmbeddedNats.start(folder, users=users)
            stack.push_async_callback(broker.stop)
            url = broker.url
            pids.append(broker.pid)
        serving = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.throughput.batches", "--serve", way, url,
            cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        stack.push_async_callback(_end, serving)
        assert serving.stdout is not None
        address = (await serving.stdout.readline()).decode().strip()
        remote = _remote(way, url, CALLER, address, serves=False)
        await remote.open()
        stack.push_async_callback(remote.close)
        yield remote, [*pids, serving.pid]


async def _end(serving: asyncio.subprocess.Process) -> None:
    assert serving.stdin is not None
    serving.stdin.close()
    await serving.wait()


async def _serve(way: str, url: str) -> None:
    """Serves until the standard input ends."""
    server = Server(Products, SystemClock())
    shown = {n: product(n) for n in range(1, max(SIZES) + 1)}

    async def get(batch: Batch[GetProduct]) -> Sequence[Product | ServiceError]:
        return [shown[request.id] for request in batch]

    server.register(Products.get, get)
    port = _free_port()
    remote = _remote(cast("Way", way), url, CALLED, f"{HOST}:{port}", serves=True)
    await remote.open()
    await remote.serve({Products.service: server})
    print(f"{HOST}:{port}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await remote.close()


def _remote(way: Way, url: str, name: str, address: str, *, serves: bool) -> Remote:
    clock, telemetry = SystemClock(), Telemetry()
    keys = {caller: public_key(seed) for caller, seed in SEEDS.items()}

    def trust_of(services: Collection[str]) -> Trust:
        return Trust(list(services), keys, topology.grants(), clock, telemetry)

    signers = {name: TokenSigner(name, SEEDS[name], clock)}
    stats = Stats(name, __version__)
    registry = StaticRegistry({Products.service: [Instance(Products.service, address, "1")]})
    host, _, port = address.rpartition(":")
    match way:
        case "nats":
            from mercato.chassis.rpc.transports.nats import NatsConnection, NatsRemote

            connection = NatsConnection(url, name, PASSWORD, name)
            return NatsRemote({name: connection}, signers, trust_of, clock, stats, metadata={})
        case "http":
            from mercato.chassis.rpc.transports.http.remote import HttpRemote

            listener = bind(host, int(port)) if serves else None
            return HttpRemote(registry, signers, trust_of, clock, stats, listener=listener)
        case "grpc":
            from mercato.chassis.rpc.transports.grpc.remote import GrpcRemote

            listen_at = (host, int(port)) if serves else None
            return GrpcRemote(registry, signers, trust_of, clock, stats, listen_at=listen_at)


def _permissions() -> dict[str, Permissions]:
    return {name: topology.nats_permissions(name) for name in (CALLER, CALLED)}


def _free_port() -> int:
    """One that was free a moment ago: gRPC takes no socket that is bound."""
    with contextlib.closing(bind(HOST, 0)) as probe:
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
