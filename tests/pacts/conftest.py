"""The pacts that the tests of a consumer write."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pacts.book import PactBook


@pytest.fixture(scope="module")
def book(request: pytest.FixtureRequest) -> Iterator[PactBook]:
    """The pacts of the consumer that the module names in `CONSUMER`; compared with the committed ones at its end."""
    made = PactBook(request.module.CONSUMER)
    failed_before = request.session.testsfailed
    yield made
    chosen = {
        item.originalname
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module
    }
    every = {name for name in vars(request.module) if name.startswith("test_")}
    made.close(is_complete=chosen == every and request.session.testsfailed == failed_before)
