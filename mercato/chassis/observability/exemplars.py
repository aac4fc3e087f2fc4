"""Exemplars: the trace of one of the values that a bucket of a histogram has counted, in the OpenMetrics format.

They lead from a board, such as that of slow requests, to a trace. Only a sampled trace is one: a collector has it.

prometheus-client keeps exemplars with the values of a process, and drops them where workers share a folder of metrics.
So they are kept here, and added to what is shown: a worker shows the values of all workers, and its own exemplars.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from mercato.chassis.contract.context import SAMPLED, Span

Bucket = tuple[frozenset[tuple[str, str]], float]
"""Of a histogram: with these labels, up to this bound."""


class Exemplars:
    """The latest exemplar of each bucket, of this process.

    They are noted by the event loop while a thread shows them: what can grow is looked up there, and never iterated.
    """

    def __init__(self) -> None:
        self._bounds: dict[str, Sequence[float]] = {}
        self._latest: dict[str, dict[Bucket, Exemplar]] = {}

    def declare(self, histogram: str, bounds: Sequence[float]) -> None:
        """`bounds` ascend, and do not contain infinity."""
        self._bounds[histogram] = (*bounds, float("inf"))

    def note(self, histogram: str, labels: Mapping[str, str], value: float, span: Span) -> None:
        """Remembers the first sampled trace of `span` beside `value`, which the histogram has counted."""
        trace_id = next((place.trace_id for place in span.places if place.flags & SAMPLED), None)
        if trace_id is None:
            return
        bounds = self._bounds[histogram]
        bucket = frozenset(labels.items()), bounds[bisect_left(bounds, value)]
        ids = {"trace_id": trace_id, "span_id": f"{span.id:016x}"}
        self._latest.setdefault(histogram, {})[bucket] = Exemplar(ids, value, time.time())

    def added_to(self, families: Iterable[Metric]) -> Iterator[Metric]:
        """The families, with the exemplars of their buckets."""
        for family in families:
            latest = self._latest.get(family.name)
            if latest is not None:
                family.samples = [
                    sample._replace(exemplar=latest.get(_bucket(sample.labels)))
                    if sample.name.endswith("_bucket")
                    else sample
                    for sample in family.samples
                ]
            yield family


def _bucket(labels: Mapping[str, str]) -> Bucket:
    others = frozenset((name, value) for name, value in labels.items() if name != "le")
    return others, float(labels["le"])


class WithExemplars(Collector):
    """What `shown` collects, with exemplars."""

    def __init__(self, shown: Collector, exemplars: Exemplars) -> None:
        self._shown = shown
        self._exemplars = exemplars

    def collect(self) -> Iterator[Metric]:
        return self._exemplars.added_to(self._shown.collect())
