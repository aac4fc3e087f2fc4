"""The inventory service on a fresh database, with a catalogue that the test owns."""

from __future__ import annotations

import pytest

from services.inventory.harness import InventoryHarness


@pytest.fixture
def harness_class() -> type[InventoryHarness]:
    return InventoryHarness
