"""The arithmetic of `make bench` and the shape of what it writes. No load is sent, and no time is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from bench.throughput import document, figures, plan, report
from bench.throughput.figures import (
    Audit,
    CommitLatency,
    Cost,
    Counted,
    FixedRate,
    Flooded,
    Latency,
    Machine,
    Observed,
    Raw,
    Reading,
    Result,
    TableCount,
)
from bench.throughput.flood import check
from bench.throughput.load import LoadFailed, Plan, checked
from bench.throughput.plan import CONNECTIONS, MOST_CONNECTIONS, Product

ROOT: Final = Path(__file__).parents[2]
LATEST: Final = ROOT / "bench" / "results" / "latest.json"
KEYS: Final = {"ratios", "cpu_us", "rows", "raw", "machine"}
RATIOS: Final = {"placed", "paid", "one_product", "p50_one_connection", "browse"}


def reading(
    subject: plan.Subject, case: plan.Case, rate: float, *, n: int = 0, c: int = MOST_CONNECTIONS, p50: float = 1.0
) -> Reading:
    return Reading(
        round=n,
        subject=subject,
        case=case,
        connections=c,
        answers=100,
        answers_per_second=rate,
        rate=rate,
        p50_us=p50,
        p99_us=2 * p50,
        kinds_p50_us={},
        load_cpu_us=10.0,
    )


def table(inserted: int, updated: int = 0, hot_updated: int = 0, deleted: int = 0, indexes: int = 0) -> TableCount:
    return TableCount(inserted=inserted, updated=updated, hot_updated=hot_updated, deleted=deleted, indexes=indexes)


def counted(tables: dict[str, TableCount], *, wal: int = 0, disk: int = 0, commits: int = 0) -> Counted:
    return Counted(wal_bytes=wal, disk_bytes={"orders": disk}, commits={"orders": commits}, tables=tables)


# -------------------------------------------------------------------------------------------------------------- ratios


def test_ratios_are_paired_by_round_so_that_a_slow_round_changes_none():
    readings = [
        *(reading("reference", "place", rate, n=n) for n, rate in enumerate((1_000.0, 100.0, 2_000.0))),
        *(reading("mercato", "place", rate, n=n) for n, rate in enumerate((3_000.0, 300.0, 6_000.0))),
        *(reading("mercato", "pay", rate, n=n) for n, rate in enumerate((500.0, 60.0, 1_400.0))),
        *(reading("mercato", "one_product", rate, n=n) for n, rate in enumerate((500.0, 30.0, 1_400.0))),
    ]

    ratios = figures.ratios(readings)

    assert ratios.placed == 3.0
    assert ratios.paid == 0.6  # the median of 0.5, 0.6 and 0.7
    assert ratios.one_product == 1.0  # by paid orders of Mercato that are spread, not by the reference
    assert figures.ratios_by_connections(readings)["paid"] == {str(MOST_CONNECTIONS): (0.5, 0.6, 0.7)}


def test_ratios_take_the_most_connections_and_the_latency_of_one():
    readings = [
        *(reading("reference", "place", 10.0 * c, c=c, p50=100.0 * c) for c in CONNECTIONS),
        *(reading("mercato", "place", 20.0 * c if c > 1 else 5.0, c=c, p50=80.0 * c * c) for c in CONNECTIONS),
    ]

    ratios = figures.ratios(readings)

    assert (ratios.placed, ratios.p50_one_connection) == (2.0, 0.8)
    assert figures.p50_us_one_connection(readings) == {"reference": 100.0, "placed": 80.0}


def test_ratios_without_a_reference_are_null():
    readings = [reading("mercato", "place", 3_000.0), reading("mercato", "pay", 2_000.0)]

    assert figures.ratios(readings) == figures.Ratios(None, None, None, None, None)
    assert figures.ratios([]) == figures.Ratios(None, None, None, None, None)


def test_every_second_round_goes_backwards():
    assert plan.steps_of_round(1) == plan.steps_of_round(0)[::-1]
    assert plan.steps_of_round(2) == plan.steps_of_round(0)


# ---------------------------------------------------------------------------------------------------------------- cost


def test_cpu_time_is_the_difference_by_name_and_processes_that_began_meanwhile_count():
    before, after = {1: 5_000, 2: 1_000}, {1: 9_000, 2: 1_000, 3: 700, 4: 100}

    assert figures.spent(before, after, {1: "orders", 2: "users", 3: "orders"}) == {"orders": 4_700, "(other)": 100}


def test_cpu_of_an_order_is_that_of_the_median_load_and_its_parts_add_up():
    costs = [
        Cost(orders=1_000, shop={"up": shop_us * 1_000_000}, postgres={"orders": 100_000_000, "users": 20_000_000})
        for shop_us in (900, 300, 350)
    ]

    cpu = figures.cpu(costs)

    assert (cpu.total, cpu.shop_total, cpu.postgres_total) == (470.0, 350.0, 120.0)
    assert (cpu.shop, cpu.postgres) == ({"up": 350.0}, {"orders": 100.0, "users": 20.0})


def test_rows_are_differences_for_each_order_and_hot_updates_make_no_index_entries():
    before = counted({"orders.orders": table(100, 50, 25, indexes=3)}, wal=1_000, disk=8_192, commits=5)
    after = counted(
        {
            "orders.orders": table(300, 450, 225, indexes=3),
            "orders.lines": table(400, indexes=1),
            "orders.rare": table(1, indexes=9),
        },
        wal=201_000,
        disk=8_192 + 400_000,
        commits=45,
    )

    rows = figures.rows(before, after, 200)

    assert (rows.inserted, rows.updated, rows.hot_updated, rows.deleted) == (3.005, 2.0, 1.0, 0.0)
    assert rows.index_entries == pytest.approx((200 * 3 + 200 * 3 + 400 + 9) / 200)
    assert (rows.wal_bytes, rows.disk_bytes, rows.commits) == (1_000.0, 2_000.0, 0.2)
    assert list(rows.tables) == ["orders.lines", "orders.orders"], "a table with less than a row in 100 is left out"
    assert rows.tables["orders.orders"].index_entries == 6.0


# ---------------------------------------------------------------------------------------------------------------- load


def answered(**changes: Any) -> figures.Loaded:
    us = Latency(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    good = figures.Loaded(
        requests=10,
        good=10,
        distinct_ids=10,
        failures=(),
        began_at=1.0,
        seconds=1.0,
        latency_us=us,
        kinds_us={"order": us},
        load_cpu_us=1.0,
    )
    return msgspec.structs.replace(good, **changes)


PRODUCTS: Final = tuple(Product(n, f"S-{n}", f"P {n}", "", 100, "c") for n in range(1, 101))
ORDERS: Final = Plan("127.0.0.1:1", 1, 1.0, plan.requests("mercato", "pay", PRODUCTS, ()))


def test_a_load_of_good_answers_is_accepted():
    assert checked(ORDERS, answered()).good == 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"good": 9, "failures": ("status 503",)}, "1 of 10 answers are wrong: status 503"),
        ({"failures": ("connection reset",)}, "0 of 10 answers are wrong: connection reset"),
        ({"requests": 0, "good": 0, "distinct_ids": 0}, "none came"),
        ({"distinct_ids": 9}, "10 answers name 9 different orders"),
    ],
)
def test_a_wrong_missing_or_repeated_answer_fails_the_load(changes: dict[str, Any], said: str):
    with pytest.raises(LoadFailed, match=said):
        checked(ORDERS, answered(**changes))


def test_requests_name_a_payment_only_where_they_are_paid_and_a_total_only_for_the_reference():
    pay = json.loads(plan.requests("mercato", "pay", PRODUCTS, ())[0].body)
    place = json.loads(plan.requests("mercato", "place", PRODUCTS, ())[0].body)
    reference = json.loads(plan.requests("reference", "place", PRODUCTS, ())[0].body)

    assert pay == {"user_id": 1, "product_id": 1, "payment_method": "sandbox:ok"}
    assert place == {"user_id": 1, "product_id": 1}
    assert reference == {"user_id": 1, "product_id": 1, "amount": 100}


def test_orders_are_spread_over_all_products_or_are_all_for_one():
    def product_ids(case: plan.Case) -> set[int]:
        return {json.loads(r.body)["product_id"] for r in plan.requests("mercato", case, PRODUCTS, ())}

    assert product_ids("pay") == {product.id for product in PRODUCTS}
    assert product_ids("one_product") == {1}


def test_browsing_lists_searches_and_gets_equally_often():
    requests = plan.requests("mercato", "browse", PRODUCTS, [f"/products?after={n}" for n in range(50)])

    kinds = [request.kind for request in requests]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(("list", "search", "get"), plan.PAGES)
    assert len({request.path for request in requests}) == len(requests)


# --------------------------------------------------------------------------------------------------------------- shape


def a_result() -> Result:
    readings = (
        reading("reference", "place", 1_000.0),
        reading("mercato", "place", 3_000.0),
        reading("mercato", "pay", 1_500.0),
    )
    us = Latency(1_000.0, 900.0, 1_500.0, 2_000.0, 3_000.0, 9_000.0)
    costs = {"placed": (Cost(10, {"up": 2_000_000}, {"orders": 1_000_000}),)}
    return Result(
        quick=True,
        commit="0123456789ab",
        ratios=figures.ratios(readings),
        cpu_us={name: figures.cpu(each) for name, each in costs.items()},
        rows={"placed": figures.rows(counted({}), counted({"orders.orders": table(10, indexes=2)}, wal=100), 10)},
        raw=Raw(
            readings=readings,
            ratios_by_connections=figures.ratios_by_connections(readings),
            p50_us_one_connection=figures.p50_us_one_connection(readings),
            fixed_rate=(FixedRate("mercato", "pay", 750.0, us),),
            commit_latency=(CommitLatency("mercato", "pay", 4, 1, 5.0, 90.0),),
            lone_commit_us=5_200.0,
            costs=costs,
            audit=Audit(invariants=35, violated=(), rows=1_000, orders=10),
        ),
        machine=Machine("2026-01-01", "a processor", 2, 16.0, "Linux x86_64", "3.11", "18.4", None, 120.0, 0.1),
    )


def test_the_document_has_the_keys_that_programs_read():
    written = json.loads(report.document(a_result()))

    assert written.keys() >= KEYS
    assert written["ratios"].keys() == RATIOS
    assert written["ratios"]["placed"] == 3.0
    assert written["ratios"]["browse"] is None
    assert written["cpu_us"]["placed"]["total"] == 300.0
    assert written["rows"]["placed"]["inserted"] == 1.0
    assert msgspec.json.decode(report.document(a_result()), type=Result) == a_result()


def test_the_table_shows_ratios_rates_costs_and_the_audit():
    said = "\n".join(report.table(a_result()))

    for words in (
        "placed with stock held / bare inserts       3.00   at least 2.5",
        "list, search, get                              -",
        "CPU us an order, placed: 300 = 200 of the shop + 100 of PostgreSQL",
        "orders.orders                          1.00     0.00   0.00     0.00           2.00",
        "35 invariants over 10 orders (1000 rows): all hold",
    ):
        assert words in said


def test_an_audit_that_is_violated_is_shown():
    raw = msgspec.structs.replace(a_result().raw, audit=Audit(35, ("M3 (2)",), 1_000, 10))

    assert "VIOLATED: M3 (2)" in "\n".join(report.table(msgspec.structs.replace(a_result(), raw=raw)))


def test_the_committed_result_is_a_whole_run_that_holds_no_path():
    text = LATEST.read_text()

    result = msgspec.json.decode(text, type=Result)

    assert {r.connections for r in result.raw.readings} == set(CONNECTIONS)
    assert result.cpu_us.keys() == result.rows.keys() >= {"placed", "paid"}
    assert result.raw.audit.violated == ()
    assert "/" not in text


# ------------------------------------------------------------------------------------------------------------ document


def test_figures_of_two_runs_are_written_side_by_side_between_the_marks():
    before = a_result()
    after = msgspec.structs.replace(before, ratios=msgspec.structs.replace(before.ratios, placed=4.5))

    text = "\n".join(document.lines(before, after))

    assert "| placed with stock held / bare inserts | at least 2.5 | 3.00 | 4.50 |" in text
    assert "| CPU, us | - | 300 | 300 | - | - |" in text
    assert "| pay | 4 | 1 | 90 | 90 |" in text
    assert "| placed with stock held / bare inserts | at least 2.5 | 3.00 | - |" in "\n".join(
        document.lines(before, document.unmeasured(before))
    )
    page = f"above\n{document.BEGIN}\nold\n{document.END}\nbelow\n"
    assert document.replaced(page, text) == f"above\n{document.BEGIN}\n{text}\n{document.END}\nbelow\n"


def test_a_page_without_marks_is_refused():
    with pytest.raises(document.CannotWrite, match="has no place for figures"):
        document.replaced("a page", "figures")


# ------------------------------------------------------------------------------------------------------------ observed


def test_the_report_has_the_median_ratio_with_and_without_observation():
    rounds = tuple(Observed(n, "pay", 128, 1_000.0 * ratio, 1_000.0) for n, ratio in enumerate((0.5, 0.96, 1.1)))
    result = a_result()
    result = msgspec.structs.replace(result, raw=msgspec.structs.replace(result.raw, observed=rounds))

    [line] = [line for line in report.table(result) if line.startswith("mercato pay; at least 0.9")]
    assert line.split()[-5:] == ["128", "960", "1000", "0.96", "(0.50-1.10)"]


UNOBSERVED = """
import prometheus_client
from bench.throughput.unobserved import stop_counting
stop_counting()
from mercato.chassis.observability.telemetry import Telemetry
telemetry = Telemetry()
telemetry.counter("mercato_a", "about").inc()
telemetry.gauge("mercato_b", "about", ["of"], workers="livesum").labels("it").set(7)
telemetry.histogram("mercato_c_seconds", "about").observe(0.1)
telemetry.counter("mercato_a", "about").add(1)
print(telemetry.own_exposition())
"""


def test_a_shop_without_observation_has_its_metrics_and_counts_nothing():
    done = subprocess.run([sys.executable, "-c", UNOBSERVED], cwd=ROOT, capture_output=True, text=True, check=True)

    samples = [line.rpartition(" ") for line in done.stdout.splitlines() if line and not line.startswith("#")]
    values = {name: float(value) for name, _, value in samples}
    assert {"mercato_a_total", 'mercato_b{of="it"}', "mercato_c_seconds_count"} <= values.keys()
    assert set(values.values()) == {0.0}


# ------------------------------------------------------------------------------------------------------------ sign-ins


def test_sign_ins_that_are_no_flood_or_not_refused_as_they_must_be_fail_the_run():
    check(Counter({200: 3, 401: 3, 429: 100}))
    for answers in ({200: 3}, {401: 3}, {429: 100}, {}, {200: 3, 401: 3, 503: 1}):
        with pytest.raises(LoadFailed):
            check(Counter(answers))


def test_the_report_has_the_median_ratio_of_browsing_beside_sign_ins_by_connections():
    floods = tuple(Flooded(n, 32, 100.0, 100.0 * ratio, 50, 50) for n, ratio in enumerate((9.0, 2.0, 1.0)))
    result = a_result()
    result = msgspec.structs.replace(result, raw=msgspec.structs.replace(result.raw, flooded=floods))

    [line] = [line for line in report.table(result) if line.startswith("p50; at most")]

    assert line.split()[-4:] == ["32", "0.10", "0.20", "2.00"]
