"""The API over gRPC by grpcurl, a client that others have written, which knows the messages by reflection alone."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from mercato.testing.process import Process, data_folder

PROGRAM = "grpcurl"

pytestmark = [
    pytest.mark.long,
    pytest.mark.postgres,
    pytest.mark.skipif(
        not shutil.which(PROGRAM),
        reason="grpcurl was not tried: build it, and put it on the PATH: "
        "go install github.com/fullstorydev/grpcurl/cmd/grpcurl@latest",
    ),
]


def run(*arguments: str) -> str:
    done = subprocess.run([PROGRAM, "-plaintext", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_grpcurl_lists_describes_places_and_pays():
    with data_folder() as data, Process(data, "--grpc-port", "0") as shop:
        shop.ready()
        address = next(json.loads(line) for line in shop.lines if '"ready"' in line)["grpc"]

        def call(method: str, message: dict[str, Any]) -> dict[str, Any]:
            return json.loads(run("-d", json.dumps(message), address, f"mercato.{method}"))

        services = run(address, "list").split()
        described = run(address, "describe", "mercato.orders.v1.PlaceOrder")
        account = {"email": "grpcurl@example.com", "name": "Carol", "password": "correct horse battery"}
        user = call("users.v1.UsersService/Register", account)
        wanted = {"user_id": user["id"], "lines": [{"product_id": 100}]}
        order = call("orders.v1.OrdersService/Place", wanted)["order"]
        paid = call("orders.v1.OrdersService/Pay", {"id": order["id"], "method": "sandbox:ok"})
        timeline = call("orders.v1.OrdersService/Timeline", {"id": order["id"]})
        shop.stop()

    assert {"mercato.orders.v1.OrdersService", "grpc.health.v1.Health"} <= set(services)
    assert "optional string idempotency_key = 5;" in described
    assert paid["payment"]["amount_minor"] == order["total_minor"]
    assert {"TIMELINE_PART_ORDER", "TIMELINE_PART_MONEY"} <= {entry["part"] for entry in timeline["entries"]}
