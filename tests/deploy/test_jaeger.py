"""The trace of an order as a real Jaeger has it: exported by OpenTelemetry's SDK, kept, and read back by its query API.

The trace is the one of `tests/system/tracing`, and so are the checks.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlencode

import pytest
import yaml

from mercato.testing.collector import CollectedSpan
from mercato.testing.command import ROOT
from mercato.testing.process import Process, data_folder
from mercato.testing.served import free_address
from mercato.testing.waiting import BOUND_SECONDS, wait_until
from system.tracing import paid_order
from system.tracing.paid_order import EDGES, EVENTS, FEED, PLACES, REFUSED, REFUSED_EVENTS, TRACE

PROGRAM: Final = "jaeger"
COLLECTOR: Final = ROOT / "deploy/observability/collector.yaml"
MEMORY: Final[Mapping[str, Any]] = {"memory": {"max_traces": 10_000}}
BUYERS: Final = 12

pytestmark = [
    pytest.mark.long,
    pytest.mark.postgres,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc"),
    pytest.mark.skipif(
        not shutil.which(PROGRAM),
        reason="Jaeger was not tried: build it, and put it on the PATH: go mod init tools && "
        "go get -tool github.com/jaegertracing/jaeger/cmd/jaeger@v1.76.0 && go build -o jaeger "
        "github.com/jaegertracing/jaeger/cmd/jaeger",
    ),
]


class Program:
    """Runs Jaeger's program, an OpenTelemetry collector with a storage and a query API. Use it as a context manager."""

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="mercato-jaeger-"))
        file = self._folder / "configuration.yaml"
        file.write_text(yaml.safe_dump(configuration))
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [PROGRAM, "--config", file],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder,
                env={**os.environ, "TMPDIR": str(self._folder)},
            )  # fmt: skip

    def _answers(self) -> bool:
        raise NotImplementedError

    def __enter__(self) -> Self:
        def answers() -> bool:
            assert self._process.poll() is None, (self._folder / "log").read_text()
            try:
                return self._answers()
            except OSError:
                return False

        try:
            wait_until(answers)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder)


class Query:
    """The query API of a Jaeger at an address."""

    def __init__(self, address: str) -> None:
        self._query = address

    def spans(self, trace_id: str) -> Sequence[CollectedSpan]:
        """The spans of a trace as the page of Jaeger gets them; none, if Jaeger has none of it yet."""
        status, answer = self._get(f"/api/traces/{trace_id}")
        return (
            [] if status == http.HTTPStatus.NOT_FOUND else [span for trace in answer["data"] for span in _spans(trace)]
        )

    def found(self, service: str, **tags: str) -> set[str]:
        """The ids of the traces of a service that a search gives."""
        _, answer = self._get(f"/api/traces?{urlencode({'service': service, 'tags': json.dumps(tags), 'limit': 1000})}")
        return {trace["traceID"] for trace in answer["data"]}

    def services(self) -> set[str]:
        return set(self._get("/api/services")[1]["data"])

    def _get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self._query, timeout=BOUND_SECONDS)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def answers(self) -> bool:
        return self._get("/api/services")[0] == http.HTTPStatus.OK


class Jaeger(Program, Query):
    """On loopback. Without another `storage` it is the one that Jaeger has by default: its memory."""

    def __init__(self, storage: Mapping[str, Any] = MEMORY) -> None:
        self.otlp, query = free_address(), free_address()
        Query.__init__(self, query)
        Program.__init__(self, {
            "service": {
                "extensions": ["jaeger_storage", "jaeger_query"],
                "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["jaeger_storage_exporter"]}},
                "telemetry": {"metrics": {"level": "none"}},
            },
            "extensions": {
                "jaeger_storage": {"backends": {"here": storage}},
                "jaeger_query": {
                    "storage": {"traces": "here"},
                    "http": {"endpoint": query},
                    "grpc": {"endpoint": "127.0.0.1:0"},
                    "enable_tracing": False,
                },
            },
            "receivers": {"otlp": {"protocols": {"http": {"endpoint": self.otlp}}}},
            "exporters": {"jaeger_storage_exporter": {"trace_storage": "here"}},
        })  # fmt: skip

    @property
    def environment(self) -> Mapping[str, str]:
        return exporting_to(self.otlp)

    def _answers(self) -> bool:
        return self.answers()


class TailSampler(Program):
    """The collector of `deploy/observability/collector.yaml`, with other addresses."""

    def __init__(self, jaeger: Jaeger) -> None:
        self.otlp = free_address()
        document = yaml.safe_load(COLLECTOR.read_text())
        document["receivers"]["otlp"]["protocols"]["http"]["endpoint"] = self.otlp
        document["exporters"]["otlp_http"]["endpoint"] = f"http://{jaeger.otlp}"
        # Of the collector in Jaeger 1.76, this exporter still has its earlier name.
        document["exporters"]["otlphttp"] = document["exporters"].pop("otlp_http")
        document["service"]["pipelines"]["traces"]["exporters"] = ["otlphttp"]
        document["service"]["telemetry"] = {"metrics": {"level": "none"}}
        super().__init__(document)

    def _answers(self) -> bool:
        host, _, port = self.otlp.partition(":")
        with socket.create_connection((host, int(port))):
            return True


