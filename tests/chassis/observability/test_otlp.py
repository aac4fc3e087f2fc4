"""The export by OpenTelemetry's SDK, as a collector gets it."""

from __future__ import annotations

import sys
from collections.abc import Generator

import pytest

from mercato.chassis.contract.context import SAMPLED
from mercato.chassis.hosting.variables import SettingsError
from mercato.chassis.observability.otlp import OtlpExporter
from mercato.chassis.observability.recent_traces import EndedSpan
from mercato.chassis.observability.telemetry import Telemetry
from mercato.cli.tracing import traced
from mercato.testing.collector import Collector

TRACE, OTHER = "4bf92f3577b34da6a3ce929d0e0e4736", "0af7651916cd43dd8448eb211c80319c"
SECOND = 1_000_000_000


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Generator[Collector]:
    with Collector() as collector:
        for name, value in collector.environment.items():
            monkeypatch.setenv(name, value)
        yield collector


def span(kind: str = "server", *, failure: str = "", parent_id: int = 0) -> EndedSpan:
    return EndedSpan(
        TRACE, 0x0102030405060708, parent_id, "orders.place", "orders", kind, SECOND, 2 * SECOND, SAMPLED, failure,
        {"mercato.batch.size": 2, "mercato.partial": True}, ((OTHER, 9), (TRACE, 0xA)),
    )  # fmt: skip


def test_a_span_arrives_as_it_was(collector: Collector) -> None:
    exporter = OtlpExporter("1.2.3", "an-instance")
    exporter.export(span(parent_id=0xA))
    exporter.close()
    [found] = collector.spans()
    assert (found.trace_id, found.span_id, found.parent_id) == (TRACE, "0102030405060708", "000000000000000a")
    assert (found.service, found.name, found.kind) == ("orders", "orders.place", "server")
    assert (found.start_ns, found.end_ns, found.is_failed) == (SECOND, 2 * SECOND, False)
    assert found.attributes == {"mercato.batch.size": 2, "mercato.partial": True}
    assert found.links == ((OTHER, f"{9:016x}"),), "no link to the parent"


@pytest.mark.parametrize("kind", ["internal", "server", "client", "producer", "consumer"])
def test_each_kind_arrives(collector: Collector, kind: str) -> None:
    exporter = OtlpExporter("1.2.3", "an-instance")
    exporter.export(span(kind))
    exporter.close()
    assert [(found.kind, found.parent_id) for found in collector.spans()] == [(kind, "")]


def test_a_failure_is_an_error_with_its_code(collector: Collector) -> None:
    exporter = OtlpExporter("1.2.3", "an-instance")
    exporter.export(span(failure="orders.not_found"))
    exporter.close()
    [found] = collector.spans()
    assert found.is_failed
    assert found.attributes["error.type"] == "orders.not_found"


def test_a_process_whose_collector_is_away_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    exporter = OtlpExporter("1.2.3", "an-instance")
    for _ in range(3_000):
        exporter.export(span())
    exporter.close()


def end_request(telemetry: Telemetry) -> None:
    span = telemetry.tracing.request("GET /orders", "gateway", TRACE, 0, asked=False, started=0.0)
    assert span is not None
    span.end()


def test_the_last_spans_are_exported_when_a_process_ends(collector: Collector) -> None:
    telemetry = Telemetry()
    with traced(telemetry, 1.0, is_on=True):
        end_request(telemetry)
    assert [found.name for found in collector.spans()] == ["GET /orders"]


def test_without_an_address_nothing_is_exported_and_traces_are_kept() -> None:
    telemetry = Telemetry()
    with traced(telemetry, 1.0, is_on=True):
        end_request(telemetry)
    assert len(telemetry.tracing.recent.trace(TRACE)) == 1


def test_tracing_that_is_off_makes_no_spans(collector: Collector) -> None:
    telemetry = Telemetry()
    with traced(telemetry, 1.0, is_on=False):
        assert not telemetry.tracing.is_on
    assert collector.spans() == []


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_an_address_without_the_extra_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=rf"{name} is set.*mercato\[otel\]"), traced(Telemetry(), 0.0, is_on=True):
        pass
