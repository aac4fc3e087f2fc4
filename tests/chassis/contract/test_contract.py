"""Contracts: what a type checker knows of them, what they say as JSON schemas, and how they may change."""

from __future__ import annotations

import copy
import datetime
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import msgspec
import pytest

from mercato.chassis.contract import (
    Contract,
    Empty,
    ErrorMessage,
    Kind,
    Message,
    Open,
    Retry,
    ServiceError,
    StaleVersion,
    batched,
    check_version,
    single,
)
from mercato.chassis.contract.compatibility import breaks, schemas
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.rpc.server import Server
from mercato.testing.assertions import needs_assertions

ROOT = Path(__file__).parents[3]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


UPDATE = load(ROOT / "tests/contracts/update_schemas.py")


# --------------------------------------------------------------------------------------------------------------- types

SNIPPET = """
from collections.abc import Sequence
from typing import assert_type

from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.contract import Batch, Empty, ServiceError
from mercato.chassis.rpc.server import Server
from mercato.contracts.users import GetUser, Register, SignOut, User, UserNotFound, Users


async def calls(users: Users) -> None:
    assert_type(await users.get(GetUser(id=1)), User)
    assert_type(await users.get.many([GetUser(id=1)]), Sequence[User | ServiceError])
    assert_type(await users.sign_out(SignOut(refresh_token="")), Empty)
    await users.get(Register(email="", name="", password=""))  # expect: reportArgumentType
    users.get(GetUser(id=1)).name  # expect: reportAttributeAccessIssue
    GetUser(id=1).id = 2  # expect: reportAttributeAccessIssue


async def get(batch: Batch[GetUser]) -> Sequence[User | UserNotFound]:
    assert_type(batch[0], GetUser)
    return [UserNotFound(user_id=request.id) for request in batch]


async def get_one(request: GetUser) -> User:
    raise UserNotFound(user_id=request.id)


async def wrong_answer(batch: Batch[GetUser]) -> Sequence[Empty]:
    return [Empty() for _ in batch]


async def wrong_request(batch: Batch[SignOut]) -> Sequence[User]:
    return []


async def register(request: Register) -> User:
    raise UserNotFound(user_id=1)


server = Server(Users, SystemClock())
server.register(Users.get, get)
server.register(Users.register, register)
server.register(Users.get, get_one)  # expect: reportArgumentType
server.register(Users.get, wrong_answer)  # expect: reportArgumentType
server.register(Users.get, wrong_request)  # expect: reportArgumentType
server.register(Users.register, get)  # expect: reportArgumentType
"""


