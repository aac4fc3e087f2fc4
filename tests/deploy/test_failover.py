"""Fail-over of PostgreSQL under a load of orders: the primary dies or hands over, and the shop goes on at another node.

What is asked of each
    - No acknowledged order is lost or changed, and none is there twice: there are as many orders as keys, and a key
      that is sent again gets its order.
    - Each request is answered 201, or asks for the same request again: nothing waits for ever.
    - The shop accepts orders again within 30 s.
    - `mercato audit --settled 0` holds afterwards.

The figures are printed, also when all is well.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from deploy.patroni import PatroniCluster, why_not
from mercato.testing.caller import Buyers, Caller, everything
from mercato.testing.command import run_command
from mercato.testing.links import Links
from mercato.testing.process import Process
from mercato.testing.responses import Response
from mercato.testing.served import free_address
from mercato.testing.waiting import BOUND_SECONDS, wait_until

WHY: Final = why_not()
SECRET: Final = "a secret of at least thirty-two characters"  # of a shop that only this run can reach
BUYERS: Final = 8
THINK_SECONDS: Final = 0.1
"""Between two orders of a client: some tens of orders a second in all."""
PAUSE_SECONDS: Final = 0.25
"""Before the next try of a client that has no order yet."""
ANSWER_SECONDS: Final = 30.0
"""No client waits for longer; the gateway answers after ten seconds at the latest."""
AGAIN_SECONDS: Final = 30.0
"""The shop accepts orders again within this time."""
BEFORE, AFTER = 60, 60
"""So many orders are acknowledged before the primary fails, and again after that."""
BODY: Final[Mapping[str, Any]] = {"user_id": 1, "product_id": 100, "payment_method": "sandbox:ok"}
LASTING: Final = ("id", "user_id", "items", "total", "currency", "created_at")
"""The fields of an order that do not change after its acknowledgement."""
OPTIONS: Final[Mapping[str, Sequence[str]]] = {"together": (), "split": ("--split", "--transport", "http")}

pytestmark = [
    pytest.mark.long,
    pytest.mark.postgres,
    pytest.mark.timeout(1_200),
    pytest.mark.skipif(bool(WHY), reason=WHY or "it can be tried"),
]


class Try(msgspec.Struct, frozen=True):
    """One request for an order: when it was sent and answered, and its status and code; no status without an answer."""

    at: float
    answered_at: float
    status: int
    code: str


class Shoppers(Buyers):
    """Clients that place orders and pay at once, and note when each try was answered."""

    def __init__(self, caller: Callable[[], Caller]) -> None:
        super().__init__(caller, BUYERS)
        self.tries: list[Try] = []
        self.needed: Counter[str] = Counter()
        """How many tries each key took."""
        self.answers: dict[str, Any] = {}
        """The acknowledgement of each key."""
        self.final: list[str] = []
        """Answers that are no order, and do not ask for the same request again."""

    def order(self, caller: Caller, key: str) -> Response:
        return caller.post("/orders", BODY, Idempotency_Key=key)

    def _try(self, caller: Caller, key: str) -> bool:
        at = time.monotonic()
        try:
            reply = self.order(caller, key)
        except (OSError, http.client.HTTPException) as error:
            self._note(key, Try(at, time.monotonic(), 0, type(error).__name__))
            return False
        is_placed = reply.status == 201
        self._note(key, Try(at, time.monotonic(), reply.status, "" if is_placed else reply.code))
        if is_placed:
            self.answers[key] = reply.json
            self.placed[key] = reply.json["id"]
        elif reply.is_final:
            self.final.append(reply.text)
        self.stopped.wait(THINK_SECONDS if is_placed else PAUSE_SECONDS)
        return is_placed

    def _note(self, key: str, tried: Try) -> None:
        self.tries.append(tried)
        self.needed[key] += 1

    def failures(self) -> Counter[str]:
        """Tries that got no order, by status and code."""
        return Counter(f"{t.status or 'no answer'} {t.code}" for t in list(self.tries) if t.status != 201)

    def acknowledged(self, since: float = 0.0) -> list[float]:
        """When orders were acknowledged whose requests were sent after `since`."""
        return sorted(t.answered_at for t in list(self.tries) if t.status == 201 and t.at > since)

    def wait_for_more(self, count: int) -> None:
        """Waits for so many orders that are sent from now on."""
        now = time.monotonic()
        wait_until(lambda: len(self.acknowledged(now)) >= count, explain=lambda: str(self.failures()))

    def finish(self, caller: Caller) -> None:
        """Sends each key that has no order yet until it has."""
        for key in sorted(self.pending):
            wait_until(lambda key=key: self._try(caller, key), explain=lambda: str(self.failures()))

    def keys_to_repeat(self) -> Sequence[str]:
        """Those that took several tries, and some of the others."""
        return [key for n, key in enumerate(self.answers) if self.needed[key] > 1 or n % 20 == 0]


class Figures(msgspec.Struct, frozen=True):
    """What a failure was for the clients."""

    what: str
    shop: str
    primary: str
    """Before and after it."""
    write_gap_s: float
    """The longest time between two acknowledgements."""
    again_after_s: float
    """From the failure to the end of that gap."""
    before: int
    after: int
    """Orders acknowledged before and after the failure."""
    lost: int
    changed: int
    doubled: int
    repeated: int
    """Keys that were sent again after all, of which `repeated_wrong` got another order."""
    repeated_wrong: int
    failed: Mapping[str, int]
    """Tries that got no order, by status and code."""
    longest_answer_s: float
    audit_holds: bool


class Shop:
    """A shop whose databases are on a Patroni cluster."""

    def __init__(self, kind: str, process: Process, cluster: PatroniCluster) -> None:
        self.kind = kind
        self.cluster = cluster
        self._process = process

    def caller(self) -> Caller:
        caller = self._process.caller()
        caller.connection.timeout = ANSWER_SECONDS
        return caller

    def comes_to_rest(self) -> bool:
        """Whether everything comes to rest, and then holds."""
        end = time.monotonic() + BOUND_SECONDS / 2
        while (done := self._audited()).returncode and time.monotonic() < end:
            pass
        assert done.returncode == 0, done.stdout + done.stderr
        return True

    def _audited(self) -> subprocess.CompletedProcess[str]:
        return run_command("audit", "--settled", "0", "--dsn", self.cluster.dsn, environment={"MERCATO_SECRET": SECRET})


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Not pytest's own: the account of PostgreSQL cannot enter that."""
    with tempfile.TemporaryDirectory(prefix="mercato-failover-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[PatroniCluster]:
    """One for all tests: each leaves it with two nodes."""
    with PatroniCluster(folder) as made:
        yield made


@contextlib.contextmanager
def running(cluster: PatroniCluster, folder: Path, dsn: str, kind: str = "together") -> Generator[Shop]:
    """A shop that reaches its databases by an administrator's DSN."""
    cluster.restore()  # also after a test that has failed
    environment = {"MERCATO_POSTGRES_DSN": dsn, "MERCATO_SECRET": SECRET}
    data = Path(tempfile.mkdtemp(dir=folder)) / "data"
    with Process(data, *OPTIONS[kind], environment=environment) as process:
        yield Shop(kind, process.ready(), cluster)
        process.stop()


@pytest.fixture
def shop(cluster: PatroniCluster, folder: Path) -> Iterator[Shop]:
    """It starts at whichever node is the primary by then."""
    with running(cluster, folder, cluster.dsn) as made:
        yield made


def under_load(shop: Shop, what: str, fail: Callable[[], object], mend: Callable[[], object]) -> Figures:
    """What a failure is for clients that order all the time. `mend` is called when orders are accepted again."""
    with shop.caller() as caller:
        stored_before = count_orders(caller)
        primary = shop.cluster.primary()
        with Shoppers(shop.caller) as buyers:
            buyers.wait_for_more(BEFORE)
            failed_at = time.monotonic()
            fail()
            buyers.wait_for_more(AFTER)
            mend()
            buyers.wait_for_more(AFTER)
        buyers.finish(caller)
        assert buyers.final == []
        times = buyers.acknowledged()
        gap, ended = max((later - at, later) for at, later in itertools.pairwise(times) if later > failed_at)
        read = {key: caller.read(f"/orders/{answer['id']}") for key, answer in buyers.answers.items()}
        stored = count_orders(caller) - stored_before
        ids = {key: buyers.order(caller, key).json.get("id") for key in buyers.keys_to_repeat()}
        return Figures(
            what=what,
            shop=shop.kind,
            primary=f"{primary.name} {shop.cluster.primary().name}",
            write_gap_s=round(gap, 1),
            again_after_s=round(ended - failed_at, 1),
            before=sum(at <= failed_at for at in times),
            after=sum(at > failed_at for at in times),
            lost=sum(reply.status != 200 for reply in read.values()),
            changed=sum(not is_same(reply, buyers.answers[key]) for key, reply in read.items()),
            doubled=stored - len(buyers.placed),
            repeated=len(ids),
            repeated_wrong=sum(found != buyers.placed[key] for key, found in ids.items()),
            failed=buyers.failures(),
            longest_answer_s=round(max(t.answered_at - t.at for t in buyers.tries), 1),
            audit_holds=shop.comes_to_rest(),
        )


def count_orders(caller: Caller) -> int:
    return len(everything(caller, "/orders?limit=200"))


def is_same(reply: Response, acknowledged: Mapping[str, Any]) -> bool:
    return reply.status == 200 and all(reply.json.get(field) == acknowledged.get(field) for field in LASTING)


def check(found: Figures, capsys: pytest.CaptureFixture[str], *, seconds: float = AGAIN_SECONDS) -> None:
    with capsys.disabled():
        print(f"\n{msgspec.json.encode(found).decode()}")  # noqa: T201
    assert (found.lost, found.changed, found.doubled, found.repeated_wrong) == (0, 0, 0, 0), found
    assert found.audit_holds, found
    assert found.again_after_s <= seconds, found


def moved(found: Figures) -> bool:
    """Whether the other node is the primary."""
    before, after = found.primary.split()
    return before != after


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_machine_of_the_primary_dies(
    cluster: PatroniCluster, folder: Path, kind: str, capsys: pytest.CaptureFixture[str]
):
    """`kill -9` of PostgreSQL and Patroni at once. The one node that is left takes writes; the other joins it again."""
    with running(cluster, folder, cluster.dsn, kind) as shop:
        primary = cluster.primary()
        found = under_load(shop, "the machine dies", primary.kill, cluster.restore)
    check(found, capsys)
    assert moved(found)


def test_the_machine_of_the_primary_falls_silent(
    cluster: PatroniCluster, folder: Path, capsys: pytest.CaptureFixture[str]
):
    """It dies, and nothing refuses or resets connections to it: open ones stay open, new ones get no answer."""
    with Links() as links:
        made = {node.name: links.make(node.name, ("127.0.0.1", node.port)) for node in cluster.nodes.values()}
        dsn = cluster.dsn_at(",".join(link.address for link in made.values()))
        with running(cluster, folder, dsn) as shop:
            primary = cluster.primary()

            def fall_silent() -> None:
                links.do("silence", [made[primary.name]])
                primary.kill()

            def recover() -> None:
                links.heal()
                cluster.restore()

            found = under_load(shop, "the machine falls silent", fall_silent, recover)
    check(found, capsys)
    assert moved(found)


def test_a_planned_switch_over(shop: Shop, capsys: pytest.CaptureFixture[str]):
    cluster, primary = shop.cluster, shop.cluster.primary()
    found = under_load(
        shop, "patronictl switchover", lambda: cluster.switch_over(primary), cluster.wait_until_synchronous
    )
    check(found, capsys)
    assert moved(found)


def test_postgres_alone_dies_and_is_started_again(shop: Shop, capsys: pytest.CaptureFixture[str]):
    primary = shop.cluster.primary()
    found = under_load(shop, "PostgreSQL dies", primary.kill_postgres, shop.cluster.wait_until_synchronous)
    check(found, capsys)
    assert not moved(found)


def test_postgres_alone_dies_and_the_other_node_takes_its_place(shop: Shop, capsys: pytest.CaptureFixture[str]):
    """With `primary_start_timeout: 0` Patroni does not wait for the recovery of the old primary."""
    cluster, primary = shop.cluster, shop.cluster.primary()
    cluster.configure(primary_start_timeout=0)
    try:
        found = under_load(shop, "PostgreSQL dies, fail-over", primary.kill_postgres, cluster.wait_until_synchronous)
    finally:
        cluster.configure(primary_start_timeout=None)
    check(found, capsys)
    assert moved(found)


def test_the_standby_dies(shop: Shop, capsys: pytest.CaptureFixture[str]):
    """Without `synchronous_mode_strict`, the primary goes on alone."""
    standby = shop.cluster.other(shop.cluster.primary())
    found = under_load(shop, "the standby dies", standby.kill, shop.cluster.restore)
    check(found, capsys)
    assert not moved(found)


def test_a_primary_whose_patroni_stands_still_acknowledges_nothing(shop: Shop, capsys: pytest.CaptureFixture[str]):
    """The other node is promoted, and for a while both take sessions that may write: there is no watchdog here.

    At the old one a COMMIT waits for a standby that does not follow it any more. What waits there is not read, not
    acknowledged, and gone when Patroni goes on.
    """
    cluster, primary = shop.cluster, shop.cluster.primary()

    def stand_still() -> None:
        primary.signal_patroni(signal.SIGSTOP)
        wait_until(lambda: cluster.other(primary).answers("/primary"))

    def go_on() -> None:
        primary.signal_patroni(signal.SIGCONT)
        cluster.wait_until_synchronous()

    try:
        found = under_load(shop, "Patroni stands still", stand_still, go_on)
    finally:
        primary.signal_patroni(signal.SIGCONT)
    # Each service finds the new primary by itself, when a COMMIT has not been answered for ten seconds.
    check(found, capsys, seconds=2 * AGAIN_SECONDS)
    assert moved(found)


# ------------------------------------------------------------------------------------------------------------- HAProxy


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy was not tried: apt-get install haproxy")
def test_the_machine_of_the_primary_dies_behind_haproxy(
    cluster: PatroniCluster, folder: Path, capsys: pytest.CaptureFixture[str]
):
    """The DSN names one address, which leads to the node whose Patroni answers `/primary` with 200."""
    with haproxy(cluster, folder) as address, running(cluster, folder, cluster.dsn_at(address)) as shop:
        primary = cluster.primary()
        found = under_load(shop, "the machine dies, HAProxy", primary.kill, cluster.restore)
    check(found, capsys)
    assert moved(found)


@contextlib.contextmanager
def haproxy(cluster: PatroniCluster, folder: Path) -> Generator[str]:
    """The address of a proxy in front of the primary, configured as Patroni's documentation says."""
    address, file = free_address(), folder / "haproxy.cfg"
    nodes = "".join(
        f"  server {node.name} 127.0.0.1:{node.port} check port {node.rest_port}\n" for node in cluster.nodes.values()
    )
    file.write_text(
        "defaults\n  mode tcp\n  timeout connect 4s\n  timeout client 30m\n  timeout server 30m\n  timeout check 5s\n"
        f"listen primary\n  bind {address}\n  option httpchk OPTIONS /primary\n  http-check expect status 200\n"
        f"  default-server inter 1s fall 2 rise 1 on-marked-down shutdown-sessions\n{nodes}"
    )
    program = subprocess.Popen(["haproxy", "-db", "-f", file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    host, _, port = address.partition(":")

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    try:
        wait_until(listens)
        yield address
    finally:
        program.terminate()
        program.wait(BOUND_SECONDS)
