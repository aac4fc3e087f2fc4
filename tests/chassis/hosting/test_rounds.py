"""Rounds look at the newest page each time, and at one of the older ones after the other."""

from __future__ import annotations

import pytest

from mercato.chassis.hosting.rounds import Rounds


class Table:
    """Pages 1 to `pages`; `looked` are those that were looked at."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.looked: list[int] = []
        self.failing = False

    async def look(self, place: int | None) -> int | None:
        page = 1 if place is None else place + 1
        if self.failing:
            raise RuntimeError("the database is away")
        self.looked.append(page)
        return page if page < self.pages else None


@pytest.mark.parametrize(
    ("pages", "looked"),
    [(1, [1, 1, 1, 1]), (2, [1, 2, 1, 2, 1, 2, 1, 2]), (4, [1, 2, 1, 3, 1, 4, 1, 2])],
)
async def test_each_page_is_looked_at_again_and_again(pages: int, looked: list[int]):
    table = Table(pages)
    rounds = Rounds(table.look)

    for _ in range(4):
        await rounds.round()

    assert table.looked == looked


async def test_a_round_that_fails_is_made_up_for():
    table = Table(3)
    rounds = Rounds(table.look)
    await rounds.round()
    table.failing = True
    with pytest.raises(RuntimeError):
        await rounds.round()
    table.failing = False

    await rounds.round()

    assert table.looked == [1, 2, 1, 3]
