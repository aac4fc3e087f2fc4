"""Who sees what."""

from __future__ import annotations

import pytest

from mercato.chassis.contract import Actor
from mercato.contracts.roles import may_see


@pytest.mark.parametrize(
    ("actor", "seen"),
    [
        (Actor("customer", 7), True),
        (Actor("customer", 8), False),
        (Actor("staff", 8), True),
        (Actor("staff"), True),
        (Actor("service"), True),
    ],
)
def test_customers_see_only_what_is_theirs(actor: Actor, seen: bool):
    assert may_see(actor, 7) is seen
