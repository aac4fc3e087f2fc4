"""One run: both shops started, every load of the plan sent, everything checked, and the figures of all of it."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from bench.throughput import figures, plan, readings, shops
from bench.throughput.figures import CommitLatency, Cost, Cpu, FixedRate, Flooded, Loaded, Observed, Raw, Reading, Rows
from bench.throughput.flood import SIGNED_IN, WRONG, flooded
from bench.throughput.load import LONGEST_SECONDS, Plan, load
from bench.throughput.plan import MOST_CONNECTIONS, Case, Length, Step
from bench.throughput.report import Progress
from bench.throughput.shops import Mercato, Shop, ShopFailed
from bench.throughput.sink import collecting
from bench.throughput.toolchain import Built
from mercato.embedded_postgres import EmbeddedPostgres

PARTS: Final = ("rounds", "cost", "sign-ins", "commit-latency", "observed")
COMMIT_MS: Final = 5.0
COMMIT_WORKERS: Final = (1, 4)
COMMIT_CONNECTIONS: Final = (1, MOST_CONNECTIONS)
OBSERVED_CASES: Final[tuple[Case, ...]] = ("place", "pay")
OBSERVED_CONNECTIONS: Final = (1, MOST_CONNECTIONS)
ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
UNOBSERVED: Final = {"MERCATO_TRACING": "off", "MERCATO_LOG_LEVEL": "error"}
WARM_CONNECTIONS: Final = 8
COUNTED: Final[dict[str, Step]] = {
    "reference": Step("reference", "place", MOST_CONNECTIONS),
    "placed": Step("mercato", "place", MOST_CONNECTIONS),
    "paid": Step("mercato", "pay", MOST_CONNECTIONS),
}


class Wanted(msgspec.Struct, frozen=True):
    """What a run measures."""

    length: Length
    parts: tuple[str, ...]
    workers: int


class Measured(msgspec.Struct, frozen=True):
    """What a run has measured."""

    cpu_us: dict[str, Cpu]
    rows: dict[str, Rows]
    raw: Raw
    postgres: str


class Outcome(msgspec.Struct, frozen=True):
    """A load that is done: all that its orders asked for has been done, and there are as many as were answered."""

    loaded: Loaded
    rate: float
    """Answers a second until all of it was done."""


class Run:
    """One run. `measure` does all of it."""

    def __init__(self, wanted: Wanted, folder: Path, built: Built, progress: Progress) -> None:
        self._wanted = wanted
        self._length = wanted.length
        self._folder = folder
        self._built = built
        self._progress = progress
        self._loads = 0
        self._orders = 0

    async def measure(self) -> Measured:
        """Raises `LoadFailed` or `ShopFailed` where anything is not as it must be."""
        self._progress.line("starting both shops")
        async with contextlib.AsyncExitStack() as stack:
            server = await stack.enter_async_context(shops.server_in(self._folder / "mercato"))
            async with self._shops(stack, server) as running:
                await self._warm(running)
                rounds = await self._rounds(running) if "rounds" in self._wanted.parts else []
                fixed = await self._fixed_rates(running, rounds) if rounds else []
                costs, rows = await self._costs(running) if "cost" in self._wanted.parts else ({}, {})
                beside = await self._beside_sign_ins(running["mercato"]) if "sign-ins" in self._wanted.parts else []
            slow, lone_us = await self._slow_commits(server) if "commit-latency" in self._wanted.parts else ([], None)
            observed = await self._observed(server) if "observed" in self._wanted.parts else []
            self._progress.line(f"auditing {self._orders} orders")
            audit = await shops.audited(server, self._orders)
            return Measured(
                cpu_us={name: figures.cpu(each) for name, each in costs.items()},
                rows=rows,
                raw=Raw(
                    readings=tuple(rounds),
                    ratios_by_connections=figures.ratios_by_connections(rounds),
                    p50_us_one_connection=figures.p50_us_one_connection(rounds),
                    fixed_rate=tuple(fixed),
                    commit_latency=tuple(slow),
                    lone_commit_us=lone_us,
                    costs={name: tuple(each) for name, each in costs.items()},
                    audit=audit,
                    flooded=tuple(beside),
                    observed=tuple(observed),
                ),
                postgres=server.version,
            )

    @contextlib.asynccontextmanager
    async def _shops(
        self, stack: contextlib.AsyncExitStack, server: EmbeddedPostgres
    ) -> AsyncGenerator[dict[str, Shop]]:
        """Both shops with the same products; without the reference where it could not be built."""
        async with shops.mercato(self._folder, server, workers=self._wanted.workers) as ours:
            await ours.fill()
            running: dict[str, Shop] = {"mercato": ours}
            if self._built.reference is None:
                self._progress.line(self._built.why)
                yield running
                return
            other = await stack.enter_async_context(shops.server_in(self._folder / "reference"))
            async with shops.reference(self._built.reference, other) as theirs:
                await theirs.fill(ours.products)
                yield {**running, "reference": theirs}

    async def _warm(self, running: dict[str, Shop]) -> None:
        """Prepares statements and caches, and takes the first touch of pages after a checkpoint out of the figures."""
        for shop in running.values():
            await shop.idle()
            await readings.checkpoint(shop.server.admin_dsn)
            cases: tuple[Case, ...] = ("place", "pay", "browse") if isinstance(shop, Mercato) else ("place", "browse")
            for case in cases:
                await self.load(shop, case, WARM_CONNECTIONS, seconds=self._length.warm_seconds)

    # ---------------------------------------------------------------------------------------------------------- rounds

    async def _rounds(self, running: dict[str, Shop]) -> list[Reading]:
        found: list[Reading] = []
        for number in range(self._length.rounds):
            for step in plan.steps_of_round(number):
                if (shop := running.get(step.subject)) is None:
                    continue
                done = await self.load(shop, step.case, step.connections, seconds=self._length.load_seconds)
                loaded = done.loaded
                found.append(
                    Reading(
                        round=number,
                        subject=step.subject,
                        case=step.case,
                        connections=step.connections,
                        answers=loaded.good,
                        answers_per_second=round(loaded.good / loaded.seconds, 1),
                        rate=round(done.rate, 1),
                        p50_us=round(loaded.latency_us.p50, 1),
                        p99_us=round(loaded.latency_us.p99, 1),
                        kinds_p50_us={kind: round(us.p50, 1) for kind, us in sorted(loaded.kinds_us.items())},
                        load_cpu_us=round(loaded.load_cpu_us, 1),
                    )
                )
                self._progress.line(
                    f"round {number + 1} of {self._length.rounds}  {step.subject:<9} {step.case:<11} "
                    f"{step.connections:>3} connections {done.rate:>7.0f}/s  p50 {loaded.latency_us.p50 / 1e3:.2f} ms"
                )
        return found

    async def _fixed_rates(self, running: dict[str, Shop], rounds: Sequence[Reading]) -> list[FixedRate]:
        """Each shop at half of what it has carried in the rounds: what a request takes while nothing is full."""
        found: list[FixedRate] = []
        for step in COUNTED.values():
            if (shop := running.get(step.subject)) is None:
                continue
            rate = figures.median_rate(rounds, step.subject, step.case, MOST_CONNECTIONS) / 2
            done = await self.load(shop, step.case, MOST_CONNECTIONS, seconds=2 * self._length.load_seconds, rate=rate)
            found.append(FixedRate(step.subject, step.case, round(rate, 1), done.loaded.latency_us))
            self._progress.line(
                f"at half of capacity  {step.subject:<9} {step.case:<11} {rate:>7.0f}/s  "
                f"p99 {done.loaded.latency_us.p99 / 1e3:.2f} ms"
            )
        return found

    # ----------------------------------------------------------------------------------------------------------- costs

    async def _costs(self, running: dict[str, Shop]) -> tuple[dict[str, list[Cost]], dict[str, Rows]]:
        """What an order costs: CPU of every load, and rows, WAL and disk of the last one."""
        for shop in running.values():
            await shop.idle()
        costs: dict[str, list[Cost]] = {}
        rows: dict[str, Rows] = {}
        for number in range(self._length.counted_loads):
            for name, step in COUNTED.items():
                if (shop := running.get(step.subject)) is None:
                    continue
                await readings.vacuum(shop.server.admin_dsn, shop.prefix)
                await shop.idle()
                before = await shop.counted()
                cost = await self.counted_load(shop, step)
                costs.setdefault(name, []).append(cost)
                rows[name] = figures.rows(before, await shop.counted(), cost.orders)
                us, kilobytes = figures.cpu([cost]).total, rows[name].wal_bytes / 1e3
                self._progress.line(
                    f"cost {number + 1} of {self._length.counted_loads}  {name:<9} {us:>6.0f} us of CPU, "
                    f"{kilobytes:.1f} kB of WAL an order"
                )
        return costs, rows

    async def counted_load(self, shop: Shop, step: Step) -> Cost:
        """Sends a number of orders and waits until the shop is idle, without asking it anything meanwhile."""
        before, last = await shop.before(step.case), await shop.last_order()
        began = await shop.spending()
        loaded = await load(
            self._built.load,
            self._plan(shop, step.case, step.connections, LONGEST_SECONDS, count=self._length.counted_orders),
        )
        await shop.idle()
        ended = await shop.spending()
        await shop.finished(step.case, before, loaded.good)
        await self._check_orders(shop, last, loaded)
        return shop.cost(loaded.good, began, ended)

    # -------------------------------------------------------------------------------------------------------- sign-ins

    async def _beside_sign_ins(self, shop: Shop) -> list[Flooded]:
        """Mercato's catalogue, browsed alone and beside a flood of sign-ins. Every second round goes backwards."""
        found: list[Flooded] = []
        for number, connections in itertools.product(range(self._length.rounds), plan.FLOODED_CONNECTIONS):
            alone_us = beside_us = 0.0
            answers: Counter[int] = Counter()
            for is_flooded in (False, True) if number % 2 == 0 else (True, False):
                await shop.idle()
                if not is_flooded:
                    alone_us = await self._browsed(shop, connections)
                    continue
                async with flooded(shop.address) as flood:
                    beside_us = await self._browsed(shop, connections)
                    answers = Counter(flood.answers)
            hashed = answers[SIGNED_IN] + answers[WRONG]
            one = Flooded(number, connections, alone_us, beside_us, hashed, answers.total() - hashed)
            found.append(one)
            self._progress.line(
                f"browsing beside sign-ins, round {number + 1} of {self._length.rounds}  {connections:>3} connections "
                f"p50 {alone_us / 1e3:.2f} ms alone, {beside_us / 1e3:.2f} ms beside {hashed} sign-ins: {one.ratio:.2f}"
            )
        return found

    async def _browsed(self, shop: Shop, connections: int) -> float:
        """Median latency of browsing, microseconds."""
        done = await self.load(shop, "browse", connections, seconds=self._length.load_seconds)
        return round(done.loaded.latency_us.p50, 1)

    # --------------------------------------------------------------------------------------------------- slow commits

    async def _slow_commits(self, server: EmbeddedPostgres) -> tuple[list[CommitLatency], float]:
        """Mercato while each commit takes longer, by one process and by several. The reference is not asked."""
        found: list[CommitLatency] = []
        lone_us = 0.0
        for workers in COMMIT_WORKERS:
            async with shops.mercato(self._folder, server, workers=workers) as shop:
                await shop.find()
                await shop.idle()
                await self.load(shop, "pay", WARM_CONNECTIONS, seconds=self._length.warm_seconds)
                lone_us = await readings.delay_commits(server.admin_dsn, COMMIT_MS)
                if lone_us < COMMIT_MS * 1e3:
                    raise ShopFailed(f"a commit takes {lone_us:.0f} us although it was made {COMMIT_MS:g} ms slower")
                cases: tuple[Case, ...] = ("place", "pay")
                for case in cases:
                    for connections in COMMIT_CONNECTIONS:
                        done = await self.load(shop, case, connections, seconds=self._length.load_seconds)
                        found.append(
                            CommitLatency("mercato", case, workers, connections, COMMIT_MS, round(done.rate, 1))
                        )
                        self._progress.line(
                            f"{COMMIT_MS:g} ms a commit  {workers} workers  {case:<6} {connections:>3} connections "
                            f"{done.rate:>7.0f}/s"
                        )
                await readings.delay_commits(server.admin_dsn, 0)
        return found, round(lone_us, 1)

    # -------------------------------------------------------------------------------------------------------- observed

    async def _observed(self, server: EmbeddedPostgres) -> list[Observed]:
        """Mercato as it starts by default, with a collector for its spans, and without spans, metrics and logs."""
        found: list[Observed] = []
        with collecting() as url:
            for number in range(self._length.rounds):
                rates: dict[bool, dict[tuple[Case, int], float]] = {}
                for is_on in (True, False) if number % 2 == 0 else (False, True):
                    settings = {ENDPOINT: url} if is_on else UNOBSERVED
                    module = "mercato.cli" if is_on else "bench.throughput.unobserved"
                    async with shops.mercato(self._folder, server, settings=settings, module=module) as shop:
                        await shop.find()
                        await shop.idle()
                        await self.load(shop, "pay", WARM_CONNECTIONS, seconds=self._length.warm_seconds)
                        rates[is_on] = {
                            (case, connections): (
                                await self.load(shop, case, connections, seconds=self._length.load_seconds)
                            ).rate
                            for case in OBSERVED_CASES
                            for connections in OBSERVED_CONNECTIONS
                        }
                for (case, connections), on in rates[True].items():
                    off = rates[False][case, connections]
                    found.append(Observed(number, case, connections, round(on, 1), round(off, 1)))
                    self._progress.line(
                        f"observed, round {number + 1} of {self._length.rounds}  {case:<6} {connections:>3} connections"
                        f" {on:>7.0f}/s with traces, metrics and logs, {off:.0f}/s without: {found[-1].ratio:.2f}"
                    )
        return found

    # ----------------------------------------------------------------------------------------------------------- loads

    async def load(self, shop: Shop, case: Case, connections: int, *, seconds: float, rate: float = 0.0) -> Outcome:
        """Sends a load, waits until all of it is done and the shop is idle, and looks for its orders."""
        creates = case != "browse"
        before = await shop.before(case) if creates else 0
        last = await shop.last_order()
        loaded = await load(self._built.load, self._plan(shop, case, connections, seconds, rate=rate))
        if creates:
            await shop.finished(case, before, loaded.good)
        done_after = max(loaded.seconds, time.time() - loaded.began_at) if creates else loaded.seconds
        if creates:
            await self._check_orders(shop, last, loaded)
        if creates and isinstance(shop, Mercato):
            await shop.idle()  # the others have nothing left to do
        return Outcome(loaded, loaded.good / done_after)

    def _plan(
        self, shop: Shop, case: Case, connections: int, seconds: float, *, rate: float = 0.0, count: int = 0
    ) -> Plan:
        self._loads += 1
        return Plan(
            address=shop.address,
            connections=connections,
            seconds=seconds,
            requests=plan.requests(shop.subject, case, shop.products, shop.list_paths),
            rate=rate,
            count=count,
            seed=self._loads,
        )

    async def _check_orders(self, shop: Shop, last: int, loaded: Loaded) -> None:
        new = await shop.new_orders(last)
        if new != loaded.good:
            raise ShopFailed(f"{loaded.good} orders were answered by the {shop.subject}, and {new} are there")
        if isinstance(shop, Mercato):
            self._orders += new
