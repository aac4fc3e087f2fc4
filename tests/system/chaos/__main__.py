"""Runs a shop under mixed load, kills its processes at random, and audits what is left.

    make chaos SECONDS=60 [SEED=1] [ARGS="--json"]

Starts `mercato up --workers 2` on a fresh folder, or with ARGS="--split nats" each service as two processes. Clients
order, pay, cancel, return, get refunds, send things twice and give up waiting; meanwhile workers, the owner, the guard,
the postmaster and single processes of PostgreSQL are killed, connections are ended, workers are stopped and go on
later, when others have taken over their work. The bank fails one call in twenty. In the end the kills stop, the shop
comes to rest by itself (within a minute), and the audit asks every invariant, those of the clients' history among them.
Ends with 0 if all is well. When it is not, the folder is kept, with databases, logs and history.

The seed decides which faults are injected, after which pauses, and what the clients request; it does not decide the
outcome of a race.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import secrets
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from mercato.testing.command import clean_environment
from mercato.testing.process import remove

ROOT: Final = Path(__file__).parents[3]
# How a test finds and ends the processes of a shop is how it is done here.
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from system.chaos.buyers import Scenario, people, stock_up  # noqa: E402
from system.chaos.clients import Clients  # noqa: E402
from system.chaos.final_state import CONVERGENCE_SECONDS, FinalState, final_state  # noqa: E402
from system.chaos.schedule import schedule  # noqa: E402
from system.chaos.shop import ProcessReport, ShopUnderTest  # noqa: E402

DEMO_PASSWORD: Final = "demo-password"
CONCURRENT_SCENARIOS: Final = 48
STARTING_SECONDS: Final = 150.0
"""A start that PostgreSQL does not let succeed is given up after a minute; it is the next one that must."""
LOG: Final = "log.txt"
BAR: Final = 30
REDRAW_SECONDS: Final = 0.25


class Result(msgspec.Struct, frozen=True):
    """A run, as `--json` prints it."""

    ok: bool
    seed: int
    seconds: float
    orders: int
    paid: int
    requests: int
    statuses: dict[str, int]
    accepted_within_3_retries: float
    kills: int
    """SIGKILLs."""
    faults: dict[str, int]
    starts: int
    ready_seconds_median: float
    ready_seconds_longest: float
    convergence_seconds: float | None
    takeovers: int
    fenced: int
    lost: int
    doubled: int
    charged_twice: int
    oversold: int
    invariants: int
    violated: list[dict[str, Any]]
    under_way: dict[str, int]
    unexpected: list[str]
    """Answers that no client should see, and runs that ended without an injected fault."""
    errors_logged: dict[str, int]


class NotUpError(Exception):
    """The shop does not become ready, though nothing is done to it."""


def main() -> int:
    options = _options()
    # Settings of the shell that runs this must reach neither the shop nor the audit.
    for name in set(os.environ) - set(clean_environment()):
        del os.environ[name]
    folder = Path(tempfile.mkdtemp(prefix="mercato-chaos-"))
    display = _Display(options.json)
    display.line(
        f"seed {options.seed}   (the same schedule again: make chaos SECONDS={options.seconds} SEED={options.seed})"
    )
    keep = False
    try:
        result = asyncio.run(_interruptible(_campaign(options, folder, display)))
        keep = not result.ok
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
        return 130
    except NotUpError as error:
        keep = True
        print(f"\n{error}; what it wrote is in {folder / LOG}", file=sys.stderr)
        return 1
    finally:
        if not keep:
            remove(folder / "data")
            shutil.rmtree(folder, ignore_errors=True)
    display.result(result, folder)
    return 0 if result.ok else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make chaos", description="Kill a shop under load, and audit what is left.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults are injected (60)")
    parser.add_argument("--seed", type=int, default=None, help="the schedule and the mix of another run")
    parser.add_argument(
        "--split", choices=("nats", "http", "grpc"), help="each service as processes of its own, two of each"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = secrets.randbelow(10**9)
    return options


async def _interruptible(work: Any) -> Any:
    """SIGTERM ends it as Ctrl-C does: with nothing left behind."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


