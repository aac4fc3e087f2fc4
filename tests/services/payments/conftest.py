"""Payments and the bank, each on a fresh database; a test calls as a service does."""

from __future__ import annotations

import pytest

from services.payments.harness import PaymentsHarness


@pytest.fixture
def harness_class() -> type[PaymentsHarness]:
    return PaymentsHarness
