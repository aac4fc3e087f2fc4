"""What documents name exists: targets of make, commands, options, settings, metrics, routes, tests, codes, files."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Final

import pytest
from cyclopts import App

from bench.throughput import document as bench_document
from mercato import topology
from mercato.chassis.contract import ServiceError
from mercato.chassis.observability import faults
from mercato.cli.commands import app
from mercato.cli.settings import rows
from mercato.gateway import docs, examples, explained, openapi
from mercato.gateway.routes import ROUTES
from mercato.operations.audit.clients import CLIENTS
from mercato.operations.audit.invariants import SHOP
from system.mutation.safeguards.table import SAFEGUARDS

ROOT: Final = Path(__file__).parents[2]
EXAMPLE: Final = "adding-a-service.md"
"""It names what it makes: `test_adding_a_service.py` makes it."""
DOCUMENTS: Final = {
    str(path.relative_to(ROOT)): path
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    if "\nSuperseded by " not in path.read_text() and path.name != EXAMPLE
}
SOURCES: Final = {
    path: path.read_text() for name in ("mercato", "tests", "bench") for path in ROOT.glob(f"{name}/**/*.py")
}

CODE: Final = re.compile(r"```\w*\n(.*?)```|^    (\S[^\n]*)$|`([^`\n]+)`", re.DOTALL | re.MULTILINE)
SPAN: Final = re.compile(r"`([^`\n]+)`")

GONE: Final = {"MERCATO_INVENTORY_RECONCILE_SECONDS", "MERCATO_INVENTORY_QUIET_SECONDS", "mercato_events_parked"}
"""Of earlier versions: CHANGELOG.md says that they are gone."""
EXAMPLES: Final = {"0001_what.py", "0002_what.py", "MERCATO_PORT", "MERCATO_POSTGRES_DNS"}
ELSEWHERE: Final = {"--env-file", "Subscription.drain"}
"""Of Docker and of nats-py."""
LIBRARIES: Final = {"aiohttp", "msgspec"}
NO_SETTINGS: Final = {"MERCATO_EVENTS"}
"""The name of the stream of events."""
COUNTED_WHOLE: Final = {"databases", "services", "operations", "settings"}
"""Of these a document may name some: only "all seven services" and "the seven services" are counts of all."""
NUMBERS: Final = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def wrong_names(text: str) -> list[str]:
    """What a text names that there is not, of all kinds."""
    wrong = [(kind, name) for kind, found in KINDS.items() for name in found(text)]
    return [f"{kind}: {name}" for kind, name in wrong if name not in ELSEWHERE | EXAMPLES]


def _targets(text: str) -> Iterator[str]:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for code in _code(text):
        yield from (target for target in re.findall(r"\bmake ([a-z][a-z-]*)", code) if target not in known)


def _commands(text: str) -> Iterator[str]:
    for code in _code(text):
        for name, then in re.findall(r"(?<![\w/.-])mercato ([a-z][a-z-]*)(?: ([a-z-]+))?", code):
            if name not in app:
                yield f"mercato {name}"
            elif name in ("events", "users") and then and then not in app[name]:
                yield f"mercato {name} {then}"


def _options(text: str) -> Iterator[str]:
    for span in SPAN.findall(text):
        yield from (
            option for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span) if option not in _known_options()
        )


def _settings(text: str) -> Iterator[str]:
    for name in re.findall(r"\bMERCATO_[A-Z_]*[A-Z](?:_\*)?", text):
        pattern = re.escape(name).replace(r"_\*", "_.+")
        if name in GONE | NO_SETTINGS or name.startswith("MERCATO_TEST_"):
            continue
        if not any(re.fullmatch(pattern, setting) for setting in _known_settings()):
            yield name


def _metrics(text: str) -> Iterator[str]:
    known = _known_metrics()
    for span in SPAN.findall(text):
        for name in re.findall(r"(?<![\w./:-])mercato_[a-z_]*[a-z]", span):
            if name not in GONE and name.removesuffix("_total") not in known:
                yield name


def _log_events(text: str) -> Iterator[str]:
    for names in re.findall(r"\blogs?(?: has)? ((?:`\w+`(?:, | and | or )?)+)", text):
        yield from (name for name in SPAN.findall(names) if name not in _texts())


def _routes(text: str) -> Iterator[str]:
    for method, path in re.findall(r"\b(GET|POST|PUT|PATCH|DELETE) (/[\w/{}.-]*[\w}])", text):
        if path.startswith("/rpc/"):
            continue  # between processes
        if not any(re.fullmatch(known, f"{method} {path}") for known in _known_routes()):
            yield f"{method} {path}"


def _tests(text: str) -> Iterator[str]:
    for name in re.findall(r"`(?:[\w/]+\.py::)?(test_\w+)`", text):
        if not any(f"def {name}(" in source for path, source in SOURCES.items() if path.is_relative_to(ROOT / "tests")):
            yield name


def _codes(text: str) -> Iterator[str]:
    """Dotted names that begin like an operation, an error, an event, a fault point or a consumer."""
    for name in re.findall(r"`([a-z]+\.[a-z_.]+)(?:\(\))?`", text):
        if name.partition(".")[0] in _FIRST_WORDS and name.rpartition(".")[2] != "py" and name not in _known_codes():
            yield name


def _files(text: str) -> Iterator[str]:
    """Files that are named by the end of their path."""
    for name in re.findall(r"`([\w/-]+(?:\.[\w-]+)*\.(?:py|md|cjs|toml|html|css|js))`", text):
        if name not in _ends_of_paths():
            yield name
    for path in re.findall(r"(?<![\w/.])((?:mercato|tests|bench|docs)/[\w/.-]+\.(?:py|md|cjs|toml|go|json))\b", text):
        if not (ROOT / path).is_file():
            yield path


def _members(text: str) -> Iterator[str]:
    """`Class.member` and `module.CONSTANT`."""
    for owner, member in re.findall(r"`(?:[\w/]+\.py::)?([A-Z]+[a-z]\w+)\.(\w+)(?:\(\))?`", text):
        if not any(member in members for name, members in _classes() if name == owner):
            yield f"{owner}.{member}"
    for module, name in re.findall(r"`([a-z_]+)\.([A-Z]\w+)`", text):
        if module not in LIBRARIES and not any(name in _top_level(path) for path in SOURCES if path.stem == module):
            yield f"{module}.{name}"


def _counts(text: str) -> Iterator[str]:
    counted = (
        r"\b(all\s+|the\s+)?(\w+)\s+(invariants|fault\s+points|safeguards|databases|services|operations|settings)\b"
    )
    for whole, number, thing in re.findall(counted, text):
        value = int(number) if number.isdigit() else NUMBERS.index(number) + 1 if number in NUMBERS else None
        is_of_all = whole or thing not in COUNTED_WHOLE
        if value is not None and is_of_all and value not in _COUNTED[" ".join(thing.split())]():
            yield f"{number} {thing}"


KINDS: Final[dict[str, Callable[[str], Iterator[str]]]] = {
    "target of make": _targets,
    "command": _commands,
    "option": _options,
    "setting": _settings,
    "metric": _metrics,
    "log event": _log_events,
    "route": _routes,
    "test": _tests,
    "code": _codes,
    "file": _files,
    "member": _members,
    "count": _counts,
}

_FIRST_WORDS: Final = {*topology.SERVICES, "order", "payment", "product", "refund", "stock", "checkout", "consumer"}
_COUNTED: Final[dict[str, Callable[[], set[int]]]] = {
    "invariants": lambda: {len(SHOP), len(CLIENTS), len(SHOP) + len(CLIENTS)},
    "fault points": lambda: {len(faults.POINTS)},
    "safeguards": lambda: {len(SAFEGUARDS)},
    "databases": lambda: {len(topology.SERVICES)},
    "services": lambda: {len(topology.SERVICES)},
    "operations": lambda: {sum(len(contract.operations) for contract in topology.SERVICES.values())},
    "settings": lambda: {len(rows())},
}


def _code(text: str) -> list[str]:
    return ["".join(groups) for groups in CODE.findall(text)]


@cache
def _known_options() -> set[str]:
    options = set(re.findall(r"""["'](--[a-z][a-z-]+)["'=]""", "\n".join(SOURCES.values())))
    options |= set(re.findall(r"--[a-z][a-z-]+", (ROOT / "Makefile").read_text()))
    return options | {name for command in _all_commands(app) for name in _options_of(command)}


def _all_commands(of: App) -> Iterator[App]:
    for name in of:
        if not name.startswith("-"):
            yield of[name]
            yield from _all_commands(of[name])


def _options_of(command: App) -> set[str]:
    if command.default_command is None:
        return set()
    return {name for argument in command.assemble_argument_collection(parse_docstring=True) for name in argument.names}


@cache
def _known_settings() -> set[str]:
    return {row.name for row in rows()} | {f"MERCATO_SERVICE_SECRET_{name.upper()}" for name in topology.CALLERS}


@cache
def _known_metrics() -> set[str]:
    """Without `_total`. Of a name that is put together, all that its module has texts for."""
    names: set[str] = set()
    for path, source in SOURCES.items():
        if path.is_relative_to(ROOT / "mercato") and "mercato_" in source:
            texts = {n.value for n in _nodes(path) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            names |= {text for text in texts if re.fullmatch(r"mercato_[a-z_]+", text)}
            starts = {text for text in texts if re.fullmatch(r"mercato_[a-z]+_", text)}
            names |= {start + end for start in starts for end in texts}
    return names


@cache
def _known_routes() -> list[str]:
    paths = [*(f"{route.method} {route.path}" for route in ROUTES), *(f"GET {path}" for path in openapi.PAGES)]
    return [re.sub(r"\{\w+\}", r"[^/]+", path) for path in paths]


@cache
def _known_codes() -> set[str]:
    topology.builds()
    contracts = topology.SERVICES.values()
    codes = {operation.full_name for contract in contracts for operation in contract.operations.values()}
    codes |= {type_ for contract in contracts for type_ in contract.events}
    codes |= {openapi.operation_id(route) for route in ROUTES}
    return codes | {error.code for error in _subclasses(ServiceError)} | faults.POINTS | _texts()


def _subclasses(of: type[ServiceError]) -> Iterator[type[ServiceError]]:
    for one in of.__subclasses__():
        yield one
        yield from _subclasses(one)


@cache
def _texts() -> set[str]:
    """All texts of the product's code."""
    package = [path for path in SOURCES if path.is_relative_to(ROOT / "mercato")]
    nodes = (node for path in package for node in _nodes(path))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@cache
def _nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(SOURCES[path])))


