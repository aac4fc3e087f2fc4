"""Each round scans the newest page, and one of the older pages in their order."""

from __future__ import annotations

import pytest

from mercato.chassis.hosting.table_scan import TableScan


class Table:
    """Pages 1 to `pages`; `scanned` are those that were scanned."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.scanned: list[int] = []
        self.failing = False

    async def scan_page(self, cursor: int | None) -> int | None:
        page = 1 if cursor is None else cursor + 1
        if self.failing:
            raise RuntimeError("the database is away")
        self.scanned.append(page)
        return page if page < self.pages else None


@pytest.mark.parametrize(
    ("pages", "scanned"),
    [(1, [1, 1, 1, 1]), (2, [1, 2, 1, 2, 1, 2, 1, 2]), (4, [1, 2, 1, 3, 1, 4, 1, 2])],
)
async def test_each_page_is_scanned_again_and_again(pages: int, scanned: list[int]):
    table = Table(pages)
    scan = TableScan(table.scan_page)

    for _ in range(4):
        await scan.run_round()

    assert table.scanned == scanned


async def test_the_round_after_a_failed_one_scans_the_same_page():
    table = Table(3)
    scan = TableScan(table.scan_page)
    await scan.run_round()
    table.failing = True
    with pytest.raises(RuntimeError):
        await scan.run_round()
    table.failing = False

    await scan.run_round()

    assert table.scanned == [1, 2, 1, 3]
