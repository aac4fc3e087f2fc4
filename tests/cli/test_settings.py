"""Settings: one table, bounds on both sides of every number, and no variable that has no effect."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mercato.chassis.hosting import settings as config
from mercato.chassis.hosting.options import OptionError, OptionReader
from mercato.chassis.hosting.variables import SettingsError, forget_empty, set_default, value
from mercato.cli.commands import app
from mercato.cli.settings import COMMAND_VARIABLES, load, markdown, rows
from mercato.services.inventory import app as inventory
from mercato.services.orders import app as orders
from mercato.services.payments import app as payments
from mercato.simulators.bank import app as bank

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mercato"
NUMBERS = ["nan", "inf", "-inf", "1e300", "1e-9", "-1", "999999999999999999999999", "x"]
OPTIONS = {
    "inventory": inventory.Options,
    "orders": orders.Options,
    "payments": payments.Options,
    "sandbox": bank.Options,
}
FROM_ZERO = {row.name for row in rows() if row.bounds.startswith("0 to")}
MAY_TOUCH_THE_ENVIRONMENT = {
    "chassis/hosting/variables.py": "it is the one module that does",
    "chassis/observability/telemetry.py": "whether prometheus-client shares a folder, by a variable of that library",
    "cli/progress.py": "NO_COLOR",
    "embedded_postgres/guarded.py": "what PostgreSQL is given of PATH and LD_LIBRARY_PATH",
    "embedded_postgres/place.py": "MERCATO_POSTGRES_USER: the package imports nothing of the chassis",
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("MERCATO_") and not name.startswith("MERCATO_TEST_"):
            monkeypatch.delenv(name)


def bounded(row_name: str) -> bool:
    return any(row.name == row_name and " to " in row.bounds for row in rows())


def numbers() -> Iterator[tuple[str, str]]:
    """Each setting that is a number, with each text that it may not be."""
    for row in rows():
        if " to " in row.bounds and row.name not in COMMAND_VARIABLES:
            for text in NUMBERS:
                if not (text == "1e-9" and row.name in FROM_ZERO and row.name != "MERCATO_AUDIT_SECONDS"):
                    yield row.name, text


@pytest.mark.parametrize(("name", "text"), list(numbers()))
def test_a_number_out_of_its_bounds_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, text: str):
    monkeypatch.setenv(name, text)

    with pytest.raises((SettingsError, OptionError), match=f"{name} is not valid"):
        read(name, text)


def read(name: str, text: str) -> None:
    """Reads a setting, whether it is of the process or of a service."""
    service = name.split("_")[1].lower()
    if service in OPTIONS:
        OptionReader(service, {name: text})(OPTIONS[service])
    else:
        load()


def test_every_number_has_bounds_on_both_sides():
    fields = {"MERCATO_" + name.upper(): info for name, info in config.ServeSettings.model_fields.items()}
    of_process = [name for name, info in fields.items() if isinstance(info.default, int | float)]
    of_services = [
        f"MERCATO_{service.upper()}_{name.upper()}"
        for service, options in OPTIONS.items()
        for name in options.__struct_fields__
        if isinstance(getattr(options(), name), int | float)
    ]

    assert len(of_process) > 10
    assert len(of_services) > 10
    assert [name for name in (*of_process, *of_services) if not bounded(name)] == []


def test_every_setting_says_what_it_means():
    assert [row.name for row in rows() if len(row.about) < 10] == []


def test_the_documentation_has_the_table():
    document = (ROOT / "docs" / "operations.md").read_text()

    assert markdown() in document, "put the output of `mercato settings --markdown` into docs/operations.md"


def test_the_documentation_names_no_other_setting():
    known = {row.name for row in rows()} | {"MERCATO_EVENTS", "MERCATO_SERVICE_SECRET_ORDERS"}
    for file in (ROOT / "README.md", ROOT / "docs" / "operations.md"):
        named = set(re.findall(r"\bMERCATO_[A-Z_]*[A-Z]\b(?![_*])", file.read_text()))

        assert named - known == set()


def test_variables_of_commands_are_listed():
    found = {
        name
        for command in ("up", "serve", "migrate", "audit", "backup", "services", "doctor", "call")
        for argument in app[command].assemble_argument_collection()
        for name in argument.parameter.env_var or ()
    }

    assert found == set(COMMAND_VARIABLES)


def test_no_option_undoes_what_is_not_the_default():
    commands = [app[name] for name in app if not name.startswith("-")]
    commands += [command[name] for command in commands for name in command if not name.startswith("-")]
    negatives = {
        negative
        for command in commands
        if command.default_command is not None
        for argument in command.assemble_argument_collection()
        for negative in argument.negatives
    }

    assert negatives == {"--no-demo"}


# ------------------------------------------------------------------------------------------------------- unknown names


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("MERCATO_POOLSIZE", "MERCATO_POOL_SIZE"),
        ("MERCATO_POSTGRES_DNS", "MERCATO_POSTGRES_DSN"),
        ("MERCATO_ODERS_LEASE_SECONDS", "MERCATO_ORDERS_LEASE_SECONDS"),
        ("MERCATO_LISTN_PORT", "MERCATO_LISTEN_PORT"),
        ("MERCATO_SERVICE_SECRET_ODERS", "MERCATO_SERVICE_SECRET_ORDERS"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch, name: str, nearest: str):
    monkeypatch.setenv(name, "3")

    with pytest.raises(SettingsError, match=f"There is no setting {name}: did you mean {nearest}\\?"):
        load()


def test_a_misspelt_option_of_a_service_is_refused_with_the_nearest_name():
    with pytest.raises(OptionError, match=r"MERCATO_ORDERS_LEASE_SECOND: did you mean MERCATO_ORDERS_LEASE_SECONDS\?"):
        OptionReader("orders", {"MERCATO_ORDERS_LEASE_SECOND": "3"})(orders.Options)


def test_an_option_of_a_service_without_options_is_refused():
    with pytest.raises(OptionError, match="There is no setting MERCATO_PRODUCTS_COLOUR"):
        OptionReader("products", {"MERCATO_PRODUCTS_COLOUR": "red"}).require_known()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("MERCATO_ORDERS_LEASE_SECONDS", "3"),  # of a service that this process may not host
        ("MERCATO_TLS_CA", "/ca.pem"),  # of `serve`
        ("MERCATO_WORKERS", "2"),  # of `up`
        ("MERCATO_TEST_ANYTHING", "1"),
        ("MERCATO_POOLSIZE", ""),
        ("MERCATO_SERVICE_HOST", "10.0.0.1"),  # these Kubernetes sets for a `Service` called `mercato`
        ("MERCATO_SERVICE_PORT", "80"),
        ("MERCATO_PORT", "tcp://10.0.0.1:80"),
        ("MERCATO_ORDERS_PORT_80_TCP_ADDR", "10.0.0.1"),
    ],
)
def test_variables_of_other_processes_are_passed_over(monkeypatch: pytest.MonkeyPatch, name: str, text: str):
    monkeypatch.setenv(name, text)

    load()
    OptionReader("orders", {name: text})(orders.Options)


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MERCATO_LISTEN_PORT", "")
    monkeypatch.setenv("MERCATO_USERS_MAIL", "")
    forget_empty()

    assert "MERCATO_LISTEN_PORT" not in os.environ
    set_default("MERCATO_USERS_MAIL", "folder:/x")
    assert value("MERCATO_USERS_MAIL") == "folder:/x"


# ------------------------------------------------------------------------------------------------ who reads variables


def touching(source: str) -> bool:
    """Whether a module reads or writes the environment of its process."""
    return any(
        (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv", "getenvb"))
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and any("env" in a.name for a in node.names))
        for node in ast.walk(ast.parse(source))
    )


def test_one_module_touches_the_environment():
    modules = [module for module in PACKAGE.rglob("*.py") if "testing" not in module.parts]
    found = {str(module.relative_to(PACKAGE)) for module in modules if touching(module.read_text())}

    assert found == MAY_TOUCH_THE_ENVIRONMENT.keys()


@pytest.mark.parametrize("line", ["os.environ['A']", "from os import getenv", "os.getenv('A')", "os.environ.update(a)"])
def test_a_module_that_touches_the_environment_is_found(line: str):
    assert touching(line)
