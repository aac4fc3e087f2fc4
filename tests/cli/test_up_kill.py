"""`kill -9` of any process of `mercato up`, while orders are being placed: nothing is left, no order is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mercato.testing.caller import Buyers, all_order_ids
from mercato.testing.process import Identity, Process, SharedProcess, Tree
from mercato.testing.waiting import BOUND_SECONDS, wait_until

ORDERS = 40


@pytest.fixture(scope="module")
def keeper(data: Path) -> Iterator[SharedProcess]:
    with SharedProcess(data) as made:
        yield made
        made.stop()


def owner(tree: Tree) -> Identity | None:
    return tree.owner


def guard(tree: Tree) -> Identity | None:
    return tree.guard


def postmaster(tree: Tree) -> Identity | None:
    return tree.postmaster


def some_worker(tree: Tree) -> Identity | None:
    return tree.workers[1]


KILLS: list[Any] = [
    *(("1", victim) for victim in (owner, guard, postmaster)),
    ("3", some_worker),
    *(pytest.param("3", victim, marks=pytest.mark.long) for victim in (owner, guard, postmaster)),
]


@pytest.mark.parametrize(("workers", "victim"), KILLS)
def test_whoever_is_killed_nothing_is_left_and_no_order_is_lost(
    keeper: SharedProcess, workers: str, victim: Callable[[Tree], Identity | None]
):
    shop = keeper.shop("--workers", workers)
    with Buyers(shop.caller) as buyers:
        wait_until(lambda: len(buyers.placed) >= ORDERS, BOUND_SECONDS, lambda: str(buyers.statuses))
        process = victim(shop.tree())
        assert process is not None
        shop.kill(process)
        shop.assert_gone()
    code = shop.exit_code()
    assert_explained(shop, code, process)
    keeper.forget()

    shop = keeper.shop("--workers", workers)
    with shop.caller() as caller:
        assert set(buyers.placed.values()) <= set(all_order_ids(caller))
        # Those without an answer: whatever happened to them, the same key gives one order, and keeps giving it.
        for key in buyers.pending:
            order = caller.order(key)
            assert order.status == 201
            assert caller.order(key).json["id"] == order.json["id"]
        for key, order_id in list(buyers.placed.items())[-3:]:
            assert caller.order(key).json["id"] == order_id
    assert set(buyers.statuses) <= {201, 503, 504}


def assert_explained(shop: Process, code: int, killed: Identity) -> None:
    """An owner that lives on says in one sentence what happened, and fails."""
    if killed.pid == shop.pid:
        assert code == -9
        return
    assert code == 1, shop.output
    assert len(shop.complaints) == 1, shop.output
    assert "no acknowledged order is lost" in shop.complaints[0]


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.long), "3"])
def test_the_death_of_a_database_connection_is_survived(keeper: SharedProcess, workers: str):
    shop = keeper.shop("--workers", workers)
    with Buyers(shop.caller) as buyers:
        wait_until(lambda: len(buyers.placed) >= ORDERS, BOUND_SECONDS)
        before = shop.tree()
        assert before.postmaster is not None
        shop.kill(client_backend(before))
        wait_until(
            lambda: buyers.statuses[503] + buyers.unanswered > 0 or len(buyers.placed) > 5 * ORDERS, BOUND_SECONDS
        )
        placed = len(buyers.placed)
        wait_until(lambda: len(buyers.placed) >= placed + ORDERS, BOUND_SECONDS, lambda: str(buyers.statuses))
        after = shop.tree()

    assert (after.owner, after.guard, after.postmaster, after.workers) == (
        before.owner,
        before.guard,
        before.postmaster,
        before.workers,
    )
    assert set(buyers.statuses) <= {201, 503, 504}
    with shop.caller() as caller:
        assert set(buyers.placed.values()) <= set(all_order_ids(caller))
        assert caller.read("/health/ready").status == 200


def client_backend(tree: Tree) -> Identity:
    """A process of PostgreSQL that serves one of our connections to orders."""
    for process in tree.backends:
        title = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace")
        if "mercato_orders" in title:
            return process
    raise AssertionError("no connection to orders")
