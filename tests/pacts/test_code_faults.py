"""Faults in the code of providers, in a copy of the package: the verification finds each, at the pacts it breaks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from system.mutation.copies import FAILED, is_of_copy, run_pytest, take_snapshot

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT: Final = Path(__file__).parents[2]
SECONDS_MAX: Final = 500.0

FAULTS: Final = {
    "mercato/contracts/inventory.py": (
        "class Reservation(Message):",
        'class Reservation(Message, rename={"state": "status"}):',
    ),
    "mercato/contracts/products.py": ('code="products.archived"', 'code="products.not_for_sale"'),
    "mercato/contracts/refunds.py": (
        "class OrderRefunded(Message):",
        'class OrderRefunded(Message, rename={"refund_id": "id"}):',
    ),
    "mercato/gateway/routes/orders.py": (
        '        path="/orders/{id}/cancel",',
        '        path="/orders/{id}/cancellation",',
    ),
    "tests/pacts/states.py": ('            "a charge is captured": self._charge_captured,\n', ""),
}
"""What is replaced: a field of an answer, a code of an error, a field of an event, a route; and a state is gone."""

BROKEN: Final = {"orders-inventory", "orders-products", "users-orders", "storefront-mercato", "payments-sandbox"}


@pytest.fixture
def folder() -> Iterator[Path]:
    """Outside the folders of pytest, which the user of PostgreSQL cannot pass."""
    with tempfile.TemporaryDirectory(prefix="mercato-test-") as made:
        yield Path(made)


async def test_faults_in_the_code_of_providers_break_the_pacts_of_their_consumers(folder: Path):
    copy = take_snapshot(ROOT, folder)
    for name, (before, after) in FAULTS.items():
        file = copy / name
        text = file.read_text()
        assert text.count(before) == 1, f"{name} has no longer {before!r} in one place"
        file.write_text(text.replace(before, after))

    kept = "test_the_provider_keeps_the_pact and not release"
    run = await run_pytest(copy, ["tests/pacts/test_providers.py", "-k", kept], SECONDS_MAX)

    assert is_of_copy(run, copy)
    assert run.exit_code == FAILED, run.output
    failed = {
        name.rpartition("[")[2].rstrip("]") for name, seen in run.recorded.tests.items() if seen.failed_in == "call"
    }
    assert failed == BROKEN, run.output
    assert len(run.recorded.tests) > len(BROKEN)
