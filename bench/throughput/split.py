"""What it costs to run each service as a process of its own: rates against those of one process, and a hop.

    make bench-split [ARGS="--rounds 5 --seconds 3"]

The same shop on the same databases is started in turns in one process, split over NATS and split over HTTP, and gets
the same loads. A ratio is the median over the rounds of a rate divided by that of one process. A hop is a call that
follows another one: from a process of its own through the transport to a service and back, with a row read from the
database. What an order costs by process and database is counted in a load of its own, until nothing more happens to it.
Nothing is written to a file.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, Literal

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402

from bench.throughput import figures, plan, readings, shops  # noqa: E402
from bench.throughput.figures import Cost, Cpu  # noqa: E402
from bench.throughput.plan import MOST_CONNECTIONS, Case, Step  # noqa: E402
from bench.throughput.report import Progress  # noqa: E402
from bench.throughput.run import WARM_CONNECTIONS, Run, Wanted  # noqa: E402
from bench.throughput.toolchain import build  # noqa: E402
from mercato import topology  # noqa: E402
from mercato.chassis.contract import Actor, current  # noqa: E402
from mercato.chassis.observability.clock import SystemClock  # noqa: E402
from mercato.chassis.observability.telemetry import Telemetry  # noqa: E402
from mercato.chassis.rpc.client import Connector, acting  # noqa: E402
from mercato.cli.operator import operating  # noqa: E402
from mercato.contracts.products import GetProduct, Products  # noqa: E402
from mercato.contracts.roles import STAFF  # noqa: E402
from mercato.embedded_postgres import EmbeddedPostgres  # noqa: E402

WAYS: Final[tuple[Literal["nats", "http"] | None, ...]] = (None, "nats", "http")
CASES: Final[tuple[Case, ...]] = ("place", "pay")
HOPS: Final = 2_000
CALL_SECONDS: Final = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-split", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each load takes")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mercato-bench-"))
    folder.chmod(0o755)  # under root, PostgreSQL runs under another account
    try:
        asyncio.run(_measure(folder, options.rounds, options.seconds))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


async def _measure(folder: Path, rounds: int, seconds: float) -> None:
    progress = Progress(silent=False)
    progress.line("building the load generator")
    length = msgspec.structs.replace(plan.QUICK, load_seconds=seconds)
    run = Run(Wanted(length, (), 1), folder, await build(folder / "programs"), progress)
    rates: dict[tuple[str, Case], list[float]] = {}
    costs: dict[tuple[str, Case], list[Cost]] = {}
    hops: dict[str, list[float]] = {}
    async with shops.server_in(folder / "mercato") as server:
        for number in range(rounds):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                name = way or "together"
                for case, (rate, cost) in (await _loads(run, folder, server, way, hops, seconds)).items():
                    rates.setdefault((name, case), []).append(rate)
                    costs.setdefault((name, case), []).append(cost)
                    spent = f"{rate:>7.0f}/s {figures.cpu([cost]).total:>6.0f} us of CPU an order"
                    progress.line(f"round {number + 1} of {rounds}  {name:<9} {case:<6} {spent}")
        audit = await shops.audited(server, 0)
    for (name, case), found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, rates["together", case], strict=True))
        print(f"{name:<9} {case:<6} {statistics.median(found):>8.0f}/s   {ratio:.2f} of one process")
    for (name, case), each in costs.items():
        print(f"{name:<9} {case:<6} {_spelled(figures.cpu(each))}")
    for name, found in hops.items():
        print(f"a hop over {name:<5} {statistics.median(found):>6.0f} us (median of {HOPS} calls, one after the other)")
    print(f"audit: {audit.invariants} invariants, violated: {', '.join(audit.violated) or 'none'}")


async def _loads(
    run: Run,
    folder: Path,
    server: EmbeddedPostgres,
    way: Literal["nats", "http"] | None,
    hops: dict[str, list[float]],
    seconds: float,
) -> dict[Case, tuple[float, Cost]]:
    async with shops.mercato(folder, server, transport=way) as shop:
        await (shop.find() if (folder / "filled").exists() else shop.fill())
        (folder / "filled").touch()
        for case in CASES:
            await run.load(shop, case, WARM_CONNECTIONS, seconds=1.0)
        found: dict[Case, tuple[float, Cost]] = {}
        for case in CASES:
            rate = (await run.load(shop, case, MOST_CONNECTIONS, seconds=seconds)).rate
            await readings.vacuum(server.admin_dsn, shop.prefix)
            await shop.idle()
            found[case] = (rate, await run.counted_load(shop, Step("mercato", case, MOST_CONNECTIONS)))
        if way is not None:
            hops.setdefault(way, []).append(await _hop(folder / "data"))
        return found


def _spelled(cpu: Cpu) -> str:
    """Microseconds of CPU an order, the largest first."""
    parts = {**cpu.shop, **{f"database {name}": us for name, us in cpu.postgres.items()}}
    largest = sorted(parts.items(), key=lambda part: -part[1])
    return f"{cpu.total:.0f} us of CPU an order: " + ", ".join(f"{name} {us:.0f}" for name, us in largest if us >= 1)


async def _hop(data: Path) -> float:
    """Microseconds of one call."""
    clock = SystemClock()
    async with operating(data) as operator:
        connector = Connector(clock, Telemetry())
        products = connector.client(Products, operator.remote.transport(topology.OPERATOR))
        token = current.set(acting(Actor(STAFF), clock=clock, seconds=CALL_SECONDS))
        took: list[float] = []
        for _ in range(HOPS):
            began = time.perf_counter()
            await products.get(GetProduct(id=100))
            took.append(time.perf_counter() - began)
        current.reset(token)
        await connector.close()
    return statistics.median(took) * 1e6


if __name__ == "__main__":
    sys.exit(main())
