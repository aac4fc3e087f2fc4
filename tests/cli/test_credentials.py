"""What `mercato migrate` gives each process: files, for `mercato serve` or a container, and Secrets of Kubernetes."""

from __future__ import annotations

import base64
import json
import stat
import subprocess
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from mercato import topology
from mercato.testing.cluster import Cluster
from mercato.testing.command import run_command
from mercato.testing.served import Served, free_address, variables

SECRET = "a secret of at least thirty-two characters"
PROCESSES = ("gateway", "operator", *topology.SERVICES)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def given() -> AsyncGenerator[Mapping[str, str]]:
    """A server of its own: other tests expect that no other module has made a shop on the one of the run."""
    started = await Cluster.start()
    yield {"MERCATO_POSTGRES_DSN": started.server.admin_dsn, "MERCATO_SECRET": SECRET}
    await started.stop()


@pytest.fixture(scope="module")
def folder(given: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of the processes of a migrated shop."""
    made = tmp_path_factory.mktemp("shop")
    arguments = ("--data", str(made / "data"), "--credentials", str(made / "credentials"), "--folders")
    done = run_command("migrate", *arguments, environment=given)
    assert done.returncode == 0, done.stderr
    assert not (made / "data/environment").exists()
    return made / "credentials"


def printed(*arguments: str, environment: Mapping[str, str]) -> Mapping[str, Mapping[str, Any]]:
    """The Secrets that `mercato credentials` prints, by name."""
    done = run_command("credentials", *arguments, environment=environment)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["apiVersion"], document["kind"]) == ("v1", "List")
    return {item["metadata"]["name"]: item for item in document["items"]}


# --------------------------------------------------------------------------------------------------------------- files


def test_each_process_has_a_folder_that_its_owner_alone_may_read(folder: Path):
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    assert files == sorted(["nats/nats.conf", *(f"{name}/{name}.env" for name in PROCESSES)])
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_dir()} == {0o700}


def test_folders_that_exist_are_written_into(given: Mapping[str, str], tmp_path: Path):
    """As the volumes of containers do."""
    for name in (*PROCESSES, "nats"):
        (tmp_path / "credentials" / name).mkdir(parents=True)
    arguments = ("--data", str(tmp_path / "data"), "--credentials", str(tmp_path / "credentials"), "--folders")

    done = run_command("migrate", *arguments, environment=given)

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "credentials/orders/orders.env").is_file()


def test_a_process_takes_its_variables_from_its_file(folder: Path):
    file = folder / "products/products.env"
    environment = {"MERCATO_CREDENTIALS": str(file), "MERCATO_RPC_ADDRESS": free_address()}

    with Served("products", environment=environment) as served, served.ready().caller() as caller:
        assert caller.get("/products?limit=1").status == 200


def test_a_variable_that_is_set_comes_before_that_of_the_file(folder: Path):
    environment = {"MERCATO_SERVICE_SECRET_PRODUCTS": "hunter2", "MERCATO_RPC_ADDRESS": free_address()}
    options = ("--credentials", str(folder / "products/products.env"))

    with Served("products", environment=environment, options=options) as refused:
        sentence = refused.refusal()

    assert "MERCATO_SERVICE_SECRET of products is not valid" in sentence
    assert "hunter2" not in sentence


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file or directory."),
        (b"\xff", "cannot be read: it is not text."),
        (b"DATABASE_URL_ORDERS\n", "Line 1 of "),
        (b"DATABASE_URL_ORDERS=x\nPATH=/hunter2\n", "Line 2 of "),
        (b"export MERCATO_PUBLIC_KEYS=x\n", "Line 1 of "),
    ],
)
def test_a_file_that_is_not_one_of_migrate_is_refused(tmp_path: Path, content: bytes | None, words: str):
    file = tmp_path / "orders.env"
    if content is not None:
        file.write_bytes(content)

    with Served("orders", environment={"MERCATO_CREDENTIALS": str(file)}) as refused:
        sentence = refused.refusal()

    assert words in sentence
    assert str(file) in sentence
    assert "hunter2" not in sentence


def test_a_folder_that_cannot_be_written_is_named(given: Mapping[str, str], tmp_path: Path):
    (tmp_path / "file").touch()
    arguments = ("--data", str(tmp_path / "data"), "--credentials", str(tmp_path / "file/below"))

    done = run_command("migrate", *arguments, environment=given)

    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert str(tmp_path / "file") in done.stderr


@pytest_asyncio.fixture(loop_scope="session")
async def empty_server() -> AsyncGenerator[str]:
    """The administrator's DSN of a server without databases."""
    started = await Cluster.start()
    yield started.server.admin_dsn
    await started.stop()


def test_the_first_staff_account_is_made_where_accounts_are(empty_server: str, tmp_path: Path):
    """A shop whose databases are on several servers: each has its own `mercato migrate`, with the same secret."""
    environment = {"MERCATO_POSTGRES_DSN": empty_server, "MERCATO_SECRET": SECRET}

    def migrate(*services: str) -> subprocess.CompletedProcess[str]:
        data = str(tmp_path / services[0])
        return run_command("migrate", *services, "--json", "--data", data, environment=environment)

    apart = migrate("orders", "products")
    users = migrate("users")

    assert (apart.returncode, users.returncode) == (0, 0), users.stderr
    assert ("staff@mercato.local" in apart.stdout, "staff@mercato.local" in users.stdout) == (False, True)


# ------------------------------------------------------------------------------------------------------------- Secrets


def test_secrets_hold_what_migrate_writes(folder: Path, given: Mapping[str, str]):
    secrets = printed(environment=given)

    assert set(secrets) == {*(f"mercato-{name}" for name in PROCESSES), "mercato-nats", "mercato-admin"}
    for name in PROCESSES:
        assert secrets[f"mercato-{name}"]["stringData"] == variables(folder / name / f"{name}.env")
    assert secrets["mercato-nats"]["stringData"] == {"mercato.conf": (folder / "nats/nats.conf").read_text()}
    assert secrets["mercato-admin"]["stringData"] == {
        "postgres-dsn": given["MERCATO_POSTGRES_DSN"],
        "secret": SECRET,
    }


def test_services_of_another_server_are_printed_alone(given: Mapping[str, str]):
    secrets = printed(
        "orders", "--dsn", "postgresql://admin:p%40ss@second/postgres", "--prefix", "shop", "--admin-secret", "second",
        environment=given,
    )  # fmt: skip

    assert set(secrets) == {"shop-orders", "shop-gateway", "shop-operator", "shop-nats", "second"}
    dsn = secrets["shop-orders"]["stringData"]["DATABASE_URL_ORDERS"]
    assert dsn.startswith("postgresql://mercato_orders:")
    assert dsn.endswith("@second/mercato_orders")


def test_a_server_may_have_several_nodes(given: Mapping[str, str]):
    secrets = printed("--dsn", "postgresql://admin:p@db1:5432,db2:5433/postgres", environment=given)

    assert "@db1:5432,db2:5433/" in secrets["mercato-orders"]["stringData"]["DATABASE_URL_ORDERS"]


def test_services_reach_their_databases_through_a_pooler(given: Mapping[str, str]):
    secrets = printed("--pooler", "pooler:6432", environment=given)

    assert "@pooler:6432/" in secrets["mercato-orders"]["stringData"]["DATABASE_URL_ORDERS"]
    assert secrets["mercato-admin"]["stringData"]["postgres-dsn"] == given["MERCATO_POSTGRES_DSN"]


@pytest.mark.parametrize(
    ("arguments", "changed", "words"),
    [
        ((), {"MERCATO_POSTGRES_DSN": ""}, "there is no server: name it by --dsn"),
        ((), {"MERCATO_SECRET": ""}, "MERCATO_SECRET is missing"),
        ((), {"MERCATO_SECRET": "short"}, "MERCATO_SECRET is not valid"),
        (("order", "--admin-secret", "second"), {}, "there is no service 'order'"),
        (("orders",), {}, "--admin-secret is missing"),
        (("--dsn", "db.internal"), {}, "cannot be used: a DSN has the form"),
        (("--dsn", "postgresql://[::1/postgres"), {}, "cannot be used: a DSN has the form"),
        (("--pooler", "pooler"), {}, "is not the address of a pooler"),
        (("--prefix", "Shop_1"), {}, "'Shop_1' is not a name of Kubernetes"),
        (("--admin-secret", "a/b"), {}, "'a/b' is not a name of Kubernetes"),
    ],
)
def test_what_is_wrong_is_named(
    given: Mapping[str, str], arguments: tuple[str, ...], changed: Mapping[str, str], words: str
):
    done = run_command("credentials", *arguments, environment={**given, **changed})

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert words in done.stderr
    assert base64.b64encode(SECRET.encode()).decode() not in done.stderr
    assert SECRET not in done.stderr
