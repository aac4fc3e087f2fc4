"""`make restarts`: one process of a split shop after the other is killed or paused under load, and all goes on.

The shop has two processes of each service and two gateways. Every few seconds one process fails: SIGKILL of a
gateway, a service, the NATS server or the postmaster, or SIGSTOP for 5 or 30 seconds. Clients place orders all the time
and do what is documented: after a 503 or 504 they wait as `Retry-After` says, after no answer they connect anew, and
they send the same again with the same key.

What is asked of a run
    - At least 95 % of the orders are accepted within three tries.
    - Five seconds after the return of what had failed, no try fails any more.
    - An audit of all databases holds.
"""

from __future__ import annotations

import collections
import http.client
import itertools
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from mercato.embedded_postgres import processes
from mercato.testing.caller import Caller, Clients
from mercato.testing.command import COMMAND, run_command
from mercato.testing.process import Identity, Process, command_line, data_folder
from system.chaos import commands

BUYERS: Final = 6
THINK_SECONDS: Final = 0.05
"""Between two orders of a client: about a hundred orders a second in all."""
ANSWER_SECONDS: Final = 6.0
"""A gateway that stands still does not answer: a client does not wait for longer."""
TRIES: Final = 3
ACCEPTED_SHARE: Final = 0.95
NORMAL_SECONDS: Final = 5.0
CALM_SECONDS: Final = 8.0
"""Between the return of a process and the next failure."""
BACK_SECONDS: Final = 60.0
PAUSES: Final = (5.0, 30.0)
BODY: Final = {"user_id": 1, "product_id": 100, "payment_method": "sandbox:ok"}


class Try(msgspec.Struct, frozen=True):
    """One request for an order: when it was sent, how long it took, and its status; 0 without an answer."""

    at: float
    seconds: float
    status: int


class Failure(msgspec.Struct):
    """One process that is killed or paused, and what came of it. Times are of the monotonic clock."""

    what: str
    at: float
    back_at: float = 0.0
    normal_after: float = 0.0
    """Seconds from the return until the last try that failed was sent."""


class Result(msgspec.Struct, frozen=True):
    """A run, as `--json` prints it."""

    ok: bool
    seed: int
    seconds: float
    transport: str
    failures: dict[str, int]
    orders: int
    tries: int
    statuses: dict[str, int]
    accepted_within_3_tries: float
    back_seconds: dict[str, float]
    """Until what was killed is there again: the median of each kind."""
    normal_after_seconds: dict[str, float]
    """From then on until the last failing try: the longest of each kind."""
    late: list[str]
    """What took longer than five seconds."""
    audit_holds: bool


class Buyers(Clients):
    """Clients that place orders."""

    def __init__(self, shop: Process) -> None:
        super().__init__(BUYERS)
        self.tries: list[Try] = []
        self.needed: collections.Counter[int] = collections.Counter()
        """By how many tries an order took."""
        self._shop = shop

    def work(self, number: int) -> None:
        caller = self._connected()
        for turn in itertools.count():
            key = f"restarts-{number}-{turn:08d}-{'k' * 8}"
            for tried in itertools.count(1):
                answer_status, pause = self._try(caller, key)
                if answer_status == 201:
                    self.needed[tried] += 1
                    break
                if answer_status == 0:
                    caller = self._connected()
                if self.stopped.wait(pause):
                    break
            if self.stopped.wait(THINK_SECONDS):
                caller.connection.close()
                return

    def _try(self, caller: Caller, key: str) -> tuple[int, float]:
        began = time.monotonic()
        pause = 0.1
        try:
            answer = caller.post("/orders", BODY, Idempotency_Key=key)
            status = answer.status
            pause = float(answer.headers.get("retry-after", pause))
        except (OSError, http.client.HTTPException):
            status = 0
        self.tries.append(Try(began, time.monotonic() - began, status))
        return status, pause

    def _connected(self) -> Caller:
        caller = self._shop.caller()
        caller.connection.timeout = ANSWER_SECONDS
        return caller


def campaign(data: Path, *, seconds: float, seed: int, transport: str) -> Result:
    """One run."""
    rng = random.Random(f"{seed}:restarts")
    failures: list[Failure] = []
    options = ("--placement", "cluster", "--transport", transport)
    with Process(data, *options, command=COMMAND) as shop:
        shop.ready()
        with Buyers(shop) as buyers:
            end = time.monotonic() + seconds
            time.sleep(CALM_SECONDS)
            for kind in _kinds(rng, transport):
                if time.monotonic() + CALM_SECONDS > end:
                    break
                failures.append(_inject(shop, kind, rng))
                time.sleep(CALM_SECONDS)
                _print_failure(failures[-1], buyers)
        for failure, following in itertools.zip_longest(failures, failures[1:]):
            until = following.at if following else float("inf")
            failure.normal_after = _last_failed(buyers, failure.back_at, until)
        shop.stop()
    with Process(data, command=COMMAND) as whole:
        whole.ready()
        holds = _audit(data)
        whole.stop()
    return _result(seconds, seed, transport, failures, buyers, audit_holds=holds)


