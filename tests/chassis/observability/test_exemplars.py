"""Exemplars: which traces a bucket names, and to whom they are shown."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Exemplar

from mercato.chassis.contract.context import KEPT, SAMPLED, Place, Span
from mercato.chassis.observability.telemetry import MULTIPROCESS_VARIABLE, Telemetry
from mercato.chassis.observability.tracing import Tracing

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
SECONDS = "mercato_wait_seconds"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def span_in(*places: Place) -> Span:
    return Span("GET /orders", "gateway", "server", Tracing(), places)


def observed(telemetry: Telemetry, value: float, span: Span, *, place: str = "here") -> None:
    histogram = telemetry.histogram(SECONDS, "Waits.", ["place"], (0.1, 1.0))
    histogram.labels(place).observe(value)
    telemetry.exemplars.note(SECONDS, {"place": place}, value, span)


def shown(text: str) -> Mapping[tuple[str, str], Exemplar]:
    """By place and bound."""
    return {
        (sample.labels["place"], sample.labels["le"]): sample.exemplar
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.exemplar is not None
    }


def test_a_bucket_names_the_latest_sampled_trace_of_its_values() -> None:
    telemetry = Telemetry()
    for trace_id, value in (("1" * 32, 0.2), (TRACE, 1.0), ("2" * 32, 7.0)):
        observed(telemetry, value, span_in(Place(trace_id, SAMPLED | KEPT, 0)))
    text, content_type = telemetry.exposition(OPENMETRICS)
    found = shown(text.decode())
    assert content_type.startswith("application/openmetrics-text")
    assert {bound: (each.labels["trace_id"], each.value) for (_, bound), each in found.items()} == {
        "1.0": (TRACE, 1.0),
        "+Inf": ("2" * 32, 7.0),
    }
    assert all(each.timestamp for each in found.values())


def test_labels_have_exemplars_of_their_own() -> None:
    telemetry = Telemetry()
    observed(telemetry, 0.5, span_in(Place("1" * 32, SAMPLED, 0)), place="here")
    observed(telemetry, 0.5, span_in(Place("2" * 32, SAMPLED, 0)), place="there")
    found = shown(telemetry.exposition(OPENMETRICS)[0].decode())
    assert {place: each.labels["trace_id"] for (place, _), each in found.items()} == {
        "here": "1" * 32,
        "there": "2" * 32,
    }


def test_a_trace_that_no_collector_has_is_no_exemplar() -> None:
    telemetry = Telemetry()
    observed(telemetry, 0.5, span_in(Place("1" * 32, KEPT, 0)))
    observed(telemetry, 0.5, span_in())
    assert shown(telemetry.exposition(OPENMETRICS)[0].decode()) == {}


def test_a_batch_names_a_trace_that_is_sampled() -> None:
    telemetry = Telemetry()
    observed(telemetry, 0.5, span_in(Place("1" * 32, KEPT, 0), Place(TRACE, SAMPLED | KEPT, 0)))
    assert shown(telemetry.exposition(OPENMETRICS)[0].decode())["here", "1.0"].labels["trace_id"] == TRACE


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain; version=0.0.4"])
def test_a_reader_that_does_not_ask_gets_the_older_format(accept: str) -> None:
    telemetry = Telemetry()
    observed(telemetry, 0.5, span_in(Place(TRACE, SAMPLED, 0)))
    text, content_type = telemetry.exposition(accept)
    assert content_type.startswith("text/plain; version=0.0.4")
    assert TRACE not in text.decode()


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads take turns all the time, and so also between two steps of a loop."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_switches")
def test_exemplars_are_noted_while_a_thread_shows_them() -> None:
    telemetry, span = Telemetry(), span_in(Place(TRACE, SAMPLED, 0))
    observed(telemetry, 0.5, span)
    families = list(telemetry.registry.collect())
    with ThreadPoolExecutor(1) as collector:
        showing = [collector.submit(lambda: [*telemetry.exemplars.added_to(families)]) for _ in range(200)]
        for number in range(5_000):
            telemetry.exemplars.note(SECONDS, {"place": f"place {number}"}, 0.5, span)
        assert all(each.result() for each in showing)


WORKER = f"""
from mercato.chassis.contract.context import SAMPLED, Place, Span
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.observability.tracing import Tracing
telemetry = Telemetry()
telemetry.histogram("{SECONDS}", "Waits.", ["place"], (0.1, 1.0)).labels("here").observe(0.5)
span = Span("GET /orders", "gateway", "server", Tracing(), [Place("{TRACE}", SAMPLED, 0)])
telemetry.exemplars.note("{SECONDS}", {{"place": "here"}}, 0.5, span)
print(telemetry.exposition("{OPENMETRICS}")[0].decode(), end="")
"""


def test_workers_that_share_their_metrics_show_exemplars_too(tmp_path: Path) -> None:
    environment = {MULTIPROCESS_VARIABLE: str(tmp_path)}
    _, text = [
        subprocess.run(
            [sys.executable, "-c", WORKER], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert shown(text)["here", "1.0"].labels["trace_id"] == TRACE
    assert f'{SECONDS}_bucket{{le="1.0",place="here"}} 2.0 #' in text
