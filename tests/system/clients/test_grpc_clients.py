"""The Python client that protoc makes of `proto/`, against the real command: with TLS, and with several workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import grpc
import pytest

from contracts import update_schemas
from mercato.testing.certificates import certificate
from mercato.testing.process import Process, data_folder

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

LIBRARIES: Final = Path(grpc.__file__).parents[1]
BUYER: Final = Path(__file__).with_name("grpc_buyer.py.txt")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the generated modules, and the program that uses them."""
    folder = tmp_path_factory.mktemp("client")
    files = [path for path in update_schemas.committed_protos() if path.endswith(".proto")]
    made = subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", str(update_schemas.PROTOS),
         f"--python_out={folder}", f"--grpc_python_out={folder}", *files],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (folder / "buyer.py").write_text(BUYER.read_text())
    return folder


def buy(client: Path, address: str, ca: Path | None = None) -> dict[str, str]:
    """What the client has bought. Its package `mercato` is that of the generated modules, without ours (-S)."""
    found = {**os.environ, "PYTHONPATH": f"{client}:{LIBRARIES}"}
    done = subprocess.run(
        [sys.executable, "-S", "buyer.py", address, str(ca or ""), "alice@example.com", "demo-password"],
        cwd=client, env=found, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def address_of(shop: Process) -> str:
    ready = next(json.loads(line) for line in shop.lines if '"ready"' in line)
    return ready["grpc"]


@pytest.mark.parametrize("options", [(), ("--workers", "2"), ("--split",)], ids=["one", "workers", "split"])
def test_a_generated_client_places_and_pays_an_order(client: Path, options: tuple[str, ...]):
    with data_folder() as data, Process(data, "--auth", "required", "--grpc-port", "0", *options) as shop:
        order = buy(client, address_of(shop.ready()))
        shop.stop()

    assert (order["totalMinor"], order["currency"]) == ("19998", "USD")


def test_a_generated_client_calls_a_shop_with_tls(client: Path, tmp_path: Path):
    cert, key = certificate(tmp_path)
    options = ("--auth", "required", "--grpc-port", "0", "--grpc-cert", str(cert), "--grpc-key", str(key))
    with data_folder() as data, Process(data, *options) as shop:
        order = buy(client, address_of(shop.ready()), cert)
        shop.stop()

    assert order["payment"] == "PAYMENT_PAID"
