"""Every import rule of `pyproject.toml` is kept by the package, and is really broken by an injected violation.

A rule that matches nothing looks like a rule that is kept. So each is broken once, in a copy of the package, and
exactly that rule must be reported.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from mercato.testing.waiting import BOUND_SECONDS

REPOSITORY = Path(__file__).parents[2]
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"


class Violation(NamedTuple):
    file: str
    line: str


VIOLATIONS = {
    "layers": Violation("embedded_postgres/folder.py", "import mercato.contracts"),
    "chassis-layers": Violation("chassis/postgres/database.py", "import mercato.chassis.rpc.client"),
    "postgres-without-http": Violation("chassis/postgres/database.py", "import mercato.chassis.http"),
    "siblings": Violation("services/users/app.py", "import mercato.services.orders.app"),
    "service-layers": Violation("services/users/rules.py", "import mercato.services.users.store"),
    "contracts": Violation("contracts/violation.py", "import mercato.chassis.postgres.database"),
    "settings": Violation("services/users/service.py", "import pydantic_settings"),
    "driver": Violation("services/users/store.py", "import asyncpg"),
    "http": Violation("services/users/service.py", "from starlette.responses import Response"),
    "http-client": Violation("services/users/service.py", "import aiohttp"),
    "grpc": Violation("services/users/service.py", "import grpc"),
    "migrations": Violation("services/users/store.py", "from alembic import op"),
}


def contract_names() -> dict[str, str]:
    """The contracts of pyproject.toml: id to name."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    return {contract["id"]: contract["name"] for contract in settings["tool"]["importlinter"]["contracts"]}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(REPOSITORY / "mercato", tmp_path / "mercato", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def broken_contracts(folder: Path) -> set[str]:
    """Lint the package in `folder` and return the ids of the contracts reported as broken."""
    environment = {"PATH": "", "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LINT], cwd=folder, env=environment, capture_output=True, text=True, timeout=BOUND_SECONDS
    )
    results = dict(re.findall(r"^(.+?) (KEPT|BROKEN)\b", done.stdout, re.MULTILINE))
    names = contract_names()
    assert set(results) == set(names.values()), done.stdout + done.stderr
    return {contract for contract, name in names.items() if results[name] == "BROKEN"}


def add_violation(folder: Path, violation: Violation) -> None:
    with (folder / "mercato" / violation.file).open("a") as file:
        file.write(f"\n{violation.line}\n")


def test_every_contract_has_a_planted_violation():
    assert set(VIOLATIONS) == set(contract_names())


def test_the_package_keeps_every_contract(copy: Path):
    assert broken_contracts(copy) == set()


@pytest.mark.parametrize("contract", VIOLATIONS)
def test_a_planted_violation_breaks_exactly_its_contract(contract: str, copy: Path):
    add_violation(copy, VIOLATIONS[contract])

    assert broken_contracts(copy) == {contract}


def test_a_file_without_a_place_in_the_layers_of_a_service_is_reported(copy: Path):
    (copy / "mercato/services/users/violation.py").touch()

    assert broken_contracts(copy) == {"service-layers"}