@pytest.mark.slow
def test_a_type_checker_knows_answers_and_refuses_wrong_handlers(tmp_path: Path):
    (tmp_path / "snippet.py").write_text(SNIPPET)
    settings = {"include": ["snippet.py"], "extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings | {"reportUnusedCoroutine": False}))
    program = shutil.which("basedpyright", path=str(Path(sys.executable).parent)) or shutil.which("basedpyright")
    assert program, "basedpyright is not installed"
    done = subprocess.run(
        [program, "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = {
        d["range"]["start"]["line"] + 1: str(d.get("rule"))
        for d in json.loads(done.stdout)["generalDiagnostics"]
        if d["severity"] == "error"
    }
    expected = {
        number: line.partition("# expect: ")[2]
        for number, line in enumerate(SNIPPET.splitlines(), 1)
        if "# expect: " in line
    }
    assert {line: expected.get(line, rule) if rule in ALIKE else rule for line, rule in found.items()} == expected


ALIKE = {"reportArgumentType", "reportCallIssue"}
"""Which of the two it is depends on how many overloads a checker considers."""


# ------------------------------------------------------------------------------------------------------------ contracts


Mood = Literal["glad", "sad"]


class Ask(Message):
    number: int
    colour: str = "red"
    mood: Mood | None = None


class Said(Message):
    number: int
    mood: Open[Mood] = "glad"


class Changed(Message):
    at: datetime.datetime


class Refused(ServiceError, code="test_contract.refused", kind=Kind.REFUSED):
    """With a default, for what older processes do not send."""

    sentence = "Not {number}, because of {names}."
    number: int
    names: tuple[str, ...] = ()


class Shop(Contract, name="test_contract"):
    read = batched(Ask, Said, allow=frozenset({"staff", "customer"}), retry=Retry.SAFE, size=64)
    change = single(Ask, Empty, allow=frozenset({"staff"}))

    events: ClassVar = {"thing.changed": Changed}


def test_operations_know_their_names():
    assert {name: o.full_name for name, o in Shop.operations.items()} == {
        "read": "test_contract.read",
        "change": "test_contract.change",
    }
    assert Shop.read is Shop.operations["read"]


def test_messages_are_frozen():
    with pytest.raises(AttributeError):
        Ask(number=1).number = 2  # pyright: ignore[reportAttributeAccessIssue]  # that is what is tested


@needs_assertions
def test_a_server_is_complete_with_a_handler_for_each_operation_of_its_contract():
    server = Server(Shop, SystemClock())
    with pytest.raises(AssertionError, match=r"no handler for \['change', 'read'\]"):
        server.complete()
    with pytest.raises(AssertionError, match="is not of this contract"):
        server.register(single(Ask, Empty, allow=frozenset()), lambda request: None)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_an_error_speaks_its_details():
    assert str(Refused(number=3, names=("a", "b"))) == "Not 3, because of a, b."
    assert str(Refused(number=3)) == "Not 3, because of nothing."
    assert Refused(number=3).details == {"number": 3, "names": ()}


@needs_assertions
@pytest.mark.parametrize("details", [{}, {"number": 1, "colour": "red"}], ids=["missing", "unknown"])
def test_an_error_has_exactly_its_details(details: dict[str, Any]):
    with pytest.raises(AssertionError):
        Refused(**details)


@needs_assertions
def test_two_errors_cannot_share_a_code():
    with pytest.raises(AssertionError, match="share the code"):
        type("Again", (ServiceError,), {}, code="test_contract.refused", kind=Kind.REFUSED)


def test_a_copy_of_an_error_is_another_object_with_the_same_to_say():
    error = Refused(number=1)
    error.retry_after_s = 7
    error.__cause__ = KeyError()
    copy = error.copy()
    assert copy is not error
    assert (type(copy), str(copy), copy.details, copy.retry_after_s) == (Refused, str(error), error.details, 7)
    assert copy.__cause__ is error.__cause__


def test_a_detail_that_an_older_process_does_not_send_has_its_default():
    error = ErrorMessage("test_contract.refused", Kind.REFUSED, "Not 1.", {"number": 1}).to_error()
    assert isinstance(error, Refused)
    assert error.names == ()


def test_a_message_ignores_what_it_does_not_know_and_fills_what_is_not_sent():
    assert msgspec.json.decode(b'{"number": 1, "newer": true}', type=Ask) == Ask(number=1, colour="red")


# -------------------------------------------------------------------------------------------------------------- schemas


@pytest.mark.parametrize("service", sorted(UPDATE.contracts()))
def test_a_contract_has_changed_additively_and_its_schemas_are_committed(service: str):
    committed, now = UPDATE.committed(service), schemas(UPDATE.contracts()[service])
    assert committed is not None, f"{service} has no committed schemas: run `{UPDATE.COMMAND}`"
    assert breaks(committed, now) == [], "processes with the older contract could not talk to this one"
    assert committed == json.loads(json.dumps(now)), f"the change is additive: run `{UPDATE.COMMAND}` and commit it"


def test_no_schemas_are_left_of_contracts_that_are_gone():
    assert {file.stem for file in UPDATE.FOLDER.iterdir()} == set(UPDATE.contracts())


def test_schemas_hold_operations_errors_and_components():
    made = schemas(Shop)
    assert made["operations"]["read"] == {
        "request": {"$ref": "#/components/Ask"},
        "answer": {"$ref": "#/components/Said"},
        "batch": 64,
        "deadline_ms": 10_000,
        "retry": "safe",
        "allow": ["customer", "staff"],
    }
    assert made["errors"] == {"test_contract.refused": {"kind": "refused", "details": {"$ref": "#/components/Refused"}}}
    assert made["events"] == {"thing.changed": {"$ref": "#/components/Changed"}}
    assert set(made["components"]) == {"Ask", "Said", "Empty", "Refused", "Changed"}
    assert made["components"]["Changed"]["properties"]["at"] == {"type": "string", "format": "date-time"}
    assert made["components"]["Said"]["properties"]["mood"]["x-extensible-enum"] == ["glad", "sad"]
    assert made["components"]["Ask"]["properties"]["mood"]["anyOf"][0] == {"enum": ["glad", "sad"]}
    assert made["components"]["Ask"]["required"] == ["number"]


Change = Callable[[dict[str, Any]], object]

ADDITIVE: dict[str, Change] = {
    "nothing": lambda s: None,
    "a new operation": lambda s: s["operations"].update(more=s["operations"]["read"]),
    "a new field with a default": lambda s: s["components"]["Ask"]["properties"].update(
        x={"type": "integer", "default": 0}
    ),
    "a new error": lambda s: s["errors"].update({"test_contract.more": {"kind": "invalid", "details": {}}}),
    "a larger batch": lambda s: s["operations"]["read"].update(batch=65),
    "another deadline": lambda s: s["operations"]["read"].update(deadline_ms=1),
    "a role more": lambda s: s["operations"]["change"].update(allow=["customer", "staff"]),
    "a promise more": lambda s: s["operations"]["change"].update(retry="keyed"),
    "another docstring": lambda s: s["components"]["Ask"]["properties"]["number"].update(description="The number."),
    "a default where there was none": lambda s: s["components"]["Ask"].update(required=[]),
    "a new event": lambda s: s["events"].update({"thing.made": s["events"]["thing.changed"]}),
    "a new value of an open enumeration": lambda s: s["components"]["Said"]["properties"]["mood"].update(
        {"x-extensible-enum": ["sad", "new", "glad"]}
    ),
    "a new value of a closed enumeration": lambda s: s["components"]["Ask"]["properties"]["mood"]["anyOf"][0].update(
        enum=["sad", "new", "glad"]
    ),
}

BREAKING: dict[str, Change] = {
    "operation read is gone": lambda s: s["operations"].pop("read"),
    "operation read: another request": lambda s: s["operations"]["read"].update(request={"$ref": "#/components/Said"}),
    "operation read: another answer": lambda s: s["operations"]["read"].update(answer={"$ref": "#/components/Ask"}),
    "operation read: takes 63": lambda s: s["operations"]["read"].update(batch=63),
    "operation read: was safe": lambda s: s["operations"]["read"].update(retry="keyed"),
    "operation read: no longer for staff": lambda s: s["operations"]["read"].update(allow=["customer"]),
    "error test_contract.refused is gone": lambda s: s["errors"].clear(),
    "error test_contract.refused: was refused": lambda s: s["errors"]["test_contract.refused"].update(kind="conflict"),
    "Said is gone": lambda s: s["components"].pop("Said"),
    "Said is something else": lambda s: s["components"].update(Said={"enum": ["a"]}),
    "Ask.colour is gone": lambda s: s["components"]["Ask"]["properties"].pop("colour"),
    "Ask.number has another": lambda s: s["components"]["Ask"]["properties"].update(number={"type": "string"}),
    "Ask.colour has another": lambda s: s["components"]["Ask"]["properties"]["colour"].update(default="blue"),
    "Ask.x has no default": lambda s: s["components"]["Ask"].update(required=["number", "x"]),
    "event thing.changed is gone": lambda s: s["events"].clear(),
    "event thing.changed has another message": lambda s: s["events"].update(
        {"thing.changed": {"$ref": "#/components/Said"}}
    ),
    "Said.mood no longer has glad": lambda s: s["components"]["Said"]["properties"]["mood"].update(
        {"x-extensible-enum": ["sad"]}
    ),
    "Ask.mood no longer has glad": lambda s: s["components"]["Ask"]["properties"]["mood"]["anyOf"][0].update(
        enum=["sad"]
    ),
    "Said.mood has another": lambda s: s["components"]["Said"]["properties"].update(mood={"enum": ["glad", "sad"]}),
    "Refused.number has another": lambda s: s["components"]["Refused"]["properties"].update(number={"type": "string"}),
}


def changed(change: Change) -> tuple[dict[str, Any], dict[str, Any]]:
    old = json.loads(json.dumps(schemas(Shop)))
    new = copy.deepcopy(old)
    change(new)
    return old, new


@pytest.mark.parametrize("change", ADDITIVE.values(), ids=ADDITIVE.keys())
def test_an_additive_change_is_accepted(change: Change):
    assert breaks(*changed(change)) == []


@pytest.mark.parametrize(("sentence", "change"), BREAKING.items(), ids=BREAKING.keys())
def test_a_breaking_change_is_named(sentence: str, change: Change):
    (found,) = breaks(*changed(change))
    assert found.startswith(sentence)


@pytest.mark.parametrize("expected", [None, 3])
def test_a_version_that_was_seen_or_not_asked_for_is_accepted(expected: int | None):
    check_version(expected, 3)


@pytest.mark.parametrize("expected", [2, 4])
def test_another_version_is_stale(expected: int):
    with pytest.raises(StaleVersion) as refused:
        check_version(expected, 3)
    assert refused.value.details == {"expected": expected, "actual": 3}
