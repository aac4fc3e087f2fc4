"""Images that are built and started: what they hold, and a shop of them by `deploy/compose.yaml`."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.containers import (
    ACCOUNT,
    COMPOSE,
    DOCKERFILE,
    PASSWORD,
    SERVING,
    TAG,
    Composed,
    build,
    content,
    docker,
    inspected,
    missing,
    signed_in,
    wait_until_healthy,
)
from docs.test_tour import BLOCKS, commands
from mercato import topology
from mercato.testing.caller import Caller

WHOLE = ("migrate", "all")
LARGEST_BYTES = 150_000_000
"""Of the image of a service, as Docker counts it."""

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture(scope="module", autouse=True)
def images() -> None:
    build([*SERVING, *WHOLE])


@pytest.fixture(scope="module")
def shop(images: None) -> Iterator[Composed]:
    with Composed() as made:
        yield made


# -------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("name", SERVING)
def test_the_image_of_a_service_has_no_other_service_no_shell_and_no_installer(name: str):
    files = content(f"mercato/{name}:{TAG}")

    package = "opt/mercato/app/mercato/"
    services = {path.split("/")[5] for path in files if path.startswith(f"{package}services/") and path.count("/") > 5}
    assert services - {"__pycache__"} == (
        {name} if name in topology.SERVICES and name not in topology.SIMULATORS else set()
    )
    assert any(path.startswith(f"{package}simulators/bank/app") for path in files) == (name == "sandbox")
    names = {path.rpartition("/")[2] for path in files}
    assert not names & {"sh", "bash", "dash", "busybox", "pip", "ensurepip", "alembic", "sqlalchemy", "apt", "perl"}
    assert not any("/testing/" in path or "/operations/" in path for path in files if path.startswith(package))
    own = {path.split("/")[0] for path in files} - {".dockerenv", "dev", "etc", "proc", "sys"}
    assert own == {"bin", "lib", "lib64", "opt", "run", "tmp", "usr", "var"}


@pytest.mark.parametrize("name", SERVING)
def test_the_image_of_a_service_is_small_and_runs_as_a_user_without_rights(name: str):
    image = inspected(f"mercato/{name}:{TAG}")

    assert image["Size"] <= LARGEST_BYTES
    assert image["Config"]["User"] == ACCOUNT
    assert (image["Config"]["Entrypoint"], image["Config"]["Cmd"]) == (["mercato"], ["serve", name])
    assert image["Config"]["Healthcheck"]["Test"][-1] == "/opt/mercato/health.py"
    assert image["Config"]["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    print(f"{name}: {image['Size'] / 1e6:.0f} MB")  # noqa: T201  # a figure of the run


@pytest.mark.parametrize("name", [*SERVING, *WHOLE])
def test_the_bill_of_materials_lists_every_installed_package(name: str):
    files = content(f"mercato/{name}:{TAG}")
    text = files["opt/mercato/bom.json"]
    assert text is not None
    bom = json.loads(text)

    listed = {re.sub(r"[-_.]+", "-", each["name"]).lower() for each in bom["components"]}
    installed = {
        re.sub(r"[-_.]+", "-", found[1].rpartition("-")[0]).lower()
        for path in files
        if (found := re.fullmatch(r"opt/mercato/lib/python[^/]+/site-packages/([^/]+)\.dist-info/METADATA", path))
    }
    assert (bom["bomFormat"], bom["metadata"]["component"]["name"]) == ("CycloneDX", "mercato")
    assert len(installed) > 30
    assert installed <= listed
    assert {"libc6", "libssl3"} & listed
    assert all(each["purl"].startswith(("pkg:pypi/", "pkg:deb/debian/")) for each in bom["components"])


def test_a_target_that_serves_says_what_it_lacks():
    done = subprocess.run(
        ["docker", "run", "--rm", "--read-only", f"mercato/orders:{TAG}"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert done.stderr.startswith("mercato: The setting DATABASE_URL_ORDERS is missing")
    assert done.stderr.count("\n") == 1


def test_the_image_of_the_whole_shop_serves_a_shop():
    name = f"mercato-whole-{os.getpid()}"
    docker("run", "--detach", "--name", name, "--publish", "127.0.0.1::8080", f"mercato/all:{TAG}")
    try:
        wait_until_healthy([name])
        address = docker("port", name, "8080").stdout.strip()
        password = PASSWORD.search(docker("logs", name).stdout)
        assert password is not None
        with Caller(f"http://{address}") as caller:
            caller.token = signed_in(caller, password[1])
            assert caller.get("/orders?limit=1").json == []
        assert "invariants hold" in docker("exec", name, "mercato", "audit", "--data", "/data/shop").stdout
    finally:
        docker("rm", "--force", "--volumes", name)


def test_every_service_has_a_target_and_a_place_in_compose():
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE.read_text(), re.MULTILINE))

    assert {*SERVING, *WHOLE} <= targets
    assert all(f"mercato/{name}:${{MERCATO_VERSION:-latest}}" in COMPOSE.read_text() for name in (*SERVING, "migrate"))


# ------------------------------------------------------------------------------------------------------------- Compose


def test_the_tour_of_the_readme_runs_against_compose(shop: Composed, tmp_path: Path):
    """As it is written, with a token in the configuration of curl; where the shop is killed, every container is."""
    (tmp_path / ".curlrc").write_text(f'header = "Authorization: Bearer {shop.token()}"\nsilent\nshow-error\n')
    answers: list[Any] = []
    for command in (command for block in BLOCKS for command in commands(block)):
        if command.startswith("kill"):
            shop.compose("kill", "--signal", "KILL")
            shop.compose("up", "--detach", "--wait")
        elif "mercato audit" in command:
            answers.append(shop.compose("run", "--rm", "administrator").stdout)
        else:
            line = command.replace("localhost:8080", f"localhost:{shop.ports['gateway']}")
            environment = {**os.environ, "CURL_HOME": str(tmp_path)}
            typed = ["bash", "-c", line]
            done = subprocess.run(typed, env=environment, capture_output=True, text=True, check=True)
            answers.append(json.loads(done.stdout))

    first, again = answers[2:4]
    paid, timeline, lost = answers[6:9]
    shipped, after_kill, audited = answers[11], answers[13], answers[14]
    assert first["total"] == {"amount": "1099.97", "currency": "USD"}
    assert again == first
    assert (paid["order_id"], paid["status"]) == (1001, "captured")
    assert {entry["part"] for entry in timeline} == {"order", "stock", "money"}
    assert (lost["status"], lost["payment"]) == ("confirmed", "paid")
    assert after_kill == shipped
    assert "invariants hold" in audited


@pytest.mark.parametrize(
    ("service", "request_line"),
    [("users", "/users/1"), ("products", "/products/100"), ("orders", "/orders?user_id=1"), ("gateway", "/users?id=1")],
)
def test_a_service_answers_its_rows_on_its_port(shop: Composed, service: str, request_line: str):
    with Caller(shop.url(service), shop.token()) as caller:
        assert caller.get(request_line).status == 200


def test_a_container_has_the_credentials_of_its_process_alone(shop: Composed):
    for name in SERVING:
        files = docker("exec", shop.container(name), "python", "-c", "import os; print(os.listdir('/run/credentials'))")
        assert files.stdout.strip() == f"['{name}.env']"


def test_nothing_in_a_container_can_be_written_but_its_temporary_folder(shop: Composed):
    program = (
        "import os\n"
        "for path in ('/x', '/opt/mercato/app/x', '/run/credentials/x', '/tmp/x'):\n"
        "    try:\n        open(path, 'w').close(); print(path)\n"
        "    except OSError as error:\n        pass\n"
        "print(os.getuid(), os.getgid())\n"
    )
    for name in SERVING:
        done = docker("exec", shop.container(name), "python", "-c", program)
        assert done.stdout.split() == ["/tmp/x", *ACCOUNT.split(":")]


def test_metrics_are_for_the_token_alone(shop: Composed):
    with Caller(shop.url("orders")) as caller:
        assert caller.get("/metrics").status == 401
        answer = caller.get("/metrics", Authorization=f"Bearer {shop.metrics_token}")
    assert answer.status == 200
    assert "mercato_build_info" in answer.text


def test_a_backup_stays_when_its_container_is_gone(shop: Composed):
    shop.compose("run", "--rm", "administrator", "backup", "/backups/shop")
    listed = shop.compose(
        "run", "--rm", "--entrypoint", "python", "administrator", "-c", "import os; print(os.listdir('/backups'))"
    )

    assert listed.stdout.strip() == "['shop']"


def test_the_operator_sees_every_process(shop: Composed):
    seen = shop.compose("run", "--rm", "operator").stdout

    for name in topology.SERVICES:
        assert re.search(rf"^{name} .* up$", seen, re.MULTILINE), seen
