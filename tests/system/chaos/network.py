"""`make network`: links between the processes of a shop fail under load, one or several at a time, and heal.

Each service, and the gateway, is a process of its own. Each of its ways to another, to its database, and to NATS is a
link of its own (`mercato/testing/links.py`). Links get slow, are cut, swallow what passes, in one direction or both,
or lose the listener's half of their connections. Clients order and pay all the time and do what is documented.

What is asked of a run
    - Every request gets an answer while links fail: nothing waits for ever.
    - After each failure, orders are accepted again.
    - No order that was answered is lost, and an audit of all databases holds.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import msgspec

from mercato import topology
from mercato.chassis.postgres.dsn import with_server
from mercato.testing.caller import Buyers, Caller
from mercato.testing.cluster import Cluster
from mercato.testing.command import run_command
from mercato.testing.links import Link, Links
from mercato.testing.responses import Response
from mercato.testing.served import Served, free_address, nats_server, variables
from mercato.testing.waiting import BOUND_SECONDS, wait_until
from system.chaos import commands
from system.chaos.shop import ENVIRONMENT

GATEWAY: Final = "gateway"
SERVICES: Final = tuple(topology.SERVICES)
SECRET: Final = "a secret of at least thirty-two characters"  # of a shop that only this run can reach
ANSWER_SECONDS: Final = 30.0
"""No client waits for longer; the gateway answers after ten seconds at the latest."""
FAILED_SECONDS: Final = (1.0, 6.0)
CALM_SECONDS: Final = 1.0
BODY: Final = {"user_id": 1, "product_id": 100, "payment_method": "sandbox:ok"}


class Kind(msgspec.Struct, frozen=True):
    """A way in which a link fails."""

    name: str
    what: str
    how: tuple[Any, ...] = ()


KINDS: Final = (
    Kind("slow 50 ms", "slow", (0.05,)),
    Kind("slow 500 ms", "slow", (0.5,)),
    Kind("slow 5 s", "slow", (5.0,)),
    Kind("cut", "cut"),
    Kind("silent", "silence"),
    Kind("requests lost", "silence", ("there",)),
    Kind("answers lost", "silence", ("back",)),
    Kind("half open", "halve"),
)
MANY: Final = 0.25
"""So many failures are of all links to one listener."""


class Failure(msgspec.Struct):
    """Links that failed together for `seconds`; `after_s` later an order was accepted again."""

    kind: str
    links: str
    seconds: float
    after_s: float = 0.0


class Result(msgspec.Struct, frozen=True):
    """A run, as `--json` prints it."""

    ok: bool
    seed: int
    seconds: float
    transport: str
    failures: dict[str, int]
    links: int
    """Those that failed at least once, of `links_made`."""
    links_made: int
    orders: int
    statuses: dict[str, int]
    unanswered: int
    longest_answer_s: float
    accepted_again_s: dict[str, float]
    """After the links healed: the longest time of each kind of failure."""
    audit_holds: bool
    errors: list[str]


class Paying(Buyers):
    """Buyers who pay at once, and note how long the longest answer took."""

    longest_s = 0.0
    last_at = 0.0
    """When the last order was accepted: monotonic."""

    def order(self, caller: Caller, key: str) -> Response:
        return caller.post("/orders", BODY, Idempotency_Key=key)

    def _try(self, caller: Caller, key: str) -> bool:
        began = time.monotonic()
        is_accepted = super()._try(caller, key)
        ended = time.monotonic()
        self.longest_s = max(self.longest_s, ended - began)
        if is_accepted:
            self.last_at = ended
        return is_accepted


class Wired:
    """A shop, each process of which reaches the others by links of its own."""

    def __init__(self, links: Links, gateway: Served) -> None:
        self.links = links
        self.gateway = gateway


@contextlib.contextmanager
def wired(admin_dsn: str, folder: Path, transport: str) -> Generator[Wired]:
    """A migrated shop with the demo data on the server of `admin_dsn`, which runs for the time of the block."""
    admin = {"MERCATO_POSTGRES_DSN": admin_dsn, "MERCATO_SECRET": SECRET}
    done = run_command("migrate", "--demo", "--data", str(folder / "data"), environment=admin)
    assert done.returncode == 0, done.stderr
    given = folder / "data" / "environment"
    query = parse_qs(urlsplit(admin_dsn).query)
    postgres = f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}"
    with Links() as links, contextlib.ExitStack() as stack:
        reached: Mapping[str, str]
        if transport == "nats":
            broker = stack.enter_context(nats_server(folder, given / "nats.conf"))
            listening: dict[str, str] = {}
        else:
            broker = ""
            listening = {name: free_address() for name in SERVICES}
        running: dict[str, Served] = {}
        for name in (*SERVICES, GATEWAY):
            own = variables(given / f"{name}.env") | dict(ENVIRONMENT) | {"MERCATO_RPC_TRANSPORT": transport}
            if name != GATEWAY:
                database = links.make(f"{name} > postgres", postgres)
                dsn = f"DATABASE_URL_{name.upper()}"
                own[dsn] = with_server(own[dsn], *_parts(database.address))
            if transport == "nats":
                own["NATS_URL"] = f"nats://{links.make(f'{name} > nats', _parts(broker)).address}"
            else:
                reached = {callee: listening[callee] for callee in _callees(name)}
                through = {to: links.make(f"{name} > {to}", _parts(where)).address for to, where in reached.items()}
                own["MERCATO_SERVICES"] = "; ".join(f"{to}={where}" for to, where in through.items())
                own["MERCATO_RPC_ADDRESS"] = listening.get(name) or free_address()
            running[name] = stack.enter_context(Served(name, environment=own))
        for served in running.values():
            served.ready()
        yield Wired(links, running[GATEWAY])


def _callees(caller: str) -> list[str]:
    # The event log of a service is called where the service is.
    return sorted({operation.service.partition(".")[0] for operation in topology.called_by(caller)} - {caller})


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def campaign(
    admin_dsn: str, folder: Path, *, seconds: float, seed: int, transport: str, report_progress: bool = False
) -> Result:
    """One run."""
    rng = random.Random(f"{seed}:network")
    failures: list[Failure] = []
    failed: set[str] = set()
    with wired(admin_dsn, folder, transport) as shop:
        with shop.gateway.caller() as alice:
            alice.sign_in("alice@example.com", "demo-password")
            token = alice.token
        made = list(shop.links.made.values())
        with Paying(lambda: _patient(shop.gateway, token)) as buyers:
            wait_until(lambda: len(buyers.placed) > 0, BOUND_SECONDS, lambda: str(buyers.statuses))
            end = time.monotonic() + seconds
            for kind, links in _schedule(rng, made):
                if time.monotonic() + FAILED_SECONDS[1] > end:
                    break
                failed |= {link.name for link in links}
                failures.append(_fail(shop, kind, links, rng.uniform(*FAILED_SECONDS), buyers))
                if report_progress:
                    _print_failure(failures[-1], buyers)
        lost = _lost(shop, buyers, token)
        holds = _comes_to_rest(admin_dsn)
        errors = [line for line in shop.gateway.errors if '"level":"error"' in line]
    return Result(
        ok=holds and not lost and not buyers.unanswered and bool(failures),
        seed=seed,
        seconds=seconds,
        transport=transport,
        failures=dict(collections.Counter(failure.kind for failure in failures)),
        links=len(failed),
        links_made=len(made),
        orders=len(buyers.placed),
        statuses={str(status): n for status, n in sorted(buyers.statuses.items())},
        unanswered=buyers.unanswered,
        longest_answer_s=round(buyers.longest_s, 1),
        accepted_again_s={
            kind: max(round(one.after_s, 1) for one in failures if one.kind == kind)
            for kind in sorted({one.kind for one in failures})
        },
        audit_holds=holds,
        errors=[*lost, *errors[:20]],
    )


def _patient(gateway: Served, token: str | None) -> Caller:
    caller = gateway.caller(token)
    caller.connection.timeout = ANSWER_SECONDS
    return caller


def _schedule(rng: random.Random, links: Sequence[Link]) -> Iterator[tuple[Kind, Sequence[Link]]]:
    """Each link once in every turn, each time with another kind, in an order that chance chooses."""
    kinds = itertools.cycle(rng.sample(KINDS, len(KINDS)))
    while True:
        for link in rng.sample(links, len(links)):
            listener = link.name.partition(" > ")[2]
            together = [one for one in links if one.name.endswith(f" > {listener}")]
            yield next(kinds), together if rng.random() < MANY else [link]


def _fail(shop: Wired, kind: Kind, links: Sequence[Link], seconds: float, buyers: Paying) -> Failure:
    names = links[0].name if len(links) == 1 else f"all{links[0].name[links[0].name.index(' >') :]}"
    failure = Failure(kind.name, names, seconds)
    shop.links.do(kind.what, links, *kind.how)
    try:
        time.sleep(seconds)
    finally:
        shop.links.heal()
    healed_at = time.monotonic()
    # An order that was sent after this moment: what was under way may have been answered late.
    wait_until(lambda: buyers.last_at > healed_at, BOUND_SECONDS, lambda: f"{failure} {buyers.statuses}")
    failure.after_s = buyers.last_at - healed_at
    time.sleep(CALM_SECONDS)
    return failure


def _lost(shop: Wired, buyers: Paying, token: str | None) -> list[str]:
    """What was answered and is not there, or is there twice; nothing, if all is well."""
    with shop.gateway.caller(token) as caller:
        try:
            buyers.assert_nothing_lost(caller)
        except AssertionError as error:
            return [str(error)]
    return []


def _comes_to_rest(admin_dsn: str) -> bool:
    """Whether everything comes to rest, and then holds."""
    end = time.monotonic() + BOUND_SECONDS
    while (done := _audited(admin_dsn)).returncode and time.monotonic() < end:
        pass
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
    return done.returncode == 0


def _audited(admin_dsn: str) -> subprocess.CompletedProcess[str]:
    return run_command("audit", "--settled", "0", "--dsn", admin_dsn, environment={"MERCATO_SECRET": SECRET})


def _print_failure(failure: Failure, buyers: Paying) -> None:
    said = f"{failure.kind:14} {failure.links:24} {failure.seconds:3.1f} s; an order {failure.after_s:4.1f} s after it"
    print(f"{said}; {len(buyers.placed)} orders", file=sys.stderr, flush=True)


def main() -> int:
    options = commands.options("make network", "Let links between the processes of a shop fail.", transport="http")
    with asyncio.Runner() as runner, tempfile.TemporaryDirectory(prefix="mercato-network-") as folder:
        cluster = runner.run(Cluster.start())
        try:
            result = campaign(
                cluster.server.admin_dsn,
                Path(folder),
                seconds=options.seconds,
                seed=options.seed,
                transport=options.transport,
                report_progress=True,
            )
        finally:
            runner.run(cluster.stop())
    commands.show(result, as_json=options.json)
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
