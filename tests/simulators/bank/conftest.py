"""The bank on a fresh database; a test calls as a service does."""

from __future__ import annotations

import pytest

from simulators.bank.harness import BankHarness


@pytest.fixture
def harness_class() -> type[BankHarness]:
    return BankHarness


@pytest.fixture
def bank(harness: BankHarness) -> BankHarness:
    return harness
