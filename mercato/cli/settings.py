"""The table of all settings: what a variable means, its default and bounds, and who reads it.

It is built from the classes that read the settings, and the options of commands that have a variable.
`mercato settings` prints it, docs/operations.md contains it, and a start refuses variables that are not in it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Final, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import msgspec
from pydantic import BaseModel, SecretStr

from mercato import topology
from mercato.chassis.hosting import settings as config, variables
from mercato.chassis.hosting.variables import PREFIX, SettingsError
from mercato.cli.progress import show, table

S = TypeVar("S", bound=config.Settings)

SERVICE_SECRET: Final = "MERCATO_SERVICE_SECRET"  # noqa: S105  # a name
CREDENTIALS: Final = "MERCATO_CREDENTIALS"
"""Names a file of `mercato migrate` with variables of this process."""
GIVEN_IN_FILES: Final = (f"{PREFIX}SERVICE_SECRET", f"{PREFIX}PUBLIC_KEYS", "DATABASE_URL")
"""What the names of such variables begin with."""
COMMAND_VARIABLES: Final = (
    "MERCATO_AUTH",
    CREDENTIALS,
    "MERCATO_DATA",
    "MERCATO_DEMO",
    "MERCATO_GRPC_CERT",
    "MERCATO_GRPC_KEY",
    "MERCATO_GRPC_PORT",
    "MERCATO_LISTEN_HOST",
    "MERCATO_LISTEN_PORT",
    "MERCATO_PLACEMENT",
    "MERCATO_POOLER",
    "MERCATO_REPLICAS",
    "MERCATO_SPLIT_TRANSPORT",
    "MERCATO_WORKERS",
)
"""The variables of options of commands."""
POSTGRES_USER: Final = "MERCATO_POSTGRES_USER"
UNITS: Final = {"seconds": "seconds", "percent": "percent", "share": "share of 1", "rate": "share of 1"}
"""The units, by the last word of a name."""
GIVEN_BY_MIGRATE: Final = "`mercato migrate` writes it"


class Setting(msgspec.Struct, frozen=True):
    """A row of the table."""

    name: str
    about: str
    default: str
    bounds: str
    """The bounds of a number, with its unit, or the choices of a text. Empty: any text."""
    readers: str
    """The commands, or the service, that read it."""


def load(kind: type[S] = config.Settings) -> S:
    """Reads the settings of this process, and before them the variables of its file of credentials.

    Raises `SettingsError`, also for a variable that is not known.
    """
    if file := variables.value(CREDENTIALS):
        _read_credentials(Path(file))
    settings = config.load(kind)
    services = [f"{PREFIX}{name.upper()}_" for name in topology.SERVICES]  # each service checks its own
    if found := variables.unknown(_process_names(), passed_over=services):
        raise SettingsError(variables.no_such(found[0], {*_process_names(), *(row.name for row in rows())}))
    return settings


def _read_credentials(file: Path) -> None:
    """Sets the variables of the file that are not set."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SettingsError(f"The file {file} with the credentials cannot be read: {reason}.") from None
    for number, line in enumerate(lines, 1):
        name, equals, value = line.partition("=")
        if not name.startswith(GIVEN_IN_FILES) or not equals:
            raise SettingsError(
                f"Line {number} of {file} is not a variable as `mercato migrate` writes it: NAME=VALUE."
            )
        variables.set_default(name, value)


def _process_names() -> set[str]:
    """All variables but those of services."""
    secrets = (f"{SERVICE_SECRET}_{name.upper()}" for name in topology.CALLERS)
    own = (PREFIX + field.upper() for field in config.ServeSettings.model_fields)
    return {*own, *secrets, SERVICE_SECRET, POSTGRES_USER, *COMMAND_VARIABLES}


def rows() -> Sequence[Setting]:
    """The whole table: the process, options of commands, then the services that are installed here."""
    process = [*_of_model(config.Settings, "all"), *_of_model(config.ServeSettings, "serve", beyond=config.Settings)]
    return [*process, *_named(), *_of_commands(), *_of_services()]


def _named() -> Iterator[Setting]:
    about = "The account that PostgreSQL runs as where Mercato runs as root."
    yield Setting(POSTGRES_USER, about, "`mercato`, else `nobody`", "", "up")
    about = f"What the keys of a service come from, where a process serves one; else `{SERVICE_SECRET}_ORDERS`."
    yield Setting(SERVICE_SECRET, about, GIVEN_BY_MIGRATE, "64 hexadecimal digits", "serve")
    about = "The DSN of a service's own database, where a process serves one; else `DATABASE_URL_ORDERS`."
    yield Setting("DATABASE_URL", about, GIVEN_BY_MIGRATE, "", "serve")