async def _campaign(options: argparse.Namespace, folder: Path, display: _Display) -> Result:
    async with (
        ShopUnderTest(folder / "data", options.split) as shop,
        contextlib.aclosing(Clients(shop, DEMO_PASSWORD)) as clients,
    ):
        await _come_up(shop, folder)
        customers = people()
        for customer in customers:
            await clients.sign_in(customer)
        await stock_up(clients)

        began_at = time.monotonic()
        end = began_at + options.seconds
        running = _scenarios(clients, customers, options.seed, end)
        bar = asyncio.create_task(display.progress(options.seconds, lambda: _standing(clients, shop)))
        try:
            await _inject_faults(shop, options.seed, end)
            calm_at = time.monotonic()
            display.phase = "no more faults: coming to rest"
            await _finish(running, clients, calm_at)
            await _come_up(shop, folder)
            display.phase = "auditing"
            state = await final_state(shop.data, clients.history, max(calm_at, shop.up_at))
        finally:
            bar.cancel()
            for task in running:
                task.cancel()
            await asyncio.gather(bar, *running, return_exceptions=True)
        await shop.stop()
        result = _result(options, clients, shop.report(), state)
        if not result.ok:
            (folder / LOG).write_text(shop.log())
            (folder / "history.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, clients.history)))
            (folder / "result.json").write_bytes(msgspec.json.format(msgspec.json.encode(result)))
        return result


def _scenarios(clients: Clients, customers: list[Any], seed: int, end: float) -> list[asyncio.Task[None]]:
    numbers = itertools.count(1)

    async def run_scenarios() -> None:
        while time.monotonic() < end:
            await Scenario(clients, customers, seed, next(numbers)).run()

    return [asyncio.create_task(run_scenarios()) for _ in range(CONCURRENT_SCENARIOS)]


async def _inject_faults(shop: ShopUnderTest, seed: int, end: float) -> None:
    """Injects faults as the schedule says until the time is over."""
    for fault in schedule(seed, split=shop.is_split):
        left = end - time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, left)):
                if not fault.early:
                    await shop.up.wait()
                await asyncio.sleep(fault.gap_s)
                await shop.inject(fault)
        if time.monotonic() >= end:
            return


async def _come_up(shop: ShopUnderTest, folder: Path) -> None:
    """Waits until the shop takes requests. Raises `NotUpError`, and leaves the log."""
    try:
        async with asyncio.timeout(STARTING_SECONDS):
            await shop.up.wait()
    except TimeoutError:
        (folder / LOG).write_text(shop.log())
        raise NotUpError(f"the shop was not ready within {STARTING_SECONDS:.0f} s") from None


async def _finish(running: list[asyncio.Task[None]], clients: Clients, calm_at: float) -> None:
    """Lets the scenarios that run come to their end. Raises what has gone wrong in one of them."""
    end = calm_at + CONVERGENCE_SECONDS / 2
    await asyncio.wait(running, timeout=end - time.monotonic())
    clients.given_up.set()
    await asyncio.gather(*running)


def _result(options: argparse.Namespace, clients: Clients, report: ProcessReport, state: FinalState) -> Result:
    unexpected = [*clients.unexpected, *report.unexplained]
    tried = max(1, clients.retries.total())
    return Result(
        ok=not (state.findings or unexpected) and state.convergence_s is not None,
        seed=options.seed,
        seconds=options.seconds,
        orders=state.orders,
        paid=state.paid,
        requests=len(clients.history),
        statuses=dict(clients.statuses.most_common()),
        accepted_within_3_retries=round(sum(n for tries, n in clients.retries.items() if tries <= 3) / tried, 4),
        kills=sum(n for kind, n in report.faults.items() if kind not in ("pause", "terminate")),
        faults=report.faults,
        starts=report.starts,
        ready_seconds_median=round(statistics.median(report.ready_seconds), 1),
        ready_seconds_longest=round(max(report.ready_seconds), 1),
        convergence_seconds=state.convergence_s,
        takeovers=report.takeovers,
        fenced=report.fenced,
        **state.counts,
        invariants=state.invariants,
        violated=[msgspec.to_builtins(finding, enc_hook=str) for finding in state.findings],
        under_way=state.under_way,
        unexpected=unexpected[:50],
        errors_logged=report.errors_logged,
    )


