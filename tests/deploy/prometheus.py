"""A real Prometheus that watches a shop by the files of `deploy/observability/`, with shorter times.

The alerts wait for minutes. A test cannot, so the times of the rules are replaced, and nothing else of them: each range
and offset by `SHORT`, each `for` by `HELD`, and a bound that is itself a time by the one in `BOUNDS`. A time or a large
number that is not listed fails `accelerated`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import yaml

from mercato.testing.caller import Caller
from mercato.testing.command import ROOT
from mercato.testing.waiting import wait_until

FOLDER: Final = ROOT / "deploy/observability"
SHORT: Final = "5s"
"""In place of each time in `RANGES`: ten scrapes."""
RANGES: Final = frozenset({"5m", "10m", "15m", "30m", "1h"})
HELD: Final[Mapping[str, str]] = {"1m": "3s", "5m": "2s", "10m": "2s", "15m": "2s"}
"""How long an expression must hold until the alert fires."""
BOUNDS: Final[Mapping[str, tuple[str, str]]] = {
    "MercatoEventsLag": ("> 60", "> 5"),
    "MercatoAuditOld": ("> 3600", "> 20"),
}
"""By alert: a number of seconds, and the one that takes its place."""
SCRAPE: Final = "500ms"

_DURATION: Final = re.compile(r"\b\d+(?:ms|[smhdwy])\b")
_QUOTED: Final = re.compile(r'"[^"]*"')
_LARGE: Final = re.compile(r"(?<![\w.])\d{2,}(?![\w.])")
LARGEST_COUNT: Final = 10
"""A number up to this is no time: a share, a count, or the second that `MercatoSlow` allows."""


def rules() -> Sequence[Mapping[str, Any]]:
    """The alerts, as they are delivered."""
    document = yaml.safe_load((FOLDER / "rules.yml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


class UnlistedTime(Exception):
    """A sentence: which time of which alert has no shorter one above."""


def accelerated(rule: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rule with shorter times. Raises `UnlistedTime`."""
    made = dict(rule)
    if "for" in rule:
        made["for"] = HELD[rule["for"]]
    expression: str = rule["expr"]
    before, after = BOUNDS.get(rule["alert"], ("", ""))
    if before not in expression:
        raise UnlistedTime(f"{rule['alert']} has not the bound {before}")
    rest = _QUOTED.sub("", expression.replace(before, "", 1))
    if unknown := set(_DURATION.findall(rest)) - RANGES:
        raise UnlistedTime(f"{rule['alert']}: no shorter time is listed for {unknown}")
    if large := [number for number in _LARGE.findall(rest) if int(number) > LARGEST_COUNT]:
        raise UnlistedTime(f"{rule['alert']}: are {large} times?")
    made["expr"] = _DURATION.sub(SHORT, expression.replace(before, after, 1))
    return made


def configuration(targets: Sequence[str]) -> Mapping[str, Any]:
    """The configuration as it is delivered, with the addresses of a shop and shorter intervals."""
    made = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    made["global"] |= {"scrape_interval": SCRAPE, "evaluation_interval": SCRAPE}
    [job] = made["scrape_configs"]
    [static] = job["static_configs"]
    static["targets"] = list(targets)
    return made


class Prometheus:
    """Prometheus on a port of its own on loopback, with its files in `folder`. Use it as a context manager."""

    def __init__(self, folder: Path, targets: Sequence[str]) -> None:
        self._folder = folder
        self._targets = targets
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._caller = Caller(f"http://{self._address}")

    def __enter__(self) -> Self:
        rules_file = {"groups": [{"name": "mercato", "rules": [dict(accelerated(rule)) for rule in rules()]}]}
        program = shutil.which("prometheus")
        assert program is not None
        self._folder.mkdir()
        (self._folder / "rules.yml").write_text(yaml.safe_dump(rules_file))
        (self._folder / "prometheus.yml").write_text(yaml.safe_dump(configuration(self._targets)))
        self._log = (self._folder / "log").open("wb")
        self._process = subprocess.Popen(
            [
                program,
                "--config.file=prometheus.yml",
                "--storage.tsdb.path=data",
                f"--web.listen-address={self._address}",
                "--log.level=warn",
            ],
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        try:
            wait_until(self._is_ready, explain=self._said)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._caller.connection.close()
        self._process.kill()  # its data is deleted
        self._process.wait()
        self._log.close()
        shutil.rmtree(self._folder)

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self._said()
        with contextlib.suppress(OSError):
            return self._caller.get("/-/ready").status == 200
        return False

    def _said(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    def _answer(self, path: str) -> Any:
        reply = self._caller.get(path)
        assert reply.status == 200, reply.text
        return reply.json["data"]

    def firing(self) -> Sequence[Mapping[str, str]]:
        """The labels of each alert that fires now, `alertname` among them."""
        return [alert["labels"] for alert in self._answer("/api/v1/alerts")["alerts"] if alert["state"] == "firing"]

    def has_fired(self) -> Sequence[Mapping[str, str]]:
        """The labels of each alert that has fired at some time."""
        found = self._answer("/api/v1/query?query=count_over_time(ALERTS%7Balertstate=%22firing%22%7D%5B1h%5D)")
        return [result["metric"] for result in found["result"]]

    def evaluations(self) -> int:
        """How often all rules were evaluated."""
        reply = self._caller.get("/metrics")
        [line] = [n for n in reply.text.splitlines() if n.startswith("prometheus_rule_group_iterations_total{")]
        return int(float(line.rpartition(" ")[2]))

    def unhealthy_targets(self) -> Sequence[str]:
        """Why each target that was not scraped was not."""
        targets = self._answer("/api/v1/targets")["activeTargets"]
        return [f"{t['scrapeUrl']}: {t['health']} {t['lastError']}" for t in targets if t["health"] != "up"]