def _of_commands() -> Iterator[Setting]:
    """The options of commands that have a variable, each once."""
    from mercato.cli.commands import app

    found: dict[str, Setting] = {}
    for command in ("up", "serve", "migrate"):
        for argument in app[command].assemble_argument_collection(parse_docstring=True):
            for name in argument.parameter.env_var or ():
                if name in found:
                    both = f"{found[name].readers}, {command}"
                    found[name] = msgspec.structs.replace(found[name], readers=both)
                    continue
                about = " ".join((argument.parameter.help or "").split()).partition(" [default:")[0]
                bounds = _bounds(_each(argument.parameter.validator)) or _choices(argument.hint)
                option = f"`{argument.name}`: {about}"
                default = argument.field_info.default
                found[name] = Setting(name, option, "" if default is None else _shown(default), bounds, command)
    yield from sorted(found.values(), key=lambda row: row.name)


def _each(validators: Any) -> Sequence[object]:
    return cast(Sequence[object], validators) if isinstance(validators, tuple | list) else [validators]


def _of_services() -> Iterator[Setting]:
    for service in topology.SERVICES:
        try:
            module = importlib.import_module(f"{topology.package(service)}.app")
        except ModuleNotFoundError:
            continue  # a copy of the package that holds some of the services
        options = getattr(module, "Options", None)
        if options is not None:
            yield from _of_options(service, options)


def _of_options(service: str, options: type[msgspec.Struct]) -> Iterator[Setting]:
    hints, abouts = get_type_hints(options, include_extras=True), _docstrings(options)
    for field in msgspec.structs.fields(options):
        name = f"{PREFIX}{service.upper()}_{field.name.upper()}"
        hint: Any = hints[field.name]
        bounds = _bounds(hint.__metadata__ if get_origin(hint) is Annotated else ())
        yield Setting(name, abouts[field.name], _shown(field.default), _with_unit(field.name, bounds), service)


def _of_model(model: type[BaseModel], readers: str, beyond: type[BaseModel] | None = None) -> Iterator[Setting]:
    abouts, inherited = _docstrings(model), beyond.model_fields if beyond else {}
    for field, info in model.model_fields.items():
        if field in inherited:
            continue
        name = str(info.validation_alias or PREFIX + field.upper())
        bounds = _bounds(info.metadata) or _choices(info.annotation)
        yield Setting(name, abouts[field], _shown(info.default), _with_unit(field, bounds), readers)


def _docstrings(kind: type) -> Mapping[str, str]:
    """The text below each attribute of a class, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    found: dict[str, str] = {}
    name = ""
    for node in body.body if isinstance(body, ast.ClassDef) else ():
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            found.setdefault(name, " ".join(str(node.value.value).split()))
    return found


def _bounds(limits: Iterable[object]) -> str:
    """The bounds of a number, as in `1 to 50`, from annotations of msgspec, pydantic or cyclopts; empty unless both."""
    low = high = None
    for limit in limits:
        low = next((value for key in ("ge", "gte") if (value := getattr(limit, key, None)) is not None), low)
        high = next((value for key in ("le", "lte") if (value := getattr(limit, key, None)) is not None), high)
    return "" if low is None or high is None else f"{_number(low)} to {_number(high)}"


def _choices(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if annotation is bool:
        return "`true`, `false`"
    of_union = [part for part in get_args(annotation) if part is not NoneType]
    return _choices(of_union[0]) if len(of_union) == 1 else ""


def _with_unit(field: str, bounds: str) -> str:
    unit = UNITS.get(field.rpartition("_")[2], "")
    return f"{bounds} ({unit})" if bounds and unit else bounds


def _number(value: float) -> str:
    return f"{value:.15g}"


def _shown(value: object) -> str:
    if value is None or value == "" or isinstance(value, SecretStr):
        return ""
    return _number(value) if isinstance(value, int | float) and not isinstance(value, bool) else f"`{value}`"


def markdown() -> str:
    """The table as docs/operations.md contains it."""
    lines = ["| variable | meaning | default | values | read by |", "| --- | --- | --- | --- | --- |"]
    for row in rows():
        cells = (f"`{row.name}`", row.about, row.default, row.bounds, row.readers)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def show_table(*, as_json: bool, as_markdown: bool) -> int:
    """Prints the table; gives the exit code. Values that are set are not shown: some are secrets."""
    if as_markdown:
        show(markdown().rstrip())
        return 0
    if as_json:
        show(json.dumps([msgspec.to_builtins(row) for row in rows()]))
        return 0
    listed = [["VARIABLE", "DEFAULT", "VALUES", "READ BY"]]
    listed += [[row.name, row.default.replace("`", ""), row.bounds.replace("`", ""), row.readers] for row in rows()]
    for line in table(listed):
        show(line)
    return 0