def exporting_to(address: str) -> Mapping[str, str]:
    """What makes a shop record all its traces, and export them at once."""
    return {
        "MERCATO_TRACE_SHARE": "1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }


def _spans(trace: Mapping[str, Any]) -> Iterator[CollectedSpan]:
    for span in trace["spans"]:
        tags = {tag["key"]: tag["value"] for tag in span["tags"]}
        parents = [reference for reference in span["references"] if reference["refType"] == "CHILD_OF"]
        assert len(parents) <= 1, span
        assert all(parent["traceID"] == span["traceID"] for parent in parents), span
        yield CollectedSpan(
            trace_id=span["traceID"],
            span_id=span["spanID"],
            parent_id=parents[0]["spanID"] if parents else "",
            service=trace["processes"][span["processID"]]["serviceName"],
            name=span["operationName"],
            kind=tags["span.kind"],
            is_failed=tags.get("error") is True,
            attributes=tags,
            links=tuple(
                (reference["traceID"], reference["spanID"])
                for reference in span["references"]
                if reference["refType"] == "FOLLOWS_FROM"
            ),
            start_ns=span["startTime"] * 1_000,
            end_ns=(span["startTime"] + span["duration"]) * 1_000,
        )


@pytest.fixture
def jaeger() -> Iterator[Jaeger]:
    with Jaeger() as running:
        yield running


@pytest.mark.parametrize("place", ["together", "nats", "http"])
def test_jaeger_gives_the_traces_of_orders_back_as_they_are(jaeger: Jaeger, place: str) -> None:
    with (
        data_folder() as data,
        Process(data, *PLACES[place], environment=jaeger.environment) as shop,
        shop.ready().caller() as caller,
    ):
        placed = paid_order.place_paid(caller)
        paid_order.wait_for_span(lambda: jaeger.spans(TRACE), FEED, "order.paid")
        entries = paid_order.wait_for_feed(caller, TRACE, *EVENTS)
        paid_order.wait_for_printed(data, placed.json["id"], lambda: jaeger.spans(TRACE))
        refused = paid_order.place_declined(caller)
        paid_order.wait_for_span(lambda: jaeger.spans(REFUSED), "payment.failed to")
        paid_order.wait_for_feed(caller, REFUSED, *REFUSED_EVENTS)
        paid_order.wait_for_printed(data, refused.json["details"]["order_id"], lambda: jaeger.spans(REFUSED))
        wait_for_a_shared_batch(jaeger, shop)
        shop.stop()
    paid_order.assert_is_one_tree(jaeger.spans(TRACE), entries)
    assert jaeger.services() == {name.split()[0] for edge in EDGES for name in edge}
    # Of what Jaeger 1.76 keeps in its memory, it finds nothing by `error=true`, whatever the status of spans is.
    assert_the_failure_is_found(jaeger, **{"error.type": "orders.payment_declined"})


def assert_the_failure_is_found(jaeger: Jaeger, **tags: str) -> None:
    spans = jaeger.spans(REFUSED)
    paid_order.assert_have_their_parents(spans)
    failed = [span for span in spans if span.is_failed]
    assert {paid_order.named(span) for span in failed} == {"gateway orders.settled", "orders orders.settled"}
    assert {span.attributes["otel.status_code"] for span in failed} == {"ERROR"}
    assert {span.attributes["error.type"] for span in failed} == {"orders.payment_declined"}
    for service in ("gateway", "orders"):
        assert jaeger.found(service, **tags) == {REFUSED}


def wait_for_a_shared_batch(jaeger: Jaeger, shop: Process) -> None:
    """Returns once a batch has carried calls of several orders, and is in the trace of each, below its call."""
    numbers = itertools.count(1)

    def is_found() -> bool:
        trace_ids = [f"{number:032x}" for number in itertools.islice(numbers, BUYERS)]
        paid_order.place_side_by_side(shop, trace_ids)
        shared = [span for trace_id in trace_ids for span in jaeger.spans(trace_id) if links_to_others(span)]
        for batch in shared:
            wait_until(lambda batch=batch: is_below_its_calls(jaeger, batch))
        return bool(shared)

    wait_until(is_found)


def links_to_others(batch: CollectedSpan) -> set[tuple[str, str]]:
    return {(trace_id, span_id) for trace_id, span_id in batch.links if trace_id != batch.trace_id}


def is_below_its_calls(jaeger: Jaeger, batch: CollectedSpan) -> bool:
    """Whether each call of another trace, to which the batch has a link, is its parent in that trace."""
    links = links_to_others(batch)
    parents = {
        (span.trace_id, span.parent_id)
        for trace_id in {trace_id for trace_id, _ in links}
        for span in jaeger.spans(trace_id)
        if (span.span_id, span.name, span.kind) == (batch.span_id, batch.name, batch.kind)
    }
    return links <= parents


def test_a_search_for_errors_finds_a_declined_order_alone() -> None:
    with (
        Jaeger({"badger": {"ephemeral": True}}) as jaeger,
        data_folder() as data,
        Process(data, environment=jaeger.environment) as shop,
        shop.ready().caller() as caller,
    ):
        paid_order.place_paid(caller)
        refused = paid_order.place_declined(caller)
        paid_order.wait_for_span(lambda: jaeger.spans(TRACE), FEED, "order.paid")
        paid_order.wait_for_printed(data, refused.json["details"]["order_id"], lambda: jaeger.spans(REFUSED))
        shop.stop()
        assert_the_failure_is_found(jaeger, error="true")


def test_behind_the_collector_jaeger_has_the_whole_trace_of_an_order_that_failed(jaeger: Jaeger) -> None:
    with (
        TailSampler(jaeger) as collector,
        data_folder() as data,
        Process(data, "--split", environment=exporting_to(collector.otlp)) as shop,
        shop.ready().caller() as caller,
    ):
        refused = paid_order.place_declined(caller)
        paid_order.wait_for_printed(data, refused.json["details"]["order_id"], lambda: jaeger.spans(REFUSED))
        shop.stop()
    paid_order.assert_have_their_parents(jaeger.spans(REFUSED))
