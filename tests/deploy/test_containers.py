"""Images that are built and started: what they hold, and a shop of them by `deploy/compose.yaml`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

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
    missing_observers,
    signed_in,
    wait_until_healthy,
)
from deploy.prometheus import rules
from deploy.test_jaeger import Query
from docs.test_tour import BLOCKS, commands
from mercato import topology
from mercato.testing.caller import Caller
from mercato.testing.shop import ShopClient
from mercato.testing.waiting import wait_until
from reference import test_as_printed
from system.tracing import paid_order

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
    ("service", "line", "body", "status"),
    [
        ("users", "GET /users/1", None, 200),
        ("users", "GET /user/1", None, 200),
        ("users", "GET /customers/1", None, 200),
        ("products", "GET /products/100", None, 200),
        ("products", "GET /products/p1", None, 200),
        ("orders", "GET /orders?user_id=1", None, 200),
        ("orders", "POST /orders", {"user_id": "1", "product_ids": ["p1", "p2"]}, 201),
        ("orders", "POST /payments/process?order_id=999999999&amount=1299.99", None, 404),
        ("products", "GET /user/1", None, 404),
        ("gateway", "GET /users?id=1", None, 200),
    ],
)
def test_a_service_answers_its_rows_on_its_port(shop: Composed, service: str, line: str, body: Any, status: int):
    with Caller(shop.url(service), shop.staff_token) as caller:
        answer = caller.call(*line.split(), body=body)
        assert answer.status == status, answer.text


@pytest_asyncio.fixture
async def open_shop(shop: Composed) -> AsyncGenerator[ShopClient]:
    """In the role of staff, as the callers of an open shop are."""
    client = ShopClient(shop.url(), shop.staff_token)
    yield client
    await client.close()


@pytest_asyncio.fixture
async def guarded_shop(shop: Composed) -> AsyncGenerator[ShopClient]:
    client = ShopClient(shop.url())
    yield client
    await client.close()


# The requests of the reference systems, byte for byte: the tests of these names, of the shop of the fixtures above.
for name in (
    "test_a_an_order_of_an_item_and_an_amount",
    "test_a_another_amount_than_that_of_the_catalogue_is_refused",
    "test_a_wrong_fields_have_the_names_of_the_form",
    "test_a_a_payment_is_processed_by_query_parameters",
    "test_a_what_is_not_a_number_is_named",
    "test_a_an_unknown_order_is_not_found",
    "test_a_another_amount_than_is_due_is_a_conflict",
    "test_a_a_payment_that_the_provider_refuses_is_402",
    "test_a_payments_are_processed_by_post_alone",
    "test_b_users_are_an_array",
    "test_b_orders_of_a_user_are_an_array",
    "test_b_an_unknown_user_has_no_orders",
    "test_c_a_customer_orders_items",
    "test_c_without_a_customer_the_field_is_named",
    "test_c_an_order_can_be_read_by_its_number",
    "test_c_a_customer_has_a_name_and_an_email",
    "test_c_a_customer_who_does_not_exist_orders_nothing",
    "test_d_an_order_of_products_by_sku_is_confirmed",
    "test_d_a_product_that_is_named_twice_is_bought_twice",
    "test_d_a_sku_that_there_is_not_is_named",
    "test_d_a_product_is_found_by_its_sku_or_number",
    "test_d_a_user_has_a_username",
    "test_d_an_account_is_opened_without_a_password",
    "test_d_what_is_wrong_with_an_account_has_the_names_of_the_form",
):
    globals()[name] = getattr(test_as_printed, name)


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


# ------------------------------------------------------------------------------------------------------- observability


@pytest.fixture(scope="module")
def observed(shop: Composed) -> Composed:
    if reason := missing_observers():
        pytest.skip(reason)
    shop.observe()
    return shop


def asked(shop: Composed, path: str) -> Any:
    """What Prometheus answers; None until it does."""
    with contextlib.suppress(OSError), Caller(shop.url("prometheus")) as caller:
        answer = caller.get(path)
        return answer.json["data"] if answer.status == 200 else None
    return None


def test_prometheus_scrapes_every_process_and_has_the_alerts(observed: Composed):
    def up() -> dict[str, str]:
        found = asked(observed, "/api/v1/query?query=up") or {"result": []}
        return {each["metric"]["instance"]: each["value"][1] for each in found["result"]}

    wanted = {f"{name}:8080": "1" for name in SERVING}
    wait_until(lambda: up() == wanted, explain=lambda: str(asked(observed, "/api/v1/targets")))
    loaded = [rule for group in asked(observed, "/api/v1/rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in loaded} == {rule["alert"] for rule in rules()}
    wait_until(lambda: {r["health"] for g in asked(observed, "/api/v1/rules")["groups"] for r in g["rules"]} == {"ok"})


def test_jaeger_has_the_trace_of_an_order_that_failed(observed: Composed):
    jaeger = Query(f"127.0.0.1:{observed.ports['jaeger']}")
    with Caller(observed.url(), observed.token()) as caller:
        paid_order.place_declined(caller)
    services = {name.split()[0] for edge in paid_order.EDGES for name in edge}

    def is_whole() -> bool:
        with contextlib.suppress(OSError):
            spans = jaeger.spans(paid_order.REFUSED)
            known = {span.span_id for span in spans} | {paid_order.CLICK}
            return {span.service for span in spans} == services and {span.parent_id for span in spans} <= known
        return False

    wait_until(is_whole, explain=lambda: str([paid_order.named(s) for s in jaeger.spans(paid_order.REFUSED)]))
    paid_order.assert_have_their_parents(jaeger.spans(paid_order.REFUSED))
