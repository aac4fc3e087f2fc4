"""The API's description as tools read it: clients in two languages are made of it and used, and requests by thousands.

Each test has a live shop. The tools are installed by the first test that needs them, and left in a cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from mercato.testing.process import Process, used_folder
from system.clients.tools import HERE, MISSING, PACKAGES, PINS, is_node_missing, node_tools, python_tools

pytestmark = pytest.mark.long

RUN_SECONDS: Final = 240.0
"""A bound for a machine that is busy with other things."""
REQUESTS_SECONDS: Final = 60
EXAMPLES: Final = 12
PASSWORD: Final = "a password of a customer"
SETTINGS: Final = """\
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 414, 415, 422, 428, 429, 431, "5xx"]
"""
"""The statuses that schemathesis takes for a refusal by itself, and those for what is too long to be read at all."""


def had(install: Callable[[], Path], command: str) -> Path:
    try:
        return install()
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip(f"the description was not given to its tools: this has failed: {command}")


@pytest.fixture(scope="module")
def tools() -> Path:
    return had(python_tools, f"uv pip install --require-hashes --requirement {PINS.name}")


@pytest.fixture(scope="module")
def shop() -> Iterator[Process]:
    with used_folder() as data, Process(data) as made:
        yield made.ready()
        made.stop()


def run(*command: str | Path, cwd: Path, path: Path | None = None, **environment: str) -> str:
    """What the command says, which must end well."""
    known = {**os.environ, **environment}
    if path is not None:
        known["PATH"] = f"{path}:{known['PATH']}"
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=known, timeout=RUN_SECONDS, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6_000:]
    return done.stdout


def document(shop: Process, folder: Path) -> Path:
    file = folder / "openapi.json"
    with shop.caller() as caller:
        file.write_text(caller.get("/openapi.json").text)
    return file


def test_a_client_in_python_is_made_passes_strict_types_and_buys(shop: Process, tools: Path, tmp_path: Path):
    file = document(shop, tmp_path)
    generate = (tools / "openapi-python-client", "generate", "--meta", "none", "--fail-on-warning")
    run(*generate, "--path", file, "--output-path", tmp_path / "mercato_client", cwd=tmp_path, path=tools)
    shutil.copy(HERE / "buyer.py.txt", tmp_path / "buyer.py")
    strict = (tools / "mypy", "--strict", "--config-file", HERE / "mypy.ini", "--cache-dir", tmp_path / "cache")
    run(*strict, "mercato_client", "buyer.py", cwd=tmp_path)

    assert run(tools / "python", "buyer.py", shop.url, cwd=tmp_path) == "HEAD-100 99.99\n"


@pytest.mark.skipif(is_node_missing(), reason=MISSING)
def test_types_for_typescript_are_made_pass_strict_checks_and_buy(shop: Process, tmp_path: Path):
    tools = had(node_tools, f"npm install {' '.join(PACKAGES)}")
    run(tools / "openapi-typescript", document(shop, tmp_path), "--output", tmp_path / "api.d.ts", cwd=tmp_path)
    shutil.copy(HERE / "buyer.ts", tmp_path)
    options = ("--strict", "--noUncheckedIndexedAccess", "--exactOptionalPropertyTypes", "--target", "es2022")
    run(tools / "tsc", *options, "--lib", "es2022,dom", "--module", "commonjs", "buyer.ts", cwd=tmp_path)

    assert run("node", "buyer.js", shop.url, cwd=tmp_path) == "HEAD-100 99.99, changed to 99.99\n"


def ask(tools: Path, url: str, folder: Path, *options: str) -> str:
    """Runs all phases of schemathesis. Its check of accepted requests is replaced by that in `hooks.py`."""
    (folder / "schemathesis.toml").write_text(SETTINGS)
    return run(
        tools / "schemathesis", "run", f"{url}/openapi.json", "--phases", "examples,coverage,fuzzing,stateful",
        "--exclude-path", "/orders/{id}/events",  # a stream has no end; tests/gateway/test_streams.py
        "--exclude-checks", "positive_data_acceptance", "--max-examples", str(EXAMPLES), "--max-time",
        str(REQUESTS_SECONDS), "--seed", "1", "--generation-database", "none", "--warnings", "off", "--no-color",
        *options,
        cwd=folder, SCHEMATHESIS_HOOKS=str(HERE / "hooks.py"),
    )  # fmt: skip


def test_requests_of_staff_made_of_the_description_find_no_difference(shop: Process, tools: Path, tmp_path: Path):
    said = ask(tools, shop.url, tmp_path)

    assert "Stateful" in said


def test_requests_of_a_customer_made_of_the_description_find_no_difference(tools: Path, tmp_path: Path):
    with used_folder() as data, Process(data, "--auth", "required") as shop, shop.ready().caller() as caller:
        account = {"email": "carol@example.com", "name": "Carol", "password": PASSWORD}
        assert caller.post("/register", account).status == 201
        caller.sign_in("carol@example.com", PASSWORD)
        order = caller.post("/orders", {"product_id": 100, "payment_method": "sandbox:ok"}, Prefer="wait=20")
        assert order.json["payment"] == "paid"

        said = ask(tools, shop.url, tmp_path, "--header", f"Authorization: Bearer {caller.token}")
        shop.stop()

    assert "Stateful" in said