def _standing(clients: Clients, shop: ShopUnderTest) -> str:
    faults = sum(shop.injected.values())
    return f"{len(clients.history):6d} requests  {faults:4d} faults  {'up' if shop.up.is_set() else 'down':4s}"


class _Display:
    """What a person sees: a bar on a terminal, a line now and then elsewhere, nothing but the result with --json."""

    def __init__(self, as_json: bool) -> None:
        self.phase = ""
        self._as_json = as_json
        self._draws = sys.stderr.isatty()

    def line(self, text: str) -> None:
        print(text, file=sys.stderr if self._as_json else sys.stdout, flush=True)

    async def progress(self, seconds: float, standing: Callable[[], str]) -> None:
        began_at = time.monotonic()
        while True:
            done = min(1.0, (time.monotonic() - began_at) / seconds) if seconds else 1.0
            text = f"[{'#' * int(done * BAR):{BAR}s}] {done:4.0%}  {standing()}  {self.phase}"
            if self._draws:
                print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
            elif not self._as_json:
                self.line(text)
            try:
                await asyncio.sleep(REDRAW_SECONDS if self._draws else 10)
            except asyncio.CancelledError:
                if self._draws:
                    print("\r\033[K", end="", file=sys.stderr, flush=True)
                raise

    def result(self, result: Result, folder: Path) -> None:
        if self._as_json:
            print(msgspec.json.encode(result).decode())
        else:
            for line in _lines(result):
                print(line)
        if not result.ok:
            self.line(f"kept: {folder} (databases in data, log.txt, history.jsonl, result.json)")


def _lines(result: Result) -> list[str]:
    faults = "  ".join(f"{kind} {n}" for kind, n in sorted(result.faults.items()))
    rest = "not within a minute" if result.convergence_seconds is None else f"after {result.convergence_seconds} s"
    lines = [
        f"orders          {result.orders} ({result.paid} paid), by {result.requests} requests",
        f"kills           {result.kills} (SIGKILL); faults: {faults}",
        f"starts          {result.starts}; ready after {result.ready_seconds_median} s (median), "
        f"{result.ready_seconds_longest} s (longest)",
        f"at rest         {rest}",
        f"takeovers       {result.takeovers}",
        f"fenced          {result.fenced}",
        f"lost            {result.lost}",
        f"doubled         {result.doubled}",
        f"charged twice   {result.charged_twice}",
        f"oversold        {result.oversold}",
        f"invariants      {result.invariants - len(result.violated)} of {result.invariants} hold",
    ]
    for finding in result.violated:
        lines.append(f"  {finding['name']}: {finding['title']}: {finding['violations']} times, such as")
        lines += [f"    {row}" for row in finding["rows"]]
    lines += [f"  under way: {what}: {n}" for what, n in result.under_way.items()]
    lines += [f"  unexpected: {text[:300]}" for text in result.unexpected[:10]]
    lines += [f"  logged {n} times: {text}" for text, n in result.errors_logged.items()]
    if result.ok:
        bound = 3 / max(1, result.orders)
        lines.append(f"0 failures in {result.orders} orders bounds the rate below {bound:.2%} at 95 %.")
    lines.append("all is well" if result.ok else "NOT WELL")
    return lines


if __name__ == "__main__":
    sys.exit(main())
