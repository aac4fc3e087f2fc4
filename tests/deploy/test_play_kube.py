"""The chart's Deployments and its Job, run by `podman play kube`: an order is placed and paid in their containers.

What Podman 4 cannot do is replaced, and nothing else (`for_podman`): Secrets become ConfigMaps, a Job its pod, and of
the ports, which Podman would open on this machine, the gateway's alone is left. Network policies, disruption budgets
and autoscalers are for a cluster.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from charts.chart import Document, Values, of_kind, rendered
from deploy.containers import PASSWORD, SERVING, TAG, build, docker, images_of_others, missing, signed_in
from mercato.chassis.hosting.host import GATEWAY
from mercato.testing.caller import Caller
from mercato.testing.command import run_command
from mercato.testing.served import free_address
from mercato.testing.waiting import wait_until

NETWORK: Final = f"mercato-play-{os.getpid()}"
COMMAND_SECONDS: Final = 300.0
VALUES: Final[Values] = {
    "image": {"registry": "localhost/", "tag": TAG},
    "nats": {"url": "nats://nats:4222"},
    "services": {name: {"autoscaling": {"enabled": False}, "replicas": 1} for name in SERVING},
}
SECRET: Final = "a secret of at least thirty-two characters"  # of this test alone

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(
        shutil.which("podman") is None, reason="the Deployments were not run: apt-get install podman runc"
    ),
]


def podman(*arguments: str, text: str | None = None) -> str:
    """Runs Podman's command to its end, which must be a success; gives what it prints."""
    command = ["podman", *arguments]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copied(image: str, name: str) -> None:
    """Gives Podman an image of Docker."""
    with tempfile.NamedTemporaryFile(prefix="mercato-test-", suffix=".tar") as file:
        docker("save", "--output", file.name, image)
        loaded = podman("load", "--quiet", "--input", file.name).split()[-1]
    podman("tag", loaded, name)


def for_podman(document: Document, port: int) -> Document:
    """A Deployment, or the pod of a Job, as Podman 4 takes it."""
    made: dict[str, Any] = copy.deepcopy(dict(document))
    pod = made["spec"]["template"]["spec"]
    for container in pod["containers"]:
        container["envFrom"] = [{"configMapRef": each["secretRef"]} for each in container.get("envFrom", ())]
        for variable in container.get("env", ()):
            if "valueFrom" in variable:
                found: Mapping[str, str] = variable.pop("valueFrom")["secretKeyRef"]
                variable["value"] = PLAIN[found["key"]]
        container["ports"] = []
    if made["metadata"]["labels"]["app.kubernetes.io/component"] == GATEWAY:
        pod["containers"][0]["ports"] = [{"containerPort": 8080, "hostPort": port, "hostIP": "127.0.0.1"}]
    if made["kind"] == "Job":
        metadata = {**made["spec"]["template"]["metadata"], "name": made["metadata"]["name"]}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod}
    return made


PLAIN: Final = {"secret": SECRET, "postgres-dsn": "postgresql://postgres:a-password@postgres/postgres"}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mercato-test-") as made:
        yield Path(made)


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[Mapping[str, Document]]:
    """PostgreSQL and NATS under the names that the chart's values have; gives the Secrets that the chart asks for."""
    build([*SERVING, "migrate"])
    for name in (*SERVING, "migrate"):
        copied(f"mercato/{name}:{TAG}", f"localhost/mercato/{name}:{TAG}")
    for variable, image in images_of_others().items():
        copied(image, f"localhost/mercato/{variable.lower()}:{TAG}")
    environment = {"MERCATO_POSTGRES_DSN": PLAIN["postgres-dsn"], "MERCATO_SECRET": SECRET}
    printed = run_command("credentials", environment=environment)
    assert printed.returncode == 0, printed.stderr
    secrets = {item["metadata"]["name"]: item for item in json.loads(printed.stdout)["items"]}
    (folder / "users.conf").write_text(secrets["mercato-nats"]["stringData"]["mercato.conf"])
    (folder / "nats.conf").write_text('port: 4222\njetstream {store_dir: "/data"}\ninclude ./users.conf\n')
    started = ["postgres", "nats"]
    podman("network", "create", NETWORK)
    try:
        podman(
            "run", "--detach", "--name", "postgres", "--network", NETWORK, "--env", "POSTGRES_PASSWORD=a-password",
            f"localhost/mercato/postgres_image:{TAG}",
        )  # fmt: skip
        podman(
            "run", "--detach", "--name", "nats", "--network", NETWORK, f"--volume={folder}:/etc/nats:ro",
            f"localhost/mercato/nats_image:{TAG}", "--config", "/etc/nats/nats.conf",
        )  # fmt: skip
        wait_until(_postgres_answers)
        yield secrets
    finally:
        podman("rm", "--force", "--volumes", *started)
        podman("network", "rm", "--force", NETWORK)


def _postgres_answers() -> bool:
    command = ["podman", "exec", "postgres", "pg_isready", "--host=127.0.0.1", "--username=postgres"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def played(documents: Sequence[Document], folder: Path, name: str) -> Generator[None]:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump_all(documents))
    try:
        podman("play", "kube", "--network", NETWORK, str(file))
        yield
    finally:
        podman("play", "kube", "--down", str(file))


def test_an_order_is_paid_in_the_deployments_of_the_chart(servers: Mapping[str, Document], folder: Path):
    address = free_address()
    port = int(address.rpartition(":")[2])
    documents = rendered(VALUES)
    [job] = of_kind(documents, "Job").values()
    maps = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": each["metadata"], "data": each["stringData"]}
        for each in servers.values()
    ]
    deployments = [for_podman(each, port) for each in of_kind(documents, "Deployment").values()]

    with played([for_podman(job, port)], folder, "migrate"):
        name = f"{job['metadata']['name']}-migrate"
        assert podman("wait", name).strip() == "0", podman("logs", name)
        found = PASSWORD.search(podman("logs", name))
    assert found is not None
    with played([*maps, *deployments], folder, "shop"), Caller(f"http://{address}") as caller:

        def is_ready() -> bool:
            with contextlib.suppress(OSError):
                return caller.get("/health/ready").status == 200
            return False

        wait_until(is_ready)
        assert len(deployments) == len(SERVING)
        caller.token = signed_in(caller, found[1])
        product = {"sku": "P", "name": "Phone", "category": "phones", "price": {"amount": "5.00", "currency": "USD"}}
        made = caller.post("/products", product)
        assert made.status == 201, made.text
        stock = {"delta": 3, "reason": "delivery"}
        counted = caller.post(f"/products/{made.json['id']}/stock/adjustments", stock, Idempotency_Key="one")
        assert counted.status in (200, 201), counted.text
        body = {
            "user_id": caller.get("/users/me").json["id"],
            "product_id": made.json["id"],
            "payment_method": "sandbox:ok",
        }
        paid = caller.post("/orders", body, Idempotency_Key="two", Prefer="wait=20")
    assert paid.status == 201, paid.text
    assert paid.json["payment"] == "paid"