@cache
def _ends_of_paths() -> set[str]:
    """`orders/placing.py` and `placing.py`, and so on, of all files."""
    folders = [ROOT / name for name in ("mercato", "tests", "bench", "deploy", "docs", "requirements")]
    paths = [*ROOT.glob("*.*"), *(path for folder in folders for path in folder.rglob("*.*"))]
    parts = [path.relative_to(ROOT).parts for path in paths]
    return {"/".join(names[start:]) for names in parts for start in range(len(names))}


@cache
def _classes() -> list[tuple[str, set[str]]]:
    return [
        (node.name, {name for part in ast.walk(node) for name in _named(part)})
        for path in SOURCES
        for node in _nodes(path)
        if isinstance(node, ast.ClassDef)
    ]


@cache
def _top_level(path: Path) -> set[str]:
    return {name for node in ast.parse(SOURCES[path]).body for name in _named(node)}


def _named(node: ast.AST) -> Iterator[str]:
    """What a statement gives a name to."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (
            t.id if isinstance(t, ast.Name) else t.attr for t in targets if isinstance(t, ast.Name | ast.Attribute)
        )


def checked(document: Path) -> str:
    """The text of a document without the figures of a run, which name what was at that commit."""
    text = document.read_text()
    head, begin, rest = text.partition(bench_document.BEGIN)
    return head + rest.partition(bench_document.END)[2] if begin else text


@pytest.mark.parametrize("name", DOCUMENTS)
def test_everything_that_a_document_names_exists(name: str) -> None:
    assert wrong_names(checked(DOCUMENTS[name])) == []


def test_everything_that_a_docstring_of_the_product_names_exists() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {found}"
        for path in SOURCES
        if path.is_relative_to(ROOT / "mercato")
        for node in _nodes(path)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for found in wrong_names(ast.get_docstring(node) or "")
    ]

    assert wrong == []


@pytest.mark.parametrize("texts", [explained.EXPLAINED, docs.REMEDIES], ids=["explained", "remedies"])
def test_everything_that_the_description_of_the_api_names_exists(texts: Mapping[str, str]) -> None:
    assert [(name, found) for name, text in texts.items() for found in wrong_names(text)] == []


@pytest.mark.parametrize("code", sorted(code for code, text in docs.REMEDIES.items() if "details." in text))
def test_a_remedy_names_details_that_the_problem_has(code: str) -> None:
    error = next(error for error in _subclasses(ServiceError) if error.code == code)
    shown = examples.problem(examples.error(error))["details"]

    assert [name for name in re.findall(r"details\.(\w+)", docs.REMEDIES[code]) if name not in shown] == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`make bench`, `make bend`, make sure", "target of make: bend"),
        ("```sh\nmercato up\nmercato upp\n```", "command: mercato upp"),
        ("`mercato users list`, `mercato users lost`", "command: mercato users lost"),
        ("`--port 1`, `--prot 1`", "option: --prot"),
        ("MERCATO_DATA, MERCATO_ORDERS_CUSTOMER_*, MERCATO_DATE", "setting: MERCATO_DATE"),
        ("MERCATO_ORDERS_GUESTS_*", "setting: MERCATO_ORDERS_GUESTS_*"),
        ("`mercato_http_shed_total{class}`, `mercato_http_shade_total{class}`", "metric: mercato_http_shade_total"),
        ("`mercato_saga_fenced_total`, `mercato_saga_fended_total`", "metric: mercato_saga_fended_total"),
        ("logs `sequence_moved`, and the log `sequence_lost`", "log event: sequence_lost"),
        ("the log has `key_refused` or `key_reused`", "log event: key_reused"),
        ("GET /orders/ID/history, GET /orders/1/geography", "route: GET /orders/1/geography"),
        ("`test_everything_that_a_document_names_exists`, `test_it`", "test: test_it"),
        ("`orders.out_of_stock`, `order.paid`, `orders.place`, `orders.no_such`", "code: orders.no_such"),
        ("`orders/placing.py`, `orders/plating.py`", "file: orders/plating.py"),
        ("    make test ARGS=tests/docs/test_names.py tests/docs/test_games.py", "file: tests/docs/test_games.py"),
        ("`Retry.SAFE`, `Retry.SAVE`", "member: Retry.SAVE"),
        ("`topology.SERVICES`, `topology.Serving`", "member: topology.Serving"),
        (f"all {len(SHOP)} invariants, 3 invariants", "count: 3 invariants"),
        (f"all {len(topology.SERVICES)} databases, two databases, the eight databases", "count: eight databases"),
        (f"the {len(topology.SERVICES)} services, all nine services", "count: nine services"),
        ("its two operations, the 3 operations", "count: 3 operations"),
        (f"{len(SAFEGUARDS)} safeguards, 2 safeguards", "count: 2 safeguards"),
        ("some 12 settings, all 12 settings", "count: 12 settings"),
    ],
)
def test_a_name_of_what_is_not_there_is_found(text: str, wrong: str) -> None:
    assert wrong_names(text) == [wrong]


def test_every_target_of_make_is_in_the_table_for_contributors() -> None:
    targets = re.findall(r"^([a-z-]+):.* ## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"`make ([a-z-]+)`", (ROOT / "CONTRIBUTING.md").read_text())

    assert len(targets) > 15
    assert set(targets) - set(listed) - {"help"} == set()


def test_every_option_of_up_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    options = {name for name in _options_of(app["up"]) if name.startswith("--") and "empty" not in name}

    assert {"--port", "--no-demo"} <= options
    assert [name for name in sorted(options) if f"`{name}" not in text] == []


def test_every_command_is_in_the_readme() -> None:
    table = (ROOT / "README.md").read_text().partition("## The command line")[2].partition("\n## ")[0]

    assert [name for name in app if not name.startswith("-") and not re.search(rf"`(mercato )?{name}\b", table)] == []
