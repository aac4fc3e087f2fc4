"""Measures Mercato and a reference in Go in turns, checks every answer, and writes `bench/results/latest.json`.

    make bench [QUICK=1] [ARGS="--json"]
    make bench ARGS="--only cost"          what an order costs: CPU, rows, WAL, disk
    make bench ARGS="--only rounds"        rates, latencies and ratios
    make bench ARGS="--only sign-ins"      browsing alone, and beside a flood of sign-ins
    make bench ARGS="--only commit-latency"
    make bench ARGS="--only observed"      the same shop with and without traces, metrics and logs

Both shops run on a PostgreSQL of their own, of the same kind, in a folder that is removed afterwards. Loads of a few
seconds alternate between them, and a ratio is the median over the rounds of one divided by the other. In the end the
audit is asked. Exit code 1: an answer was wrong, an order is missing, or the audit is violated; 2: it could not be
measured.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

import msgspec

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.throughput import figures, plan, readings, report  # noqa: E402
from bench.throughput.figures import Machine, Result  # noqa: E402
from bench.throughput.load import LoadFailed  # noqa: E402
from bench.throughput.report import Progress  # noqa: E402
from bench.throughput.run import PARTS, Run, Wanted  # noqa: E402
from bench.throughput.shops import ShopFailed  # noqa: E402
from bench.throughput.toolchain import Missing, build  # noqa: E402
from mercato.embedded_postgres import SupervisorError  # noqa: E402

LATEST: Final = ROOT / "bench" / "results" / "latest.json"
WRONG: Final = 1
FAILED: Final = 2
STOPPED: Final = 130


def main() -> int:
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="mercato-bench-"))
    folder.chmod(0o755)  # under root, PostgreSQL runs under another account
    try:
        result = asyncio.run(_interruptible(_bench(options, folder)))
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("\nmake bench: stopped before it was done", file=sys.stderr)
        return STOPPED
    except (LoadFailed, ShopFailed, readings.NotIdle) as error:
        print(f"make bench: {error}", file=sys.stderr)
        return WRONG
    except (Missing, SupervisorError) as error:
        print(f"make bench: {error}", file=sys.stderr)
        return FAILED
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not options.only:
        LATEST.parent.mkdir(exist_ok=True)
        LATEST.write_text(report.document(result))
    print(report.document(result) if options.json else "\n".join(report.table(result)))
    return WRONG if result.raw.audit.violated else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure Mercato and a reference in Go in turns.")
    parser.add_argument("--quick", action="store_true", help="shorter loads; commit-latency and observed are left out")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and no progress")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part alone, and write no file")
    parser.add_argument("--workers", type=int, default=1, help="processes of Mercato that serve requests (1)")
    parser.add_argument("--rounds", type=int, help="how often each load is repeated")
    parser.add_argument("--seconds", type=float, help="how long each load takes")
    return parser.parse_args()


def _wanted(options: argparse.Namespace) -> Wanted:
    length = plan.QUICK if options.quick else plan.FULL
    changed = msgspec.structs.replace(
        length, rounds=options.rounds or length.rounds, load_seconds=options.seconds or length.load_seconds
    )
    parts = tuple(part for part in PARTS if part not in length.leaves_out)
    return Wanted(changed, tuple(options.only or parts), options.workers)


async def _interruptible(work: Coroutine[Any, Any, Result]) -> Result:
    """SIGTERM ends it as Ctrl-C does: with nothing left behind."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


async def _bench(options: argparse.Namespace, folder: Path) -> Result:
    load_average, commit = os.getloadavg()[0], _commit()
    progress = Progress(silent=options.json)
    progress.line("building the load generator and the reference")
    built = await build(folder / "programs")
    measured = await Run(_wanted(options), folder, built, progress).measure()
    return Result(
        quick=options.quick,
        commit=commit,
        ratios=figures.ratios(measured.raw.readings),
        cpu_us=measured.cpu_us,
        rows=measured.rows,
        raw=measured.raw,
        machine=Machine(
            measured_on=datetime.datetime.now(datetime.UTC).date().isoformat(),
            cpu=_cpu_model(),
            cores=os.cpu_count() or 0,
            memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            postgres=measured.postgres,
            go=built.go_version,
            fsync_us=readings.fsync_us(folder),
            load_average=round(load_average, 2),
        ),
    )


def _commit() -> str:
    """What was measured, as git calls it; with a + where files differ from that."""
    try:
        named = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return named.stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
