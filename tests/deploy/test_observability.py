"""The files of `deploy/observability/`: what they name exists, and each alert has a runbook."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
import yaml
from prometheus_client.parser import text_string_to_metric_families

from mercato.operations.audit.background import Background
from mercato.testing.cluster import Cluster
from mercato.testing.command import ROOT
from mercato.testing.shop import Shop

FOLDER: Final = ROOT / "deploy/observability"
BOARDS: Final = sorted((FOLDER / "dashboards").glob("*.json"))
RUNBOOKS: Final = ROOT / "docs/operations.md"
METRIC: Final = re.compile(r"\b((?:mercato|process|rpc_server|http_server|db_client)_[a-z_]+)\b(?!\s*=)")
SPLIT_ALONE: Final = frozenset(
    {"mercato_rpc_retried_total", "mercato_rpc_retries_refused_total", "mercato_rpc_untrusted_total"}
)
"""Metrics of processes that call each other."""
COLUMNS: Final = 24

promtool: Final = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool was not tried: install it: apt-get install prometheus"
)


def rules() -> Sequence[Mapping[str, Any]]:
    document = yaml.safe_load((FOLDER / "rules.yml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def panels(board: Path) -> Sequence[Mapping[str, Any]]:
    return json.loads(board.read_text())["panels"]


def queries(board: Path) -> Iterator[str]:
    for panel in panels(board):
        for target in panel["targets"]:
            yield target["expr"]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def metrics(cluster: Cluster) -> AsyncGenerator[Mapping[str, Collection[str]]]:
    """The names of the samples of a running shop, with the labels of each."""
    shop = await Shop.start(cluster, "local")
    Background("", {}, shop.harness.host.telemetry, every_seconds=1)  # which `mercato up` adds
    found: dict[str, set[str]] = {name: set() for name in SPLIT_ALONE}
    await shop.post("/orders", {"user_id": 1, "product_id": 100, "payment_method": "sandbox:ok"})
    text = (await shop.get("/metrics")).text
    for family in text_string_to_metric_families(text):
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        for ending in endings:
            found.setdefault(family.name + ending, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    yield found
    await shop.close()


def unknown(query: str, metrics: Mapping[str, Collection[str]]) -> list[str]:
    names = METRIC.findall(query)
    assert names or "up{" in query, query
    labels = {label for each in metrics.values() for label in each}
    return [name for name in names if name not in metrics and name not in labels]


@pytest.mark.asyncio(loop_scope="session")
async def test_every_query_asks_for_metrics_that_exist(metrics: Mapping[str, Collection[str]]):
    asked = {rule["alert"]: [rule["expr"]] for rule in rules()} | {board.name: [*queries(board)] for board in BOARDS}
    wrong = {name: [bad for query in each for bad in unknown(query, metrics)] for name, each in asked.items()}
    assert {name: bad for name, bad in wrong.items() if bad} == {}


def test_a_query_for_a_metric_that_does_not_exist_is_found():
    known = {"mercato_http_requests_total": {"route"}}
    assert unknown("sum by (route) (rate(mercato_http_requests_total[5m]))", known) == []
    assert unknown("rate(mercato_http_requests[5m]) > mercato_lost", known) == ["mercato_http_requests", "mercato_lost"]


def test_each_alert_has_a_severity_a_summary_and_a_runbook_of_its_own():
    headings = re.findall(r"^### (Mercato\w+)$", RUNBOOKS.read_text(), re.MULTILINE)
    names = [rule["alert"] for rule in rules()]
    assert sorted(headings) == sorted(names)
    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "runbook"}, rule["alert"]
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


@promtool
@pytest.mark.parametrize("arguments", [("check", "rules", "rules.yml"), ("check", "config", "prometheus.yml")])
def test_prometheus_takes_the_files(arguments: tuple[str, ...]):
    done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("board", BOARDS, ids=[board.stem for board in BOARDS])
def test_a_board_has_panels_side_by_side_each_with_a_sentence(board: Path):
    document = json.loads(board.read_text())
    assert document["uid"].startswith("mercato-")
    [source] = document["templating"]["list"]
    assert source["type"] == "datasource"
    ids = [panel["id"] for panel in panels(board)]
    assert len(set(ids)) == len(ids)
    covered: set[tuple[int, int]] = set()
    for panel in panels(board):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["targets"], panel["title"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= COLUMNS, panel["title"]
        assert not cells & covered, panel["title"]
        covered |= cells


def test_the_pipeline_of_the_collector_has_only_parts_that_are_configured():
    document = yaml.safe_load((FOLDER / "collector.yaml").read_text())
    for pipeline in document["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= set(document[kind]), kind
