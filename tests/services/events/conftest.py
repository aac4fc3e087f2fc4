"""The events service on a fresh database."""

from __future__ import annotations

import pytest

from services.events.harness import FeedHarness


@pytest.fixture
def harness_class() -> type[FeedHarness]:
    return FeedHarness


@pytest.fixture
def feed(harness: FeedHarness) -> FeedHarness:
    return harness
