"""Runs the load generator (`bench/load/main.go`) and reads what it says."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from bench.throughput.figures import Loaded
from bench.throughput.plan import Request

SPARE_SECONDS: Final = 120.0
"""For answers that are late, and for checking them."""
LONGEST_SECONDS: Final = 600.0
"""Of a load that ends after a number of requests."""


class Plan(msgspec.Struct, frozen=True):
    """What is sent to `address`. See the Go program for the units."""

    address: str
    connections: int
    seconds: float
    requests: Sequence[Request]
    rate: float = 0.0
    count: int = 0
    seed: int = 1
    refusals: bool = False
    sources: int = 0


class LoadFailed(Exception):
    """Not every answer was as it must be, or there were none."""


async def load(program: Path, plan: Plan) -> Loaded:
    """Sends a load and waits for its last answer. Raises `LoadFailed` if any answer was not good."""
    return checked(plan, await sent(program, plan))


async def sent(program: Path, plan: Plan) -> Loaded:
    """Sends a load and waits for its last answer, whatever the answers are."""
    process = await asyncio.create_subprocess_exec(
        str(program), stdin=PIPE, stdout=PIPE, limit=2**24, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(plan) + b"\n")
        await process.stdin.drain()
        # Its input stays open as long as it runs: it ends with us, however we end.
        async with asyncio.timeout(plan.seconds + SPARE_SECONDS):
            said = await process.stdout.read()
            code = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        process.stdin.close()
    if code:
        raise LoadFailed(f"the load generator ended with {code}")
    return msgspec.json.decode(said, type=Loaded)


def checked(plan: Plan, loaded: Loaded) -> Loaded:
    """The same, if every answer was as it must be and each of them names an order of its own; else `LoadFailed`."""
    if loaded.good != loaded.requests or loaded.failures or not loaded.good:
        wrong = loaded.requests - loaded.good
        raise LoadFailed(f"{wrong} of {loaded.requests} answers are wrong: {'; '.join(loaded.failures) or 'none came'}")
    if plan.requests[0].creates and loaded.distinct_ids != loaded.good:
        raise LoadFailed(f"{loaded.good} answers name {loaded.distinct_ids} different orders")
    return loaded
