"""The folder of metrics that the gateways, or the workers, of a shop share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mercato.chassis.observability.telemetry import MULTIPROCESS_VARIABLE
from mercato.cli.shared_metrics import ENDED_KEPT, MetricsFolder, folder_of_owner

FILES = ("counter", "histogram", "gauge_livesum", "gauge_mostrecent")
LEFT = ("counter", "histogram", "gauge_mostrecent")
"""Of a process that has ended."""


@pytest.fixture
def folder() -> Iterator[MetricsFolder]:
    made = MetricsFolder()
    yield made
    made.remove()
    assert not Path(made.path).exists()


def counted(folder: MetricsFolder, pid: int) -> None:
    """The files of a process."""
    for kind in FILES:
        (Path(folder.path) / f"{kind}_{pid}.db").touch()


def files(folder: MetricsFolder) -> set[str]:
    return {file.name for file in Path(folder.path).iterdir()}


def of(kinds: tuple[str, ...], *pids: int) -> set[str]:
    return {f"{kind}_{pid}.db" for kind in kinds for pid in pids}


def test_what_a_process_has_counted_outlives_it(folder: MetricsFolder):
    counted(folder, 11)
    counted(folder, 1)
    folder.note_end(1)

    assert files(folder) == of(FILES, 11) | of(LEFT, 1)


def test_of_processes_that_end_again_and_again_the_last_are_kept(folder: MetricsFolder):
    last = 1_000 + ENDED_KEPT
    for pid in range(1_000, last + 1):
        counted(folder, pid)
        folder.note_end(pid)

    assert files(folder) == of(LEFT, *range(1_001, last + 1))


def test_only_a_folder_of_the_shop_is_taken_for_one(folder: MetricsFolder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(MULTIPROCESS_VARIABLE, folder.path)
    assert folder_of_owner() == folder.path
    monkeypatch.setenv(MULTIPROCESS_VARIABLE, "/var/lib/metrics-of-others")
    assert folder_of_owner() is None
    monkeypatch.delenv(MULTIPROCESS_VARIABLE)
    assert folder_of_owner() is None
