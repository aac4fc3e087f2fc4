"""`POST /orders` under load: is it fast, and is every answer true?

    .venv/bin/python bench/orders.py [--seconds 10] [--connections 128] [--workers 1] [--pay sandbox:ok] [--one-product]

Starts a PostgreSQL and a shop of its own in a temporary folder, loads it with wrk, and prints the rate, the latency,
the CPU time of the shop and of PostgreSQL for each order, and the mean batch. Ends with code 1 if any answer was not
201, or if the table does not hold exactly as many new orders as were answered. Needs wrk.

With `--pay`, each order names a payment method, and the rate is that of orders that were paid, until the last one is.
Products are spread over the demo catalogue; with `--one-product`, every order is for the same.
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
import time
import urllib.request
from pathlib import Path
from typing import Any

import asyncpg

from mercato.chassis.supervisor import EmbeddedPostgres, remove_cluster

SCRIPT = """
local products = { %(products)s }
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
request = function()
  local product = products[math.random(#products)]
  return wrk.format(nil, nil, nil, '{"user_id": 1, "product_id": ' .. product .. '%(payment)s}')
end
done = function(summary)
  local e = summary.errors
  io.write(string.format("answers %%d errors %%d\\n", summary.requests,
    e.status + e.read + e.write + e.timeout + e.connect))
end
"""
SPREAD = (*range(1, 15), *range(100, 106), *range(200, 205))
"""The demo catalogue: a million pieces of each."""
REST_SECONDS = 120.0


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
    parser.add_argument("--pay", metavar="METHOD", help="a payment method for every order, such as sandbox:ok")
    parser.add_argument("--one-product", action="store_true", help="every order is for product 100")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


async def _measure(options: argparse.Namespace, folder: Path, server: EmbeddedPostgres) -> int:
    shop, url = await _start(options, folder, server.admin_dsn)
    try:
        script = folder / "post.lua"
        payment = f', "payment_method": "{options.pay}"' if options.pay else ""
        products = "100" if options.one_product else ", ".join(map(str, SPREAD))
        script.write_text(SCRIPT % {"products": products, "payment": payment})
        await _wrk(url, script, seconds=2, connections=8)  # warms caches and prepared statements
        await _rest(server.admin_dsn)
        before, batches, cpu = await _orders(server.admin_dsn), _batches(url), _cpu(shop.pid, server.pid)
        paid_before, began = await _paid(server.admin_dsn), time.monotonic()
        out = await _wrk(url, script, options.seconds, options.connections)
        await _rest(server.admin_dsn)
        until_rest = time.monotonic() - began
        paid = await _paid(server.admin_dsn) - paid_before
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
        **({"paid": paid, "paid_per_second": round(paid / until_rest, 1)} if options.pay else {}),
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
    all_paid = not options.pay or paid == after - before
    return 0 if errors == 0 and 0 <= unanswered <= options.connections and all_paid else 1


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
    return await _count(dsn, "SELECT count(*) FROM orders")


async def _paid(dsn: str) -> int:
    return await _count(dsn, "SELECT count(*) FROM orders WHERE payment = 'paid'")


async def _rest(dsn: str) -> None:
    """Waits until nothing is under way: every checkout is finished, or waits for a payment."""
    end = time.monotonic() + REST_SECONDS
    while await _count(dsn, "SELECT count(*) FROM sagas WHERE wake_at IS NOT NULL AND step <> 'awaiting'"):
        if time.monotonic() > end:
            raise SystemExit(f"orders are still under way after {REST_SECONDS:.0f} s")
        await asyncio.sleep(0.1)


async def _count(dsn: str, sql: str) -> int:
    connection: Any = await asyncpg.connect(dsn.replace("/postgres?", "/mercato_orders?"))
    try:
        return await connection.fetchval(sql)
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
