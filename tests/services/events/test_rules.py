"""How the feed names things."""

from __future__ import annotations

from mercato.services.events import rules


def test_an_event_is_named_by_its_source_and_its_id():
    assert rules.event_id("orders", 17) == "orders:17"


def test_a_subject_is_named_by_its_kind_and_its_id():
    assert rules.subject("order", 1001) == "order 1001"
