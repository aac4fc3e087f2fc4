"""What a shop answers of more requests than it can: goodput, latency, the time of refusals, recovery.

    make bench-overload [ARGS="--seconds 5 --json"]

Four requests of five browse, one places an order that is paid. Closed loops over 8 to 128 connections find the
capacity, which is the rate of the best, and the connections that saturate: the fewest with 95 % of it. Requests at a
fixed rate follow, over many connections and from many addresses: at 0.8 of the capacity, and at twice of it. Then come
closed loops that do not wait where they are refused, over five times the connections that saturate, and over as many as
a server has room for; and half of the capacity right after that. The latency of a request counts from the moment when
it was due. One load takes `--seconds`, a closed loop that searches for the capacity a fifth of it, and all of it at
most the time that late answers have on top. Nothing is written to a file.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import re
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402

from bench.throughput import plan, shops  # noqa: E402
from bench.throughput.figures import Loaded  # noqa: E402
from bench.throughput.load import LoadFailed, Plan, sent  # noqa: E402
from bench.throughput.plan import Request  # noqa: E402
from bench.throughput.report import Progress  # noqa: E402
from bench.throughput.shops import Mercato, ShopFailed  # noqa: E402
from bench.throughput.toolchain import Missing, build  # noqa: E402

WRONG: Final = 1
FAILED: Final = 2
SOURCES: Final = 20
"""One address has half of the connections of a server at most."""
SEARCHED: Final = (8, 16, 32, 64, 128)
"""The connections of the closed loops that find the capacity."""
SATURATED: Final = 0.95
OPEN_CONNECTIONS: Final = 512
"""Of a load at a fixed rate."""
MOST_CONNECTIONS: Final = 900
"""Of 1 024 that a server has."""
METRICS_SECONDS: Final = 30.0


class Step(msgspec.Struct, frozen=True):
    """One load: a multiple of the capacity, or a closed loop (None) over so many times the connections that saturate
    it."""

    name: str
    times_capacity: float | None
    times_connections: float = 0.0


STEPS: Final = (
    Step("0.8 of the capacity", 0.8),
    Step("twice the capacity", 2.0),
    Step("five times the connections", None, 5.0),
    Step("half of the capacity", 0.5),
    Step(f"{MOST_CONNECTIONS} connections", None, math.inf),
    Step("half of the capacity", 0.5),
)


class Figures(msgspec.Struct, frozen=True):
    """Of one load. Rates are answers a second, latencies milliseconds from the moment when a request was due."""

    name: str
    connections: int
    offered: float
    """Requests a second that were sent."""
    good: float
    good_of_capacity: float
    orders_good: float
    p99_ms: float
    refused: float
    refused_p99_ms: float
    failed: int
    """Answers that were neither good nor refusals."""
    why: tuple[str, ...]
    limit: float
    """Of requests in work, after it."""
    load_cpu: float
    """Of the load generator, in cores."""

    @classmethod
    def of(cls, name: str, connections: int, loaded: Loaded, capacity: float, limit: float) -> Figures:
        good = loaded.good / loaded.seconds
        return cls(
            name=name,
            connections=connections,
            offered=round(loaded.requests / loaded.seconds, 1),
            good=round(good, 1),
            good_of_capacity=round(good / (capacity or good), 3),
            orders_good=round(loaded.kinds_good.get("order", 0) / loaded.seconds, 1),
            p99_ms=round(loaded.latency_us.p99 / 1e3, 1),
            refused=round(loaded.refused / loaded.seconds, 1),
            refused_p99_ms=round(loaded.refused_us.p99 / 1e3, 1) if loaded.refused_us else 0.0,
            failed=loaded.requests - loaded.good - loaded.refused,
            why=loaded.failures,
            limit=limit,
            load_cpu=round(loaded.load_cpu_us * loaded.requests / loaded.seconds / 1e6, 2),
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each load takes")
    parser.add_argument("--workers", type=int, default=1, help="processes that serve requests (1)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and no progress")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mercato-bench-"))
    folder.chmod(0o755)  # under root, PostgreSQL runs under another account
    try:
        found = asyncio.run(_measure(folder, options))
    except (LoadFailed, ShopFailed) as error:
        print(f"make bench-overload: {error}", file=sys.stderr)
        return WRONG
    except Missing as error:
        print(f"make bench-overload: {error}", file=sys.stderr)
        return FAILED
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(msgspec.json.format(msgspec.json.encode(found), indent=1).decode() if options.json else table(found))
    return 0


async def _measure(folder: Path, options: argparse.Namespace) -> list[Figures]:
    progress = Progress(silent=options.json)
    progress.line("building the load generator")
    program = (await build(folder / "programs")).load
    async with (
        shops.server_in(folder / "mercato") as server,
        shops.mercato(folder, server, workers=options.workers) as shop,
    ):
        progress.line("filling the catalogue")
        await shop.fill()
        requests = mixed(shop)
        closed = Plan(shop.address, SEARCHED[-1], options.seconds, requests, refusals=True, sources=SOURCES)
        await sent(program, msgspec.structs.replace(closed, seconds=min(3.0, options.seconds)))
        progress.line("finding the capacity")
        searched = [
            await _loaded(
                program,
                shop,
                msgspec.structs.replace(closed, connections=connections, seconds=max(2.0, options.seconds / 5)),
                "closed loop",
                0.0,
            )
            for connections in SEARCHED
        ]
        capacity = max(one.good for one in searched)
        saturating = saturates(searched)
        found = [msgspec.structs.replace(one, good_of_capacity=round(one.good / capacity, 3)) for one in searched]
        for step in STEPS:
            progress.line(step.name)
            found.append(await _loaded(program, shop, plan_of(step, closed, capacity, saturating), step.name, capacity))
    return found


def saturates(searched: Sequence[Figures]) -> int:
    """The fewest connections with nearly the best rate."""
    best = max(one.good for one in searched)
    return min(one.connections for one in searched if one.good >= SATURATED * best)


def mixed(shop: Mercato) -> tuple[Request, ...]:
    """Four requests of five browse; the others place an order that is paid."""
    browse = plan.requests("mercato", "browse", shop.products, shop.list_paths)
    return (*browse, *plan.requests("mercato", "pay", shop.products, shop.list_paths)[: len(browse) // 4])


def plan_of(step: Step, closed: Plan, capacity: float, saturating: int) -> Plan:
    """The load of a step, by the requests a second that can be answered and the connections that reach them."""
    if step.times_capacity is not None:
        return msgspec.structs.replace(closed, connections=OPEN_CONNECTIONS, rate=step.times_capacity * capacity)
    return msgspec.structs.replace(closed, connections=int(min(saturating * step.times_connections, MOST_CONNECTIONS)))


async def _loaded(program: Path, shop: Mercato, load: Plan, name: str, capacity: float) -> Figures:
    loaded = await sent(program, load)
    if not loaded.good:
        raise LoadFailed(f"{name}: none of {loaded.requests} answers is good: {'; '.join(loaded.failures)}")
    limit = await asyncio.to_thread(_limit, shop.address)
    return Figures.of(name, load.connections, loaded, capacity, limit)


def _limit(address: str) -> float:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=METRICS_SECONDS) as answer:
        found = re.search(r"^mercato_http_limit ([0-9.e+]+)", answer.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def table(found: Sequence[Figures]) -> str:
    """The figures for people."""
    lines = [
        f"{'load':<28}{'connections':>12}{'offered/s':>10}{'good/s':>9}{'of it':>7}{'orders/s':>10}{'p99 ms':>9}"
        f"{'refused/s':>11}{'p99 ms':>9}{'failed':>8}{'limit':>7}{'load CPU':>10}"
    ]
    for one in found:
        lines.append(
            f"{one.name:<28}{one.connections:>12}{one.offered:>10.0f}{one.good:>9.0f}{one.good_of_capacity:>7.0%}{one.orders_good:>10.0f}"
            f"{one.p99_ms:>9.1f}{one.refused:>11.0f}{one.refused_p99_ms:>9.1f}{one.failed:>8}{one.limit:>7.0f}"
            f"{one.load_cpu:>10.2f}"
        )
        lines += [f"    {reason[:110]}" for reason in one.why]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
