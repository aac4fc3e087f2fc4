"""The capacity plan: what it is calibrated with, what it has to predict, parts of the simulation, and what it plans."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import simpy

from bench.capacity import __main__ as command, compare, costs, document, inputs, limits, load, machine, plan, tables
from bench.capacity.assumptions import Question
from bench.capacity.compare import Comparison, Figure
from bench.capacity.inputs import KINDS, BatchSizes, Kind
from bench.capacity.report import Report, report
from bench.capacity.shop import Machine, split, together
from bench.throughput.document import CannotWrite
from bench.throughput.figures import Result
from bench.throughput.plan import MOST_CONNECTIONS
from mercato import topology
from mercato.contracts.orders import Orders

ROOT: Final = Path(__file__).parents[2]
LATEST: Final = inputs.read()
MESSAGE_US: Final = 150.0
"""What a message costs where a test calibrates nothing."""
QUESTION: Final = Question(10_000.0)


def cost(kind: Kind = "placed", *, apart: bool = False) -> costs.Costs:
    return (costs.split if apart else costs.together)(LATEST, kind, MESSAGE_US)


@pytest.fixture(scope="module")
def found() -> Report:
    """Of the committed result, as the page has it."""
    return report(LATEST, document.QUESTIONS)


# ------------------------------------------------------------------------------------------------ the committed result


def test_the_simulation_predicts_what_was_measured_within_the_stated_bounds(found: Report) -> None:
    assert found.violations == ()
    assert sum(not one.is_calibrated for one in found.comparison.figures) == 25
    assert {one.bound for one in found.comparison.figures} == {compare.BOUND, compare.HALF_BOUND}


def test_what_was_calibrated_comes_out_again(found: Report) -> None:
    calibrated = [one for one in found.comparison.figures if one.is_calibrated]
    assert [one.name for one in calibrated] == ["p50, 1 connection", *["CPU of an order, 128 connections"] * 2]
    assert abs(calibrated[0].deviation) < 0.005
    assert max(abs(one.deviation) for one in calibrated) < 0.05


def test_the_page_has_the_tables_of_the_committed_result(found: Report) -> None:
    text = document.DOCUMENT.read_text()
    written = document.replaced(text, found, LATEST.commit)
    assert written == text, "run .venv/bin/python -m bench.capacity --document docs/capacity.md"


def test_the_figures_of_a_split_shop_are_those_of_the_page_about_performance() -> None:
    page = (ROOT / "docs/performance.md").read_text()
    section = page.partition("### Each service as a process of its own")[2].partition("\n### ")[0]
    rows = {row.split(" | ")[0].strip("| "): row for row in section.splitlines() if row.startswith("|")}
    us, databases = inputs.SPLIT_SERVICES_US, inputs.SPLIT_DATABASES_US
    (one_placed, apart_placed), (one_paid, apart_paid) = (inputs.SPLIT_TOTALS_US[kind] for kind in KINDS)

    assert f"| {one_placed:.0f}, {one_paid:.0f} us |" in rows["one process"]
    apart = rows["split over NATS"]
    hop_ms = f"{inputs.HOP_US / 1e3:.2f} ms"
    assert f"| {apart_placed:.0f}, {tables.whole(round(apart_paid))} us | {hop_ms} |" in apart
    assert all(f"({ratio:.2f};" in apart for ratio in inputs.SPLIT_RATIOS.values())
    assert rows["`nats`"] == f"| `nats` | {inputs.SPLIT_NATS_US:.0f} |"
    assert rows["`gateway`"] == f"| `gateway` | {us['gateway']:.0f} |"
    for name, own in databases.items():
        assert rows[f"`{name}`, its database"] == f"| `{name}`, its database | {us[name]:.0f}, {own:.0f} |"
    others = ", ".join(f"{us[name]:.0f}" for name in ("products", "sandbox", "users"))
    assert f"| {others}, {inputs.SPLIT_OTHER_DATABASES_US:.0f} |" in section


def test_every_service_has_a_cost_and_calls_of_the_simulation_are_calls_of_the_shop() -> None:
    assert set(inputs.DATABASES) == set(topology.SERVICES) == {*costs.DATABASE.values(), "events"}
    assert inputs.SPLIT_SERVICES_US.keys() == {"gateway", *topology.SERVICES}
    for name in costs.CALLED:
        caller = "payments" if name == "charge" else "orders"
        assert costs.DATABASE[name] in {operation.service for operation in topology.CALLS[caller]}


# ------------------------------------------------------------------------------------------- a model that does not hold


@pytest.mark.parametrize("simulated", [131.0, 69.0])
def test_a_prediction_beyond_its_bound_is_a_sentence_with_both_figures(simulated: float) -> None:
    figures = tuple(Figure("paid", "rate", "/s", 100.0, value, compare.BOUND) for value in (129.0, simulated))

    assert Comparison(MESSAGE_US, figures).violations() == [
        f"paid, rate: {simulated:.0f} /s simulated, 100 measured, {simulated - 100:+.0f}% where the bound is 30%"
    ]


def faster(factor: float) -> Result:
    """A result with few figures, in which placed orders have so many times the rate that was measured."""
    readings = tuple(
        msgspec.structs.replace(one, rate=one.rate * (factor if one.case == "place" else 1.0))
        for one in LATEST.raw.readings
        if one.connections in (1, MOST_CONNECTIONS)
    )
    raw = msgspec.structs.replace(LATEST.raw, readings=readings, fixed_rate=(), commit_latency=())
    return msgspec.structs.replace(LATEST, raw=raw)


def test_a_model_that_does_not_reproduce_the_measured_plans_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "latest.json", tmp_path / "page.md"
    file.write_bytes(msgspec.json.encode(faster(2.0)))
    page.write_text("a page")

    assert command.main(["--results", str(file), "--document", str(page), "--json"]) == command.WRONG
    said = capsys.readouterr()
    written = msgspec.json.decode(said.out, type=Report)
    assert "the simulation does not reproduce placed, rate, 128 connections:" in said.err
    assert len(written.violations) == said.err.count("\n") == 2  # over 1 connection and over 128
    assert (written.limits, written.plans, written.changed) == ((), (), ())
    assert page.read_text() == "a page"


# ---------------------------------------------------------------------------------------------- parts of the simulation


def ends(env: simpy.Environment, *flows: machine.Flow) -> list[float]:
    """When each of them ends."""
    ended = [0.0] * len(flows)

    def noting(place: int, flow: machine.Flow) -> machine.Flow:
        yield from flow
        ended[place] = float(env.now)

    env.run(until=env.all_of([env.process(noting(place, flow)) for place, flow in enumerate(flows)]))
    return ended


def commit(env: simpy.Environment, wal: machine.Wal, at: float) -> machine.Flow:
    yield env.timeout(at)
    yield wal.commit()


def test_commits_share_a_flush_that_has_not_begun_and_wait_for_one_that_has() -> None:
    env = simpy.Environment()
    wal = machine.Wal(env, flush_us=100.0)
    assert ends(env, *(commit(env, wal, at) for at in (0.0, 10.0, 99.0))) == [100.0, 200.0, 200.0]
    assert (wal.commits, wal.flushes) == (3, 2)


def test_a_flush_that_waits_takes_the_commits_that_come_meanwhile_along() -> None:
    env = simpy.Environment()
    wal = machine.Wal(env, flush_us=100.0, delay_us=5_000.0)
    assert ends(env, commit(env, wal, 0.0), commit(env, wal, 4_999.0)) == [5_100.0, 5_100.0]
    assert wal.flushes == 1


def test_cores_are_shared_in_turns_and_cpu_is_counted_by_name() -> None:
    env = simpy.Environment()
    cores = machine.Cores(env, 1, seed=1)
    long, brief = ends(env, cores.run("long", 10_000.0), cores.run("brief", 500.0))
    assert brief < 2 * machine.SLICE_US
    assert long == pytest.approx(math.fsum(cores.spent_us.values()))
    assert cores.spent_us["brief"] == pytest.approx(500.0, rel=machine.JITTER)


def test_an_event_loop_does_one_piece_of_work_after_another() -> None:
    env = simpy.Environment()
    loop = machine.Loop(env, machine.Cores(env, 2, seed=1), "one")

    def work() -> machine.Flow:
        yield loop.run(1_000.0)

    first, second = ends(env, work(), work())
    assert second - first > 1_000.0 * (1 - machine.JITTER)


# ---------------------------------------------------------------------------------------------------- a simulated shop


def loaded(of: costs.Costs, *, flush_us: float = 100.0) -> load.Load:
    return load.Load(of, together(), Machine(2, flush_us), load_us=30.0)


def test_the_same_load_gives_the_same_figures() -> None:
    first, second = (loaded(cost("paid")).closed(32, 0.2) for _ in range(2))
    assert first == second


def test_batches_grow_with_connections_and_an_order_costs_less() -> None:
    outcomes = [loaded(cost()).closed(connections, 0.3) for connections in (1, 32, 128)]

    assert outcomes[0].batch_sizes["place"] == 1.0
    assert outcomes[2].batch_sizes["place"] > 40.0
    for few, many in itertools.pairwise(outcomes):
        assert many.batch_sizes["place"] > few.batch_sizes["place"]
        assert many.answers_per_second > few.answers_per_second
        assert many.total_us < few.total_us


def test_no_more_than_two_batches_of_placing_are_in_flight() -> None:
    """Of 60 orders while commits are slow, 20 are in each of the two, and 20 wait."""
    outcome = loaded(cost(), flush_us=5_000.0).closed(60, 2.0)
    assert Orders.place.lanes == 2
    assert outcome.batch_sizes["place"] == pytest.approx(20.0, abs=1.0)


def test_a_paid_order_takes_seven_transactions_that_write_and_a_placed_one_three() -> None:
    written = {kind: sum(step.messages == 2 for step in cost(kind).steps.values()) for kind in KINDS}
    assert written == {"placed": 3, "paid": 7}


def test_four_processes_are_slower_than_one_where_commits_with_events_follow_each_other() -> None:
    slow = Machine(None, 5_000.0)
    one, four = (load.Load(cost(), together(n), slow, load_us=30.0).closed(128, 0.5).rate(3.0) for n in (1, 4))
    assert four < one


def test_calls_stay_in_a_process_that_has_the_service_and_leave_one_that_has_not() -> None:
    inside = load.Load(cost("paid"), together(2), Machine(None, 100.0)).random(200.0, 0.5)
    apart = load.Load(cost("paid", apart=True), split(), Machine(None, 100.0)).random(200.0, 0.5)
    assert inside.calls == 0.0
    assert 3.0 < apart.calls <= plan.CALLS
    assert apart.cpu_us.keys() >= {"gateway", "nats", *topology.SERVICES}


def test_work_that_is_not_done_in_time_is_an_overload() -> None:
    with pytest.raises(load.Overloaded, match="are done 30 s later"):
        loaded(costs.slower(cost("paid"), 200.0)).fixed(2_000.0, 1.0)


# ---------------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("kind", KINDS)
def test_costs_of_batches_as_measured_add_up_to_the_measured_cpu(kind: Kind) -> None:
    of, batches, cpu = cost(kind), BatchSizes.of(LATEST, kind), LATEST.cpu_us[kind]
    sizes = {name: batches.placing if name in costs.PLACING else batches.checkout for name in of.steps}
    steps = of.steps.values()
    shop = math.fsum(one.shop_us + one.messages * of.message_shop_us / sizes[one.name] for one in steps)
    own = math.fsum(one.database_us + one.messages * of.message_database_us / sizes[one.name] for one in steps)
    # What databases took while it was counted, although the order has no step in them, is not in the model.
    used = {*(one.database for one in steps), "events"}
    unused = math.fsum(us for name, us in inputs.databases_us(cpu).items() if name not in used)

    ratio = of.message_shop_us / of.message_database_us
    assert own + of.feed_database_us + unused == pytest.approx(cpu.postgres_total, rel=0.01)
    assert shop + of.gateway_us + of.feed_shop_us + unused * ratio == pytest.approx(cpu.shop_total, rel=0.01)


def test_sizes_of_batches_follow_from_the_rows_of_outboxes_and_of_the_feed() -> None:
    """Batches of 50 for placing; of 200 for checkout, each with four rows in outboxes, one of them of orders."""
    before = LATEST.rows["paid"].tables
    inserted = {"orders.outbox": 1 / 50 + 1 / 200, "events.feed": 1 / 50 + 4 / 200}
    changed = {name: msgspec.structs.replace(before[name], inserted=rows) for name, rows in inserted.items()}
    rows = msgspec.structs.replace(LATEST.rows["paid"], tables={**before, **changed})
    batches = BatchSizes.of(msgspec.structs.replace(LATEST, rows={**LATEST.rows, "paid": rows}), "paid")

    assert (batches.placing, batches.checkout) == (pytest.approx(50.0), pytest.approx(200.0))


def test_further_lines_cost_more_and_one_line_costs_what_was_measured() -> None:
    one, five = (costs.with_lines(cost("paid"), LATEST, lines) for lines in (1, 5))
    assert one == cost("paid")
    assert five.steps["reserve"].database_us > 1.5 * one.steps["reserve"].database_us
    assert five.steps["products"].shop_us == pytest.approx(5 * one.steps["products"].shop_us, abs=0.01)
    assert five.steps["charge"] == one.steps["charge"]


# ----------------------------------------------------------------------------------------------------- limits, the plan


def limits_of(question: Question) -> Sequence[limits.Limit]:
    return limits.limits(LATEST, question, limits.of_paid_orders(LATEST, question, MESSAGE_US))


def test_limits_come_in_the_order_in_which_they_are_reached() -> None:
    rates = [limit.per_second for limit in limits_of(QUESTION)]
    assert rates == sorted(rates)
    assert {limit.scope for limit in limits_of(QUESTION)} == {"order shard", "inventory shard", "server"}


@pytest.mark.parametrize(
    ("change", "lowered"),
    [({"commit_ms": 5.0}, 3), ({"lines": 5}, 3), ({"slower": 2.0}, 5)],
    ids=["slow commits: the locks", "lines: stock, WAL and cores", "slow cores: all but the WAL"],
)
def test_a_limit_falls_with_what_it_is_made_of(change: dict[str, Any], lowered: int) -> None:
    before = {limit.name: limit.per_second for limit in limits_of(QUESTION)}
    after = {limit.name: limit.per_second for limit in limits_of(msgspec.structs.replace(QUESTION, **change))}
    assert sum(after[name] < before[name] for name in before) == lowered
    assert all(after[name] <= before[name] for name in before)


@pytest.mark.parametrize(("needed", "zones"), list(itertools.product((1, 2, 3, 7, 100), (1, 2, 3, 5))))
def test_enough_are_left_when_a_zone_is_lost(needed: int, zones: int) -> None:
    running = plan.with_spare(needed, zones)
    assert running - (1 if zones == 1 else running // zones) >= needed
    assert zones == 1 or running % zones == 0


def test_processes_machines_and_shards_carry_their_load_at_the_use_that_was_asked_for(found: Report) -> None:
    for one in (*found.plans, plan.plan(LATEST, Question(50_000.0, use=0.3), MESSAGE_US)):
        use, rate, left = one.question.use, one.question.orders_per_second, 2 / 3  # one of three zones is lost
        assert all(service.cores_busy <= use * service.processes * left for service in one.services)
        busy = math.fsum(service.cores_busy for service in one.services)
        assert busy <= use * one.question.cores * one.service_machines * left
        assert math.fsum(database.primaries for database in one.databases) <= one.primaries
        for scope, shards in (("order shard", one.order_shards), ("inventory shard", one.inventory_shards)):
            most = min(limit.per_second for limit in limits_of(one.question) if limit.scope == scope)
            assert rate / shards <= use * most


def test_reads_of_a_small_shop_are_answered_by_its_primary_and_of_a_large_one_by_replicas(found: Report) -> None:
    assert [(one.primaries, one.read_replicas > 0, one.order_shards > 1) for one in found.plans[:2]] == [
        (1, False, False),
        (2, True, True),
    ]


# --------------------------------------------------------------------------------------------------- commands and pages


WRONG_INPUTS: Final = {
    "--use 2": "argument --use: a number from 0.05 to 0.95 is needed, not '2'",
    "--use nan": "argument --use: a number from 0.05 to 0.95 is needed, not 'nan'",
    "--orders-per-second 0": "argument --orders-per-second: a number from 1 to 1e+07 is needed, not '0'",
    "--cores 1.5": "argument --cores: a whole number from 1 to 1024 is needed, not '1.5'",
    "--lines many": "argument --lines: a whole number from 1 to 200 is needed, not 'many'",
    "--zones 0": "argument --zones: a whole number from 1 to 9 is needed, not '0'",
    "--colour": "unrecognized arguments: --colour",
    "--document page.md --use 0.3": "the page has the default plan: --document goes with --results and --json alone",
}


@pytest.mark.parametrize("arguments", WRONG_INPUTS)
def test_wrong_input_is_one_sentence(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments.split())
    said = capsys.readouterr()
    assert (ended.value.code, said.out, said.err) == (2, "", f"bench.capacity: {WRONG_INPUTS[arguments]}\n")


def broken_results(folder: Path) -> Iterator[tuple[Path, str]]:
    yield folder / "none.json", "cannot be read: No such file or directory"
    (folder / "page.json").write_text("# A page")
    yield folder / "page.json", "is no result of make bench: JSON is malformed"
    unread = msgspec.structs.replace(LATEST.raw, readings=())
    for name, changed, sentence in (
        ("costs", msgspec.structs.replace(LATEST, cpu_us={}), "lacks the cost of an order that is placed"),
        ("rounds", msgspec.structs.replace(LATEST, raw=unread), "lacks place over 1 connections"),
    ):
        (folder / f"{name}.json").write_bytes(msgspec.json.encode(changed))
        yield folder / f"{name}.json", sentence


def test_a_result_that_is_not_there_or_not_whole_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, sentence in broken_results(tmp_path):
        assert command.main(["--results", str(file)]) == 2
        said = capsys.readouterr()
        assert f"{file} {sentence}" in said.err
        assert (said.out, said.err.count("\n")) == ("", 1)


def test_programs_get_the_whole_report(found: Report) -> None:
    assert msgspec.json.decode(msgspec.json.encode(found), type=Report) == found


def test_tables_stand_between_the_marks_and_the_rest_stays(found: Report) -> None:
    written = document.replaced(f"above\n{document.BEGIN}\nold\n{document.END}\nbelow\n", found, "0123")
    assert written.startswith(f"above\n{document.BEGIN}\n### Measured and simulated\n")
    assert written.endswith(f"of commit 0123.\n{document.END}\nbelow\n")
    assert document.replaced(written, found, "0123") == written
    with pytest.raises(CannotWrite, match="has no place for the tables"):
        document.replaced("a page", found, "0123")


def test_tables_for_people_are_aligned_and_have_all_plans(found: Report) -> None:
    headers: dict[str, str] = {}
    for table in tables.tables(found):
        title, _, headers[table.title], *rows, empty = table.text()
        assert (title, empty) == (table.title.upper(), "")
        assert len({len(line) for line in (headers[table.title], *rows)}) == 1
    assert headers["Machines"].split()[-5:] == ["100", "10", "000", "500", "000"]


def test_a_number_has_three_digits_that_count() -> None:
    shown = {0.0: "0", 0.004: "< 0.01", 0.0149: "0.01", 1.234: "1.23", 12.34: "12.3", 1_234_567.0: "1 230 000"}
    assert {value: tables.number(value) for value in shown} == shown
