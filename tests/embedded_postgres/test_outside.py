"""The places of root's databases: made, found and removed by several processes at once, and after a crash at any step.

No server runs here, and the places are below a folder of the test: these tests need no root.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mercato.cli import looking
from mercato.embedded_postgres import SupervisorError, outside, place
from mercato.embedded_postgres.outside import PlaceOwner
from mercato.embedded_postgres.record import ClusterRecord, write_record

ID = "0123456789abcdef"
PROCESSES = 4
ROUNDS = 15
STEPS = ("chmod", "fsync", "link", "mkdir", "open", "pwrite", "rename", "rmdir", "unlink")
"""The functions of `os` that change what is on the disk."""


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Instead of /var/lib/mercato."""
    monkeypatch.setattr(outside, "PLACES", tmp_path / "places")
    return tmp_path / "places"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def start(data: Path, name: str = ID) -> Path:
    """What a start does to the place of a data folder that it has locked."""
    data.mkdir(exist_ok=True)
    write_record(data, ClusterRecord(place=name, outside=True))
    outside.claim(outside.PLACES / name, data)
    return outside.PLACES / name


def abandon(data: Path, name: str = ID) -> Path:
    """A place with a database, whose data folder was deleted."""
    made = start(data, name)
    (made / "postgres" / "base").mkdir(parents=True)
    (made / "postgres" / "base" / "1").write_text("rows")
    shutil.rmtree(data)
    return made


def unlink_mark(data: Path, made: Path) -> None:
    """As on another file system than the data folder: nothing proves that the folder was deleted, and not moved."""
    (data / "postgres.owner").unlink()
    outside._write_owner(made, PlaceOwner(str(data), linked=False))


def left(places: Path) -> list[str]:
    return sorted(path.name for path in places.iterdir() if path.name != outside.LOCK)


