"""Each alert of `deploy/observability/rules.yml` fires in Prometheus when what it watches breaks in a running shop.

`breaking.py` has what breaks the shop, `prometheus.py` the Prometheus with shorter times. In a shop that is well, no
alert fires.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.breaking import SCENARIOS, SETTINGS, Kind, Repeating, Scenario, look, register
from deploy.prometheus import HELD, Prometheus, UnlistedTime, accelerated, rules
from mercato.testing.caller import Caller
from mercato.testing.process import Process, data_folder
from mercato.testing.waiting import wait_until

OPTIONS: Final[Mapping[Kind, Sequence[str]]] = {"together": (), "split": ("--split", "--transport", "http")}
AUDITED: Final = "mercato_audit_timestamp_seconds"
WELL_EVALUATIONS: Final = 20
"""How often a shop that is well is looked at: for ten seconds, twice as long as any rule looks back."""

runs_prometheus: Final = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="prometheus was not tried: install it: apt-get install prometheus"
)


class Watched(msgspec.Struct, frozen=True):
    """A shop, and the Prometheus that watches it."""

    shop: Process
    prometheus: Prometheus

    def quiet(self) -> None:
        """Waits until no alert fires."""
        wait_until(lambda: not self.prometheus.firing(), explain=lambda: f"fire: {self.prometheus.firing()}")


def targets(shop: Process, kind: Kind) -> Sequence[str]:
    """The addresses of the processes of the shop."""
    if kind == "together":
        return [urlsplit(shop.url).netloc]
    record = json.loads((shop.data / "processes.json").read_text())
    return [urlsplit(url).netloc for url in record["urls"].values()]


def is_audited(shop: Process, kind: Kind) -> bool:
    """Whether metrics show an audit: before the first, `MercatoAuditOld` waits for it."""
    return any(_audited_at(target) > 0 for target in targets(shop, kind))


def _audited_at(target: str) -> float:
    """When, as a process shows it; 0 where it shows none."""
    with Caller(f"http://{target}") as caller:
        families = text_string_to_metric_families(caller.get("/metrics").text)
    found = [sample.value for family in families if family.name == AUDITED for sample in family.samples]
    return max(found, default=0.0)


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    with data_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def watched(request: pytest.FixtureRequest, data: Path) -> Generator[Watched]:
    kind: Kind = request.param
    with Process(data, *OPTIONS[kind], environment=SETTINGS) as shop:
        shop.ready()
        wait_until(lambda: is_audited(shop, kind))
        with Prometheus(data.parent / "prometheus", targets(shop, kind)) as prometheus:
            yield Watched(shop, prometheus)


@runs_prometheus
@pytest.mark.long
@pytest.mark.postgres
@pytest.mark.parametrize("watched", OPTIONS, indirect=True, scope="module")
def test_no_alert_fires_in_a_shop_that_is_well(watched: Watched):
    shop, prometheus = watched.shop, watched.prometheus
    began = prometheus.evaluations()
    with shop.caller() as caller, Repeating(shop, look, count=2):
        register(caller)
        for number in range(WELL_EVALUATIONS):
            assert caller.paid(f"well-{number}").status == 201
            wait_until(lambda wanted=began + number: prometheus.evaluations() > wanted)
    assert prometheus.unhealthy_targets() == []
    assert prometheus.has_fired() == []


@runs_prometheus
@pytest.mark.long
@pytest.mark.postgres
@pytest.mark.parametrize(
    ("watched", "scenario"),
    [pytest.param(scenario.kind, scenario, id=str(scenario)) for scenario in SCENARIOS],
    indirect=["watched"],
    scope="module",
)
def test_an_alert_fires_when_what_it_watches_breaks(watched: Watched, scenario: Scenario):
    prometheus = watched.prometheus
    watched.quiet()
    with scenario.broken(watched.shop):
        seen: dict[str, Mapping[str, str]] = {}

        def have_fired() -> bool:
            for labels in prometheus.firing():
                wanted = scenario.alerts.get(labels["alertname"])
                if wanted is not None and wanted.items() <= labels.items():
                    seen[labels["alertname"]] = labels
            return seen.keys() == scenario.alerts.keys()

        wait_until(have_fired, explain=lambda: f"of {scenario.alerts} fired {seen}; now fire {prometheus.firing()}")
    if scenario.is_undone:
        watched.quiet()


def test_there_is_a_scenario_for_each_alert():
    assert {name for scenario in SCENARIOS for name in scenario.alerts} == {rule["alert"] for rule in rules()}


def test_of_a_rule_only_the_times_are_made_shorter():
    for rule in rules():
        made = accelerated(rule)
        assert made.keys() == rule.keys()
        assert {name for name in rule if made[name] != rule[name]} <= {"expr", "for"}
        assert made.get("for") in {None, *HELD.values()}


@pytest.mark.parametrize("expression", ["rate(some_total[7m]) > 0", "time() - some_seconds > 86400"])
def test_a_time_without_a_shorter_one_is_found(expression: str):
    with pytest.raises(UnlistedTime, match="MercatoNew"):
        accelerated({"alert": "MercatoNew", "expr": expression})
