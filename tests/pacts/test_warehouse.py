"""What a warehouse needs of the feed of events, which it reads from the API or from the stream."""

from __future__ import annotations

from typing import Final

import pytest

from pacts.book import PactBook
from pacts.examples import exactly
from pacts.messages import EventExample, consume
from pacts.rest import PROVIDER
from pacts.rpc import given
from pacts.warehouse import TASKS, task_of

CONSUMER: Final = "warehouse"


@pytest.mark.parametrize("type_", TASKS)
def test_the_warehouse_has_a_task_for_an_event(book: PactBook, type_: str):
    done: list[str] = []

    def handle(body: bytes) -> None:
        done.append(task_of(body).what)

    example = EventExample(
        provider=PROVIDER,
        description=f"{type_} in the feed",
        content={"id": "orders:69632", "type": exactly(type_), "data": {"order_id": 7_605_000}},
        states=(given("an entry of the feed", type=type_),),
    )
    consume(book, example, handle)
    assert done[0] == TASKS[type_]
