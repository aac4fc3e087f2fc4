"""The last release and this checkout in one shop of processes, on databases that this checkout has migrated.

Each process in turn is of another version than all others, and then of both; a rolling upgrade replaces all of them
under load. `tests/deploy/test_rolling_upgrade.py` does that with containers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Final

import pytest
import pytest_asyncio

from mercato.chassis.hosting.host import GATEWAY
from mercato.testing.caller import all_order_ids
from mercato.testing.cluster import Cluster
from mercato.testing.waiting import wait_until
from system.versions.code import SERVING, THIS, Code, changed_in, last_release, release_in, transports_of, why_not
from system.versions.load import Customers, PayingBuyers, Readers, unmendable
from system.versions.shop import Databases, Shop, State

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.postgres,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

ORDERS: Final = 6
"""Orders that the buyers place in each state, at least."""
TURNS: Final = 1
"""And turns of a customer, of three orders each."""
BETWEEN: Final = 10
"""Orders that are placed between two steps of a rolling upgrade."""
IS_CAMPAIGN: Final = os.environ.get("CAMPAIGN") == "full"
BOTH: Final = () if why_not() else transports_of(last_release()[1].commit)
"""The transports that both versions have."""
TRANSPORTS: Final = BOTH if IS_CAMPAIGN else BOTH[:1]
RENAMED: Final = (
    "mercato/contracts/products.py",
    "class Quote(Message):",
    'class Quote(Message, rename={"price_minor": "minor_price"}):',
)
"""A field of what products answers to orders has another name on the wire."""

over_transports = pytest.mark.parametrize("shop", TRANSPORTS, indirect=True)
over_all = pytest.mark.parametrize("shop", BOTH, indirect=True)
each_process = pytest.mark.parametrize("name", SERVING)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server() -> AsyncGenerator[Cluster]:
    """A PostgreSQL of its own: each shop has the databases of these names."""
    started = await Cluster.start()
    yield started
    await started.stop()


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Code:
    return release_in(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def renamed(tmp_path_factory: pytest.TempPathFactory) -> Code:
    """This checkout in which a field of a contract has another name."""
    return changed_in(tmp_path_factory.mktemp("renamed"), *RENAMED, image="products")


@pytest.fixture(scope="module")
def databases(server: Cluster, tmp_path_factory: pytest.TempPathFactory, before: Code) -> Databases:
    return Databases(server.server.admin_dsn, tmp_path_factory.mktemp("shop"), before)


@pytest.fixture(scope="module")
def shop(databases: Databases, before: Code, renamed: Code, request: pytest.FixtureRequest) -> Iterator[Shop]:
    with Shop(databases, request.param, (before, THIS, renamed)) as made:
        yield made


def all_of(code: Code, shop: Shop) -> State:
    """Every process of one version; of this checkout where the databases refuse that one."""
    return {name: [THIS if name in shop.databases.refused else code] for name in SERVING}


def skip_refused(name: str, shop: Shop) -> None:
    if reason := shop.databases.refused.get(name):
        pytest.skip(reason)


class Load:
    """What clients do in a state until `is_enough`; afterwards it asserts that nothing was lost."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self.buyers = PayingBuyers(shop.caller, count=2)
        self.readers = Readers(shop.caller)
        self.customers = Customers(shop.caller)

    def run(self, is_enough: Callable[[], bool] = lambda: True) -> None:
        with self.buyers, self.readers, self.customers:
            wait_until(lambda: self.has_failed() or (self._has_run() and is_enough()), explain=lambda: str(vars(self)))
        self.assert_nothing_lost()

    def _has_run(self) -> bool:
        return len(self.buyers.placed) >= ORDERS and self.customers.turns >= TURNS and self.readers.statuses[200] >= 10

    def has_failed(self) -> bool:
        """Whether a request has failed in a way that no repetition mends."""
        failed = unmendable(self.buyers.statuses, 201) | unmendable(self.readers.statuses, 200)
        return bool(failed or self.customers.failures)

    def assert_nothing_lost(self) -> None:
        shop = self._shop
        assert self.customers.failures == []
        assert unmendable(self.buyers.statuses, 201) == set()
        assert unmendable(self.readers.statuses, 200) == set(), self.readers.failures
        with shop.caller() as caller:
            self.buyers.assert_nothing_lost(caller)
            pending = {self.buyers.order(caller, key).json["id"] for key in self.buyers.pending}
        shop.databases.orders |= {*self.buyers.placed.values(), *self.customers.orders, *pending}


def run_until_all_serve(shop: Shop, name: str) -> None:
    """Load until each version of a process has answered."""
    before = Counter[Code]() if name == GATEWAY else shop.served(name)
    codes = shop.versions()[name]

    def all_have_served() -> bool:
        if name == GATEWAY:  # clients take them in turns
            return True
        now = shop.served(name)
        return all(now[code] > before[code] for code in codes)

    Load(shop).run(all_have_served)


@over_transports
@each_process
def test_both_versions_of_a_process_serve_on_one_database_among_those_of_the_last_release(
    shop: Shop, before: Code, name: str
):
    skip_refused(name, shop)
    shop.become({**all_of(before, shop), name: [before, THIS]})
    run_until_all_serve(shop, name)


@over_transports
@each_process
def test_a_process_of_this_version_works_among_those_of_the_last_release(shop: Shop, before: Code, name: str):
    shop.become({**all_of(before, shop), name: [THIS]})
    run_until_all_serve(shop, name)


@over_transports
def test_a_renamed_field_of_a_contract_is_noticed(shop: Shop, before: Code, renamed: Code):
    shop.become({**all_of(before, shop), "products": [renamed]})
    load = Load(shop)
    with pytest.raises(AssertionError, match="500"):
        load.run()
    # What these requests have left behind is not known to their clients.
    shop.become(all_of(before, shop))
    with shop.caller() as caller:
        found = set(all_order_ids(caller))
    assert shop.databases.orders <= found
    shop.databases.orders = found


@over_all
def test_every_process_is_replaced_under_load_and_no_request_fails(shop: Shop, before: Code):
    state = dict(all_of(before, shop))
    shop.become(state)
    load = Load(shop)

    def go_on() -> None:
        placed = len(load.buyers.placed)
        wait_until(lambda: load.has_failed() or len(load.buyers.placed) >= placed + BETWEEN)

    with load.buyers, load.readers, load.customers:
        for name in SERVING:
            for codes in ([*state[name], THIS], [THIS]):
                state[name] = list(dict.fromkeys(codes))
                shop.become(state)
                go_on()
    assert (dict(load.buyers.statuses), load.buyers.unanswered) == ({201: len(load.buyers.placed)}, 0)
    assert (set(load.readers.statuses), load.readers.failures) == ({200}, [])
    load.assert_nothing_lost()


@over_transports
@each_process
def test_a_process_of_the_last_release_works_among_those_of_this_version(shop: Shop, before: Code, name: str):
    skip_refused(name, shop)
    shop.become({**all_of(THIS, shop), name: [before]})
    run_until_all_serve(shop, name)


@over_all
def test_the_audit_holds_and_each_order_is_there_once(shop: Shop):
    shop.become(all_of(THIS, shop))
    shop.databases.audit()
    with shop.caller() as caller:
        assert sorted(all_order_ids(caller)) == sorted(shop.databases.orders)
