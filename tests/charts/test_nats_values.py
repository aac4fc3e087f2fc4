"""`deploy/helm/nats-values.yaml`: the values by which the official chart of NATS serves a shop.

That chart is not here. The test makes the configuration as the chart does, by the two rules that its documentation
states: a key that ends in `$include` becomes a directive, and `merge` adds to what the chart has. A real server reads
the result.
"""

from __future__ import annotations

import json
import posixpath
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import yaml

from charts.chart import chart
from mercato.cli import nats_server
from mercato.embedded_nats import authorization
from mercato.embedded_nats.server import program
from mercato.testing.command import ROOT

VALUES: Final[Any] = yaml.safe_load((ROOT / "deploy/helm/nats-values.yaml").read_text())
CONFIGURATION: Final = "/etc/nats-config"
"""Where the chart puts the configuration."""
KEY: Final = "mercato.conf"
INCLUDE: Final = re.compile(r'"[^"]*\$include": "([^"]*)",?')


def patched(path: str) -> Any:
    """What is added to the pod, at a path of its template or container."""
    [patch] = VALUES["podTemplate" if path.startswith("/spec") else "container"]["patch"]
    assert (patch["op"], patch["path"]) == ("add", path)
    return patch["value"]


def included() -> str:
    """The path of the file that the configuration includes."""
    [(name, path)] = VALUES["config"]["merge"].items()
    assert name.endswith("$include")
    return posixpath.normpath(posixpath.join(CONFIGURATION, path))


def test_the_included_file_is_the_secret_of_the_shop():
    volume, mount = patched("/spec/volumes/-"), patched("/volumeMounts/-")
    assert volume["secret"]["secretName"] == f"{chart().values['secrets']['prefix']}-nats"
    assert volume["name"] == mount["name"]
    assert mount["readOnly"] is True
    assert included() == f"{mount['mountPath']}/{KEY}"
    assert mount["mountPath"].startswith("/etc/"), "the chart's reloader has the mounts below it too"


def test_nats_takes_the_configuration_with_the_users_of_the_shop(tmp_path: Path):
    folder = tmp_path / CONFIGURATION.lstrip("/")
    users = tmp_path / included().lstrip("/")
    for each in (folder, users.parent):
        each.mkdir(parents=True)
    users.write_bytes(authorization(nats_server.users(b"x" * 32)))
    jetstream = {"store_dir": str(tmp_path / "data"), **VALUES["config"]["jetstream"]["merge"]}
    merged = {**VALUES["config"]["merge"], "http_port": 8222, "jetstream": jetstream, "port": 4222}
    (folder / "nats.conf").write_text(INCLUDE.sub(r"include \1;", json.dumps(merged, indent=2)))

    command = [str(program()), "-t", "-c", str(folder / "nats.conf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert "is valid" in done.stdout + done.stderr
    users.unlink()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "no such file" in again.stdout + again.stderr


def test_three_servers_keep_the_feed_on_disks():
    config = VALUES["config"]
    assert config["cluster"] == {"enabled": True, "replicas": 3}
    assert config["jetstream"]["enabled"] is True
    assert config["jetstream"]["merge"] == {"sync_interval": "always"}


def test_the_pods_of_nats_are_those_that_the_shop_may_reach():
    """The chart labels them by its name, and a release called `nats` has a Service of that name."""
    [target] = chart().values["networkPolicy"]["nats"]
    assert target["to"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "nats"}}}]
    assert chart().values["nats"]["url"] == f"nats://nats:{target['port']}"
