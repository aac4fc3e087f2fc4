"""The arithmetic of `make bench-overload`. No load is sent, and no time is measured."""

from __future__ import annotations

from collections import Counter
from typing import Final

from msgspec.structs import replace

from bench.throughput.figures import Latency, Loaded
from bench.throughput.load import Plan
from bench.throughput.overload import MOST_CONNECTIONS, STEPS, Figures, mixed, plan_of, saturates, table
from bench.throughput.plan import Product
from bench.throughput.shops import Mercato

CLOSED: Final = Plan("127.0.0.1:1", 128, 10.0, (), refusals=True)
PRODUCTS: Final = tuple(Product(n, f"S{n}", f"N{n}", "", 1_000, "c") for n in range(1, 101))


def latency(p99_us: float) -> Latency:
    return Latency(mean=1.0, p50=1.0, p90=1.0, p99=p99_us, p999=1.0, max=1.0)


LOADED: Final = Loaded(
    requests=1_000,
    good=600,
    distinct_ids=120,
    failures=("status 504",),
    began_at=0.0,
    seconds=2.0,
    latency_us=latency(50_000.0),
    kinds_us={},
    load_cpu_us=100.0,
    refused=390,
    refused_us=latency(20_000.0),
    kinds_good={"order": 120, "get": 480},
)


def test_rates_are_of_a_second_and_shares_of_the_capacity() -> None:
    found = Figures.of("twice the capacity", 512, LOADED, 250.0, 83.0)
    assert (found.offered, found.good, found.good_of_capacity, found.orders_good) == (500.0, 300.0, 1.2, 60.0)
    assert (found.refused, found.refused_p99_ms, found.p99_ms) == (195.0, 20.0, 50.0)
    assert (found.failed, found.why, found.limit) == (10, ("status 504",), 83.0)
    assert found.load_cpu == 0.05


def test_capacity_is_all_of_itself() -> None:
    assert Figures.of("closed loop", 64, LOADED, 0.0, 256.0).good_of_capacity == 1.0


def test_the_fewest_connections_with_nearly_the_best_rate_saturate() -> None:
    rates = {8: 700.0, 16: 949.0, 32: 951.0, 64: 1_000.0, 128: 990.0}
    loop = Figures.of("closed loop", 8, LOADED, 0.0, 256.0)
    assert saturates([replace(loop, connections=each, good=good) for each, good in rates.items()]) == 32


def test_loads_follow_from_the_capacity() -> None:
    plans = [plan_of(step, CLOSED, 1_000.0, 32) for step in STEPS]
    opens = [(800, 512), (2_000, 512), (500, 512), (500, 512)]
    assert [(each.rate, each.connections) for each in plans if each.rate] == opens
    assert [each.connections for each in plans if not each.rate] == [160, MOST_CONNECTIONS]
    assert all(each.refusals and each.seconds == 10.0 for each in plans)


def test_no_load_has_more_connections_than_a_server() -> None:
    assert max(plan_of(step, CLOSED, 1.0, 400).connections for step in STEPS) == MOST_CONNECTIONS


def test_one_request_of_five_is_an_order() -> None:
    shop = Mercato.__new__(Mercato)
    shop.products, shop.list_paths = PRODUCTS, tuple(f"/products?after={n}" for n in range(40))
    kinds = Counter(request.creates for request in mixed(shop))
    assert kinds[False] == 4 * kinds[True] > 0


def test_table_names_each_load_and_why_answers_failed() -> None:
    lines = table([Figures.of("closed loop", 64, LOADED, 0.0, 256.0)]).splitlines()
    assert lines[1].startswith("closed loop ")
    assert lines[2].strip() == "status 504"
