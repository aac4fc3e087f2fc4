"""`POST /orders` under load: is it fast, and is every answer true?

    .venv/bin/python bench/orders.py [--seconds 10] [--connections 128] [--workers 1]

Starts a PostgreSQL and a shop of its own in a temporary folder, loads it with wrk, and prints the rate, the latency,
the CPU time of the shop and of PostgreSQL for each order, and the mean batch. Ends with code 1 if any answer was not
201, or if the table does not hold exactly as many new orders as were answered. Needs wrk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import asyncpg

from mercato.chassis.supervisor import EmbeddedPostgres, remove_cluster

SCRIPT = """
wrk.method = "POST"
wrk.body = '{"user_id": 1, "product_id": 100}'
wrk.headers["Content-Type"] = "application/json"
done = function(summary)
  local e = summary.errors
  io.write(string.format("answers %d errors %d\\n", summary.requests,
    e.status + e.read + e.write + e.timeout + e.connect))
end
"""


async def main() -> int:
    options = _options()
    if shutil.which("wrk") is None:
        print("bench/orders.py: wrk is not installed (Debian: apt install wrk)", file=sys.stderr)
        return 2
    folder, cluster = _folders()
    server = await EmbeddedPostgres.start(cluster, password="bench", progress=lambda _line: None)
    try:
        return await _measure(options, folder, server)
    finally:
        await server.stop()
        remove_cluster(cluster)
        shutil.rmtree(folder)


def _folders() -> tuple[Path, Path]:
    """A temporary folder, and one in it for PostgreSQL, which under root runs as somebody else."""
    folder = Path(tempfile.mkdtemp(prefix="mercato-bench-"))
    folder.chmod(0o755)
    (folder / "postgres").mkdir(mode=0o755)
    return folder, folder / "postgres"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Load POST /orders and check every answer.")
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--connections", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


async def _measure(options: argparse.Namespace, folder: Path, server: EmbeddedPostgres) -> int:
    shop, url = await _start(options, folder, server.admin_dsn)
    try:
        script = folder / "post.lua"
        script.write_text(SCRIPT)
        await _wrk(url, script, seconds=2, connections=8)  # warms caches and prepared statements
        before, batches, cpu = await _orders(server.admin_dsn), _batches(url), _cpu(shop.pid, server.pid)
        out = await _wrk(url, script, options.seconds, options.connections)
        after, more_batches, more_cpu = await _orders(server.admin_dsn), _batches(url), _cpu(shop.pid, server.pid)
    finally:
        shop.send_signal(signal.SIGTERM)
        await shop.wait()
    answers, errors = map(int, re.findall(r"answers (\d+) errors (\d+)", out)[0])
    placed, flown = more_batches[0] - batches[0], more_batches[1] - batches[1]
    figures: dict[str, Any] = {
        "orders_per_second": float(re.findall(r"Requests/sec: *([\d.]+)", out)[0]),
        "p50": re.findall(r"50% *(\S+)", out)[0],
        "p99": re.findall(r"99% *(\S+)", out)[0],
        "answers": answers,
        "not_201": errors,
        "new_rows": after - before,
        "mean_batch": round(placed / flown, 1),
        "shop_us_per_order": round((more_cpu[0] - cpu[0]) / answers * 1e6, 1),
        "postgres_us_per_order": round((more_cpu[1] - cpu[1]) / answers * 1e6, 1),
    }
    print(json.dumps(figures) if options.json else "\n".join(f"{k:<22} {v}" for k, v in figures.items()))
    # wrk stops in the middle of requests: those may be in the table and not among the answers, one a connection.
    unanswered = after - before - answers
    return 0 if errors == 0 and 0 <= unanswered <= options.connections else 1


async def _start(options: argparse.Namespace, folder: Path, dsn: str) -> tuple[asyncio.subprocess.Process, str]:
    shop = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "mercato.cli", "up", "--json", "--port", "0"],
        *["--workers", str(options.workers), "--data", str(folder / "data")],
        env={**os.environ, "MERCATO_POSTGRES_DSN": dsn},
        stdout=asyncio.subprocess.PIPE,
    )
    assert shop.stdout is not None
    async for line in shop.stdout:
        if (event := json.loads(line))["event"] == "ready":
            return shop, event["url"]
    raise SystemExit("the shop did not start")


async def _wrk(url: str, script: Path, seconds: int, connections: int) -> str:
    wrk = await asyncio.create_subprocess_exec(
        *["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script), f"{url}/orders"],
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await wrk.communicate()
    await asyncio.sleep(0.5)  # what wrk left unanswered is done by then
    return out.decode()


async def _orders(dsn: str) -> int:
    connection: Any = await asyncpg.connect(dsn.replace("/postgres?", "/mercato_orders?"))
    try:
        return await connection.fetchval("SELECT count(*) FROM orders")
    finally:
        await connection.close()


def _batches(url: str) -> tuple[float, float]:
    """Orders placed and batches flown so far, from the shop's own metrics."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    total = re.findall(r'mercato_batch_size_sum\{operation="orders.place"\} (\S+)', text)
    count = re.findall(r'mercato_batch_size_count\{operation="orders.place"\} (\S+)', text)
    return float(total[0]), float(count[0])


def _cpu(shop: int, postmaster: int) -> tuple[float, float]:
    """CPU seconds of the shop's processes and of PostgreSQL's so far."""
    return sum(map(_seconds, _tree(shop))), sum(map(_seconds, _tree(postmaster)))


def _tree(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += _tree(int(child))
    return found


def _seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
