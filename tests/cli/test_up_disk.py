"""A disk that is full: before the first start, and under a running shop."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mercato.testing.caller import Buyers, Caller
from mercato.testing.process import Process, remove
from mercato.testing.responses import Response
from mercato.testing.waiting import BOUND_SECONDS, wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a small disk")


@pytest.fixture
def disk() -> Iterator[Path]:
    """A disk of its own for a data folder, in memory; `resize` changes how big it is."""
    folder = Path(tempfile.mkdtemp(prefix="mercato-test-disk-"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=755", "none", folder], check=False)
    if mounted.returncode != 0:
        folder.rmdir()
        pytest.skip("mounting is not permitted here")
    try:
        (folder / "data").mkdir(mode=0o755)
        yield folder
        resize(folder, "512m")
        remove(folder / "data")
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


# Not enough for initdb, or not for our databases.
@pytest.mark.parametrize("size", [pytest.param("1m", marks=pytest.mark.long), "40m"])
def test_a_first_start_on_a_full_disk_is_refused_and_works_with_space(disk: Path, size: str):
    resize(disk, size)
    with Process(disk / "data") as shop:
        sentence = shop.refusal()
    assert "full" in sentence or os.strerror(errno.ENOSPC) in sentence
    assert sorted(path.name for path in (disk / "data").glob("*.new-*")) == []

    resize(disk, "512m")
    with Process(disk / "data") as shop, shop.ready().caller() as caller:
        assert caller.order().status == 201
        shop.stop()


def test_a_disk_that_fills_up_loses_no_order(disk: Path):
    """It goes on with 503 and recovers, or stops with one sentence; the next start finds every order in any case."""
    resize(disk, "512m")
    ballast = disk / "ballast"
    with Process(disk / "data") as shop:
        shop.ready()
        with Buyers(shop.caller, count=2) as buyers:
            wait_until(lambda: len(buyers.placed) >= 20, BOUND_SECONDS)
            with ballast.open("wb") as stream, contextlib.suppress(OSError):
                stream.truncate(0)
                while True:
                    stream.write(bytes(1 << 20))
            wait_until(
                lambda: buyers.statuses[503] > 3 or not shop.is_running, BOUND_SECONDS, lambda: str(buyers.statuses)
            )
            refused = ask(shop.caller())
            # It may recover from a log that it could not write; it says then that it does not answer.
            wait_until(
                lambda: not shop.is_running or readiness(shop.caller()) in NOT_READY,
                BOUND_SECONDS,
                lambda: f"{readiness(shop.caller())} {buyers.statuses}",
            )
            ballast.unlink()
            if refused is not None and refused.status == 503:
                assert int(refused.headers["retry-after"]) >= 1
            placed = len(buyers.placed)
            wait_until(lambda: len(buyers.placed) > placed or not shop.is_running, BOUND_SECONDS)
            wait_until(lambda: not shop.is_running or readiness(shop.caller()) == (200, ""), BOUND_SECONDS)
        if shop.is_running:
            shop.stop()
        else:
            assert len(shop.complaints) == 1, shop.output
            shop.assert_gone()

    with Process(disk / "data") as shop, shop.ready().caller() as caller:
        buyers.assert_nothing_lost(caller)
        shop.stop()


@pytest.mark.long
def test_a_start_on_a_disk_that_has_filled_up_is_refused_and_works_with_space(disk: Path):
    resize(disk, "512m")
    with Process(disk / "data") as shop, shop.ready().caller() as caller:
        order_id = caller.order().json["id"]
        shop.stop()
    used = shutil.disk_usage(disk).used
    resize(disk, str(used))
    with Process(disk / "data") as shop:
        wait_until(lambda: not shop.is_running or shop.has_line("ready"), BOUND_SECONDS)
        if not shop.is_running:
            assert "full" in shop.refusal()
    resize(disk, "512m")

    with Process(disk / "data") as shop, shop.ready().caller() as caller:
        assert caller.get(f"/orders/{order_id}").status == 200
        shop.stop()


NOT_READY = [(503, "its database has no space for what it is to store"), (503, "its database does not answer")]


def readiness(caller: Caller) -> tuple[int, str]:
    """The status of the shop, and what it says of orders."""
    try:
        with caller:
            answer = caller.get("/health/ready")
    except (OSError, http.client.HTTPException):
        return 0, ""
    return answer.status, answer.json.get("reasons", {}).get("orders", "")


def ask(caller: Caller) -> Response | None:
    try:
        with caller:
            return caller.order()
    except (OSError, http.client.HTTPException):
        return None
