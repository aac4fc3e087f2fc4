"""The traces of the last hour: found by what they are about, and bounded."""

from __future__ import annotations

from mercato.chassis.observability.recent_traces import KEPT_SECONDS, EndedSpan, RecentTraces


def span(trace: int, *, about: int = 0, name: str = "orders.place") -> EndedSpan:
    return EndedSpan(f"{trace:032x}", 7, 0, name, "orders", "server", 1, 2, about=about, attributes={"a": 1})


def test_the_spans_of_a_trace_are_kept_as_they_were() -> None:
    recent = RecentTraces()
    spans = [span(1, name="a"), span(2), span(1, name="b", about=1001)]
    for each in spans:
        recent.add(each)
    assert recent.trace(f"{1:032x}") == [spans[0], spans[2]]
    assert recent.trace("unknown") == []


def test_traces_are_found_by_what_they_are_about() -> None:
    recent = RecentTraces()
    for each in (span(1, about=1001), span(1, about=1001), span(2, about=1002), span(3, about=1001), span(4)):
        recent.add(each)
    assert recent.about(1001) == [f"{1:032x}", f"{3:032x}"]
    assert recent.about(1003) == []


def test_the_oldest_traces_make_room() -> None:
    limit = 100_000
    recent = RecentTraces(limit)
    for n in range(1_000):
        recent.add(span(n, about=n))
        assert recent.size_bytes <= limit
    kept = [n for n in range(1_000) if recent.trace(f"{n:032x}")]
    assert kept == [*range(1_000 - len(kept), 1_000)]
    assert 50 < len(kept) < 200
    assert [n for n in range(1_000) if n and recent.about(n)] == kept


def test_the_bound_holds_for_one_endless_trace() -> None:
    recent = RecentTraces(10_000)
    for _ in range(1_000):
        recent.add(span(1, about=1001))
        assert recent.size_bytes <= 10_000
    recent.add(span(2))
    assert recent.trace(f"{2:032x}")


def test_a_trace_is_forgotten_after_an_hour() -> None:
    now = 0.0
    recent = RecentTraces(now=lambda: now)
    recent.add(span(1, about=1001))
    now = KEPT_SECONDS
    recent.add(span(2))
    assert recent.about(1001)
    now += 1
    recent.add(span(3))
    assert recent.about(1001) == []
    assert [len(recent.trace(f"{n:032x}")) for n in (1, 2, 3)] == [0, 1, 1]