def crashing_at(step: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> bool:
    """Whether the work has so many steps, and has crashed before that one."""
    taken = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal taken
            if taken == step:
                raise Crash
            taken += 1
            return function(*arguments, **options)

        return run

    with monkeypatch.context() as patched:
        for name in STEPS:
            patched.setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except Crash:
            return True
    return False


# ------------------------------------------------------------------------------------------------------- at one moment


@pytest.fixture
def removed_meanwhile(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An abandoned place, which another process removes as soon as this one has read whom it belongs to."""
    made = abandon(data)

    def serving(cluster: Path) -> list[Any]:
        shutil.rmtree(cluster.parent, ignore_errors=True)
        return []

    monkeypatch.setattr(outside, "serving", serving)
    return made


def test_a_place_that_is_removed_meanwhile_is_none(removed_meanwhile: Path):
    assert outside.places() == []
    assert not removed_meanwhile.exists()


def test_a_place_that_is_removed_meanwhile_is_not_pruned(removed_meanwhile: Path):
    assert outside.prune() == []
    assert not removed_meanwhile.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="is about what root must do otherwise")
def test_a_start_goes_on_where_another_process_removes_a_place_meanwhile(removed_meanwhile: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    _, lines = place.prepare(other)
    assert lines == []
    assert not removed_meanwhile.exists()


def test_a_place_whose_data_folder_comes_back_before_its_removal_stays(data: Path, places: Path):
    made = start(data)
    unlink_mark(data, made)
    away = data.rename(data.with_name("away"))
    [found] = outside.places()
    assert found.state == "missing"
    away.rename(data)
    start(data)
    assert not outside._discard(found)
    assert left(places) == [ID]
    assert [each.state for each in outside.places()] == ["used"]


def test_a_start_waits_for_the_lock_with_a_bound(data: Path, places: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outside, "LOCK_SECONDS", 0.05)
    with outside._locked(), pytest.raises(SupervisorError, match=rf"{places} has been locked by another Mercato"):
        start(data)
    assert start(data).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="is about what root may do")
def test_a_prune_that_cannot_lock_ends_with_a_sentence(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(outside, "LOCK_SECONDS", 0.05)
    made = abandon(data)
    with outside._locked():
        assert looking.prune(as_json=False) == 1
    assert "has been locked by another Mercato" in capsys.readouterr().err
    assert made.exists()


def test_only_its_owner_can_lock(places: Path):
    with outside._locked():
        assert (places / outside.LOCK).stat().st_mode & 0o777 == 0o600


def test_starts_and_removals_side_by_side_leave_nothing(tmp_path: Path, places: Path):
    def work(number: int) -> None:
        for turn in range(ROUNDS):
            data, name = tmp_path / f"data.{number}", f"{number:08x}{turn:08x}"
            made = start(data, name)
            assert (made / "owner").exists()
            outside.remove_abandoned()
            assert (made / "owner").exists(), "it is in use"
            shutil.rmtree(data)
            outside.remove_abandoned()
            assert not made.exists()

    with ThreadPoolExecutor(PROCESSES) as processes:
        for _ in processes.map(work, range(PROCESSES)):
            pass
    assert left(places) == []


# -------------------------------------------------------------------------------------------------------- after a crash


def test_a_start_that_crashes_at_any_step_leaves_no_place_when_its_folder_is_deleted(
    data: Path, places: Path, monkeypatch: pytest.MonkeyPatch
):
    step, has_crashed = 0, True
    while has_crashed:
        data.mkdir()
        write_record(data, ClusterRecord(place=ID, outside=True))
        has_crashed = crashing_at(step, monkeypatch, lambda: start(data))
        shutil.rmtree(data)
        outside.remove_abandoned()
        assert not places.exists() or left(places) == [], f"after step {step}"
        step += 1
    assert step > 5


def test_after_a_crash_at_any_step_of_a_start_the_next_one_has_the_place(
    data: Path, places: Path, monkeypatch: pytest.MonkeyPatch
):
    step, has_crashed = 0, True
    while has_crashed:
        has_crashed = crashing_at(step, monkeypatch, lambda: start(data))
        outside.remove_abandoned()
        start(data)
        assert left(places) == [ID], f"after step {step}"
        assert [(each.data, each.state) for each in outside.places()] == [(str(data), "used")]
        assert outside._read_owner(places / ID) == PlaceOwner(str(data), linked=True)
        shutil.rmtree(data)
        outside.remove_abandoned()
        step += 1
    assert step > 5


def test_after_a_crash_at_any_step_of_a_start_of_a_moved_folder_its_place_is_still_its_own(
    data: Path, places: Path, monkeypatch: pytest.MonkeyPatch
):
    step, has_crashed = 0, True
    while has_crashed:
        (start(data) / "postgres").mkdir()
        moved = data.rename(data.with_name("a longer name" if step % 2 else "short"))
        has_crashed = crashing_at(step, monkeypatch, lambda moved=moved: start(moved))
        outside.remove_abandoned()
        assert [(each.state, each.has_database) for each in outside.places()] in ([("used", True)], [("moved", True)])
        start(moved)
        assert outside._read_owner(places / ID) == PlaceOwner(str(moved), linked=True)
        shutil.rmtree(moved)
        outside.remove_abandoned()
        assert left(places) == []
        step += 1
    assert step > 2


@pytest.mark.parametrize("is_proven", [True, False], ids=["deleted", "missing"])
def test_a_removal_that_crashes_at_any_step_is_completed_by_the_next(
    data: Path, places: Path, monkeypatch: pytest.MonkeyPatch, is_proven: bool
):
    step, has_crashed = 0, True
    while has_crashed:
        made = abandon(data)
        if not is_proven:
            outside._write_owner(made, PlaceOwner(str(data), linked=False))
        has_crashed = crashing_at(step, monkeypatch, outside.prune)
        outside.prune()
        assert left(places) == [], f"after step {step}"
        step += 1
    assert step > 5


@pytest.mark.parametrize("longer", ["/data/of/a/longer/path", "/data"])
def test_an_owner_is_replaced_in_place(places: Path, longer: str):
    places.mkdir()
    for owner in (PlaceOwner(longer, linked=False), PlaceOwner("/other", linked=True), PlaceOwner(longer, linked=True)):
        outside._write_owner(places, owner)
        assert outside._read_owner(places) == owner
    assert (places / "owner").stat().st_nlink == 1
