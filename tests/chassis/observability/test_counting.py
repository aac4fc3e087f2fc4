"""Each count that is pending is added to the values of the library once, by a thread or by the event loop."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram

from mercato.chassis.observability.counting import MOST_PENDING
from mercato.chassis.observability.telemetry import Telemetry

BOUNDS = (0.5, 1.0, 2.0)
COUNTED = 50_000


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


def test_what_is_shown_has_all_that_was_counted(telemetry: Telemetry):
    counter = telemetry.counter("mercato_things", "about", ["of"]).labels("it")
    gauge = telemetry.gauge("mercato_busy", "about", workers="livesum")
    value = telemetry.registry.get_sample_value

    counter.inc()
    counter.add(0.5)
    counter.inc(2)
    gauge.inc()
    gauge.add(4)
    gauge.add(-1)
    gauge.dec()
    assert value("mercato_things_total", {"of": "it"}) == 3.5
    assert value("mercato_busy") == 3
    counter.inc()
    gauge.dec(2)
    assert value("mercato_things_total", {"of": "it"}) == 4.5
    assert value("mercato_busy") == 1
    assert value("mercato_busy") == 1


def test_a_gauge_that_is_set_has_that_value_whatever_was_pending(telemetry: Telemetry):
    gauge = telemetry.gauge("mercato_level", "about", workers="livesum")

    gauge.inc(5)
    gauge.set(2)
    gauge.inc()

    assert telemetry.registry.get_sample_value("mercato_level") == 3


@pytest.mark.parametrize("size", [1, MOST_PENDING - 1, MOST_PENDING, MOST_PENDING + 1, 3 * MOST_PENDING + 7])
def test_a_histogram_has_the_buckets_that_the_library_would_have(telemetry: Telemetry, size: int):
    values = [(0.0, 0.5, 0.7, 1.0, 1.5, 2.0, 2.1)[n % 7] for n in range(size)]
    registry = CollectorRegistry()
    theirs = Histogram("mercato_seconds", "about", buckets=BOUNDS, registry=registry)
    ours = telemetry.histogram("mercato_seconds", "about", buckets=BOUNDS)
    for value in values:
        theirs.observe(value)
        (ours.observe if len(ours.pending) % 2 else ours.add)(value)

    assert samples(telemetry.registry) == pytest.approx(samples(registry))


def test_a_list_is_added_up_when_it_is_long(telemetry: Telemetry):
    """A process whose metrics are never shown must not keep each count."""
    counter = telemetry.counter("mercato_things", "about")
    for _ in range(10 * MOST_PENDING + 1):
        counter.inc()

    assert len(counter.pending) == 1
    assert telemetry.registry.get_sample_value("mercato_things_total") == 10 * MOST_PENDING + 1


def test_no_count_is_lost_or_added_twice_while_threads_show_them(telemetry: Telemetry):
    counter = telemetry.counter("mercato_things", "about", ["of"]).labels("it")
    histogram = telemetry.histogram("mercato_seconds", "about", buckets=BOUNDS)
    ended = threading.Event()

    def show() -> None:
        while not ended.is_set():
            telemetry.settle()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=show) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(COUNTED):
            counter.inc()
            histogram.add(0.7)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)

    assert telemetry.registry.get_sample_value("mercato_things_total", {"of": "it"}) == COUNTED
    assert telemetry.registry.get_sample_value("mercato_seconds_count") == COUNTED
    assert telemetry.registry.get_sample_value("mercato_seconds_bucket", {"le": "0.5"}) == 0


class SlowToRead(list[float]):
    """Lets other threads run between the copy of what is pending and its removal."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        time.sleep(0.05)
        return found


def test_two_threads_that_settle_at_once_add_each_count_once(telemetry: Telemetry):
    counter = telemetry.counter("mercato_things", "about")
    counter.pending = SlowToRead([1.0] * 7)
    threads = [threading.Thread(target=counter.settle) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert telemetry.registry.get_sample_value("mercato_things_total") == 7


SHARED = """
import asyncio, contextlib
from mercato.chassis.observability.telemetry import Telemetry

async def main():
    telemetry = Telemetry()
    sharing = asyncio.create_task(telemetry.settle_for_ever())
    counter = telemetry.counter("mercato_things", "about", ["of"]).labels("it")
    counter.inc()
    while counter.pending:
        await asyncio.sleep(0.01)
    print("settled", flush=True)
    counter.inc(2)
    sharing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await sharing
    print(len(counter.pending), flush=True)

asyncio.run(main())
"""
SHOWN = """
from mercato.chassis.observability.telemetry import Telemetry
print(Telemetry().exposition()[0].decode())
"""


def test_a_process_settles_again_and_again_and_at_its_end(tmp_path: Path):
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    sharing, shown = (
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
        ).stdout
        for program in (SHARED, SHOWN)
    )

    assert sharing.split() == ["settled", "0"]
    assert 'mercato_things_total{of="it"} 3.0' in shown.splitlines()


def samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    return {(s.name, s.labels.get("le", "")): s.value for family in registry.collect() for s in family.samples}
