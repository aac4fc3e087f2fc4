"""The placements: each hosts the gateway and every service, once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mercato import placements, topology
from mercato.chassis.hosting.host import GATEWAY

NAMES = sorted(path.stem for path in Path(placements.__file__).parent.glob("*.toml"))


def test_three_workers_run():
    assert NAMES == ["cluster", "split", "together"]


@pytest.mark.parametrize("name", NAMES)
def test_a_placement_hosts_everything_once(name: str):
    placement = placements.read(name)

    assert Counter(host for plan in placement.processes.values() for host in plan.hosts) == Counter(
        [GATEWAY, *topology.SERVICES]
    )
    assert placement.about.endswith(".")


def test_together_is_one_process_and_the_others_are_apart():
    replicas = {name: {plan.replicas for plan in placements.read(name).processes.values()} for name in NAMES}

    assert replicas == {"together": {1}, "split": {1}, "cluster": {2}}
    assert len(placements.read("together").processes) == 1
    assert len(placements.read("split").processes) == len(topology.SERVICES) + 1