def _kinds(rng: random.Random, transport: str) -> Iterator[str]:
    """Each kind once in every turn, in an order that chance chooses."""
    kinds = ["gateway", "service", "service", "service", "postmaster", "pause 5", "pause 5", "pause 30"]
    kinds += ["nats"] if transport == "nats" else []
    while True:
        rng.shuffle(kinds)
        yield from kinds


def _inject(shop: Process, kind: str, rng: random.Random) -> Failure:
    """Kills or pauses one process, and returns when it is there again."""
    tree = shop.tree()
    gateways = sorted(name for name in tree.instances if name.startswith("gateway"))
    services = sorted(tree.instances.keys() - set(gateways))
    if kind.startswith("pause"):
        name = rng.choice([*gateways, *services])
        return _pause(tree.instances[name], f"pause {name.partition('.')[0]}", float(kind.removeprefix("pause ")))
    if kind == "postmaster":
        assert tree.postmaster is not None
        return _kill(shop, tree.postmaster, kind, "PostgreSQL is running again")
    if kind == "nats":
        [server] = [p for p in tree.others if _is_nats(p)]
        return _kill(shop, server, kind, "NATS is running again")
    name = rng.choice(gateways if kind == "gateway" else services)
    return _kill(shop, tree.instances[name], name.partition(".")[0], f"{name} is running again")


def _kill(shop: Process, target: Identity, what: str, sign: str) -> Failure:
    before = shop.count_lines(sign)
    failure = Failure(what, time.monotonic())
    processes.send(target, signal.SIGKILL)
    shop.wait_for(lambda: shop.count_lines(sign) > before, sign)
    failure.back_at = time.monotonic()
    return failure


def _pause(target: Identity, what: str, seconds: float) -> Failure:
    failure = Failure(f"{what} {seconds:.0f} s", time.monotonic())
    processes.send(target, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        processes.send(target, signal.SIGCONT)
    failure.back_at = time.monotonic()
    return failure


def _is_nats(process: Identity) -> bool:
    line = command_line(process.pid)
    return "nats-server" in line and "guard.py" not in line


def _audit(data: Path) -> bool:
    done = run_command("audit", "--data", data, "--settled", "0")
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
    return done.returncode == 0


def _print_failure(failure: Failure, buyers: Buyers) -> None:
    failed = [t for t in buyers.tries if t.at > failure.at and t.status != 201]
    back, last = failure.back_at - failure.at, _last_failed(buyers, failure.back_at)
    said = (
        f"{failure.what:22} back after {back:4.1f} s, {len(failed):3} tries failed, the last {last:4.1f} s after that"
    )
    print(f"{said}; {sum(buyers.needed.values())} orders", file=sys.stderr, flush=True)


def _last_failed(buyers: Buyers, since: float, until: float = float("inf")) -> float:
    """Seconds after `since` at which the last try was sent that failed; 0 where none has.

    `until` is when the next process failed: a try that was under way then belongs to that one.
    """
    failed = [t.at - since for t in list(buyers.tries) if since < t.at and t.at + t.seconds < until and t.status != 201]
    return max(failed, default=0.0)


def _result(
    seconds: float, seed: int, transport: str, failures: list[Failure], buyers: Buyers, *, audit_holds: bool
) -> Result:
    orders = sum(buyers.needed.values())
    accepted = sum(n for tries, n in buyers.needed.items() if tries <= TRIES) / max(1, orders)
    by_kind: dict[str, list[Failure]] = {}
    for failure in sorted(failures, key=lambda failure: failure.what):
        by_kind.setdefault(failure.what, []).append(failure)
    late = [f"{b.what}: {b.normal_after:.1f} s" for b in failures if b.normal_after > NORMAL_SECONDS]
    return Result(
        ok=audit_holds and not late and accepted >= ACCEPTED_SHARE and bool(failures),
        seed=seed,
        seconds=seconds,
        transport=transport,
        failures=dict(collections.Counter(failure.what for failure in failures)),
        orders=orders,
        tries=len(buyers.tries),
        statuses={str(s or "no answer"): n for s, n in collections.Counter(t.status for t in buyers.tries).items()},
        accepted_within_3_tries=round(accepted, 4),
        back_seconds={
            kind: round(statistics.median(one.back_at - one.at for one in some), 1) for kind, some in by_kind.items()
        },
        normal_after_seconds={kind: round(max(one.normal_after for one in some), 1) for kind, some in by_kind.items()},
        late=late,
        audit_holds=audit_holds,
    )


def main() -> int:
    options = commands.options(
        "make restarts", "Kill and pause one process of a split shop after the other.", transport="nats"
    )
    with data_folder() as data:
        result = campaign(data, seconds=options.seconds, seed=options.seed, transport=options.transport)
    commands.show(result, as_json=options.json)
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
