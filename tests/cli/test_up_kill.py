"""`kill -9` of any process of `mercato up`, while orders are being placed: nothing is left, no order is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mercato.testing.caller import Buyers
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
    ("1", owner),
    *(pytest.param("3", target, marks=pytest.mark.long) for target in (some_worker, owner)),
]
SERVER_KILLS: list[Any] = [
    *(("1", target) for target in (guard, postmaster)),
    *(pytest.param("3", target, marks=pytest.mark.long) for target in (guard, postmaster)),
]


@pytest.mark.parametrize(("workers", "target"), KILLS)
def test_after_any_process_is_killed_no_process_is_left_and_no_order_is_lost(
    keeper: SharedProcess, workers: str, target: Callable[[Tree], Identity | None]
):
    shop = keeper.shop("--workers", workers)
    with Buyers(shop.caller) as buyers:
        wait_until(lambda: len(buyers.placed) >= ORDERS, BOUND_SECONDS, lambda: str(buyers.statuses))
        process = target(shop.tree())
        assert process is not None
        shop.kill(process)
        shop.assert_gone()
    code = shop.exit_code()
    assert_explained(shop, code, process)
    keeper.end()

    shop = keeper.shop("--workers", workers)
    with shop.caller() as caller:
        buyers.assert_nothing_lost(caller)


def assert_explained(shop: Process, code: int, killed: Identity) -> None:
    """An owner that lives on says in one sentence what happened, and fails."""
    if killed.pid == shop.pid:
        assert code == -9
        return
    assert code == 1, shop.output
    assert len(shop.complaints) == 1, shop.output
    assert "no acknowledged order is lost" in shop.complaints[0]


@pytest.mark.parametrize(("workers", "target"), SERVER_KILLS)
def test_a_database_server_that_is_killed_is_started_again(
    keeper: SharedProcess, workers: str, target: Callable[[Tree], Identity | None]
):
    shop = keeper.shop("--workers", workers)
    with Buyers(shop.caller) as buyers:
        wait_until(lambda: len(buyers.placed) >= ORDERS, BOUND_SECONDS, lambda: str(buyers.statuses))
        before = shop.tree()
        process = target(before)
        assert process is not None
        shop.kill(process)
        shop.wait_for_line("PostgreSQL is running again")
        placed = len(buyers.placed)
        wait_until(lambda: len(buyers.placed) >= placed + ORDERS, BOUND_SECONDS, lambda: str(buyers.statuses))
        after = shop.tree()

    assert (after.owner, after.workers) == (before.owner, before.workers)
    assert after.postmaster not in (before.postmaster, None)
    with shop.caller() as caller:
        buyers.assert_nothing_lost(caller)


@pytest.mark.long
def test_a_database_server_that_dies_again_and_again_ends_the_shop(keeper: SharedProcess, data: Path):
    """The fourth time within a minute: then it has a cause that no start removes."""
    keeper.end()
    with Process(data) as shop:
        shop.ready()
        for death in range(1, 5):
            process = postmaster(shop.tree())
            assert process is not None
            shop.kill(process)
            if death < 4:
                wait_until(lambda d=death: shop.count_lines("PostgreSQL is running again") == d, BOUND_SECONDS)
        shop.assert_gone()
        assert shop.exit_code() == 1
        assert len(shop.complaints) == 1, shop.output
        assert "for the 4th time within a minute" in shop.complaints[0]


@pytest.mark.parametrize("workers", ["1", pytest.param("3", marks=pytest.mark.long)])
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
        buyers.assert_nothing_lost(caller)
        assert caller.read("/health/ready").status == 200


def client_backend(tree: Tree) -> Identity:
    """A process of PostgreSQL that serves one of our connections to orders."""
    for process in tree.backends:
        title = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace")
        if "mercato_orders" in title:
            return process
    raise AssertionError("no connection to orders")
