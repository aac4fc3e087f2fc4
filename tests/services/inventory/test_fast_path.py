"""What a batch costs: statements, plans, and updates that write no index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from mercato.chassis.postgres.database import Tx
from mercato.services.inventory import fast_path
from mercato.testing.actors import SERVICE
from mercato.testing.cluster import Cluster
from services.inventory.harness import NONCE, InventoryHarness, commit, release, reserve

ORDERS = 128
PRODUCTS = 2_000
FEW = range(1, 4)


def products_of(order_id: int) -> str:
    return f"p{order_id % 20 + 1}"


async def fill_shelves(harness: InventoryHarness) -> None:
    await harness.stock(**{f"p{i}": 10_000 for i in range(1, 21)})


async def hold(harness: InventoryHarness, first: int, *, for_payment: bool = True) -> list[int]:
    """A batch of new orders; gives their ids."""
    ids = list(range(first, first + ORDERS))
    await harness.reserve_many(*(reserve(i, for_payment=for_payment, **{products_of(i): 1}) for i in ids))
    return ids


# ------------------------------------------------------------------------------------------------------------- updates


async def updates(harness: InventoryHarness) -> Mapping[str, tuple[int, int]]:
    """By table: rows updated, and those of them that changed a column which an index has.

    The others were HOT, or found their page full of row versions that another snapshot still keeps.
    """
    connection = await harness.connection()

    async def counted() -> dict[str, tuple[int, int]]:
        await connection.execute("SELECT pg_stat_clear_snapshot()")
        rows = await connection.fetch(
            "SELECT relname, n_tup_upd, n_tup_upd - n_tup_hot_upd - n_tup_newpage_upd FROM pg_stat_user_tables"
        )
        return {table: (count, indexed) for table, count, indexed in rows}

    # A connection reports what it has counted when it is idle, now and then, or when it ends.
    await harness.database.close()
    await harness.database.open()
    return await counted()


async def test_all_updates_of_stock_are_hot_but_those_that_end_an_expiry(cluster: Cluster):
    async with InventoryHarness(cluster, "local").running(inventory_expire_every_seconds=3600) as harness:
        await fill_shelves(harness)
        before = await updates(harness)
        with harness.acting(SERVICE):
            for n in range(10):
                ids = await hold(harness, n * ORDERS + 1)
                await harness.inventory.commit.many([commit(i) for i in ids])
            waiting = await hold(harness, 10 * ORDERS + 1, for_payment=False)
            await harness.inventory.release.many([release(i) for i in waiting])
        after = await updates(harness)

    made = {name: (after[name][0] - before[name][0], after[name][1] - before[name][1]) for name in after}
    levels, indexed_levels = made["levels"]
    assert levels > 0
    assert indexed_levels == 0
    reservations, indexed_reservations = made["reservations"]
    assert reservations == 11 * ORDERS
    assert indexed_reservations <= ORDERS


# ---------------------------------------------------------------------------------------------------------- statements


@pytest.mark.parametrize("operation", ["reserve", "commit", "release"])
async def test_a_batch_that_fits_is_one_statement_and_its_events(
    cluster: Cluster, operation: str, monkeypatch: pytest.MonkeyPatch
):
    async with InventoryHarness(cluster, "local").running(inventory_expire_every_seconds=3600) as harness:
        await fill_shelves(harness)
        ids = await hold(harness, 1)
        run: list[str] = []
        fetch = Tx.fetch

        async def noting(tx: Tx, row: Any, sql: str, *values: object) -> Any:
            run.append(sql)
            return await fetch(tx, row, sql, *values)

        monkeypatch.setattr(Tx, "fetch", noting)
        with harness.acting(SERVICE):
            if operation == "reserve":
                await hold(harness, 1_001)
            elif operation == "commit":
                await harness.inventory.commit.many([commit(i) for i in ids])
            else:
                await harness.inventory.release.many([release(i) for i in ids])
        monkeypatch.undo()

    assert run == [fast_path.RESERVE_ALL if operation == "reserve" else fast_path.END_ALL_HELD]


# --------------------------------------------------------------------------------------------------------------- plans

TYPES = {
    "reserve": "bigint[], bigint[], boolean[], integer[], integer[], bigint[], integer[], bigint[], integer[], float8, "
    "integer[]",
    "end": "bigint[], bigint[], text",
}
STATEMENTS = {"reserve": fast_path.RESERVE_ALL, "end": fast_path.END_ALL_HELD}


def array(values: Any) -> str:
    return "'{" + ",".join(map(str, values)) + "}'"


def execute(statement: str, ids: range) -> str:
    nonces = array([NONCE] * len(ids))
    if statement == "end":
        return f"EXECUTE tried ({array(ids)}, {nonces}, 'committed')"
    places, ones, new = array(range(1, len(ids) + 1)), array([1] * len(ids)), array(i + 1_000_000 for i in ids)
    values = (new, nonces, array(["t"] * len(ids)), places, places, array(ids), ones, array(ids), ones, "900", ones)
    return f"EXECUTE tried ({', '.join(values)})"


async def fill(connection: Any, ids: range) -> None:
    await connection.execute(
        """
        INSERT INTO levels (product_id, on_hand, reserved, version)
        SELECT i, 10, 1, 1 FROM generate_series($1::bigint, $2::bigint) AS i
        """,
        ids.start,
        ids.stop - 1,
    )
    await connection.execute(
        """
        INSERT INTO reservations (order_id, nonce, state, product_ids, quantities)
        SELECT i, $3, 'held', ARRAY[i], ARRAY[1] FROM generate_series($1::bigint, $2::bigint) AS i
        """,
        ids.start,
        ids.stop - 1,
        NONCE,
    )


@pytest.mark.parametrize("statement", STATEMENTS)
@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
async def test_a_batch_reads_its_own_rows_alone_also_when_it_was_planned_for_small_tables(
    cluster: Cluster, statement: str, mode: str
):
    async with InventoryHarness(cluster, "local").running() as harness:
        connection = await harness.connection()
        for setting in ("enable_seqscan", "enable_hashjoin", "enable_mergejoin", "jit"):
            await connection.execute(f"SET {setting} = off")  # as the service's own connections do
        transaction = connection.transaction()
        await transaction.start()
        await fill(connection, FEW)
        await connection.execute("ANALYZE levels, reservations")
        await connection.execute(f"SET plan_cache_mode = {mode}")
        await connection.execute(f"PREPARE tried ({TYPES[statement]}) AS {STATEMENTS[statement]}")
        await connection.fetch(f"EXPLAIN {execute(statement, FEW)}")
        await fill(connection, range(FEW.stop, PRODUCTS))
        text = await connection.fetchval(
            f"EXPLAIN (ANALYZE, FORMAT JSON) {execute(statement, range(PRODUCTS - ORDERS, PRODUCTS))}"
        )
        [level] = await connection.fetch("SELECT reserved, version FROM levels WHERE product_id = $1", PRODUCTS - 1)
        await connection.execute("DEALLOCATE tried")
        await transaction.rollback()

    assert tuple(level) == ((2, 2) if statement == "reserve" else (0, 2))
    # Looked for, locked and changed, each row at most three times.
    assert rows_read(json.loads(text)[0]["Plan"]) <= 6 * ORDERS, text


def rows_read(node: dict[str, Any]) -> int:
    """Of tables, by all nodes below."""
    own = node["Actual Rows"] + node.get("Rows Removed by Filter", 0) if "Scan" in node["Node Type"] else 0
    own = own if "Relation Name" in node else 0
    return int(own * node["Actual Loops"]) + sum(map(rows_read, node.get("Plans", ())))
