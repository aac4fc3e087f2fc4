"""The protobuf files of the public gRPC API: committed, in the style of buf, and never changed for old clients."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import pytest
from msgspec import Meta

from contracts import update_schemas
from contracts.release import FIRST_PROTOS, Releases
from mercato import topology
from mercato.chassis.contract import GIVEN, Contract, Message, Open, filled, single
from mercato.contracts import field_numbers, protos
from mercato.contracts.proto_text import written
from mercato.contracts.protos import PublicOperation, filling
from mercato.gateway.public import proto_files, public_operations

BUF: Final = Path(sys.executable).with_name("buf")
NUMBERS: Final = update_schemas.committed_numbers()
FILES: Final = proto_files(topology.SERVICES, NUMBERS)


def buf(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs buf in a folder. It needs no network: the files import only each other, and what buf has in it."""
    environment = {**os.environ, "BUF_CACHE_DIR": str(folder.parent / "cache"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    return subprocess.run([BUF, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the committed files."""
    return Path(shutil.copytree(update_schemas.PROTOS, tmp_path / "proto"))


def test_committed_protos_are_those_of_the_contracts():
    assert update_schemas.committed_protos() == update_schemas.protos(NUMBERS), (
        f"run `{update_schemas.COMMAND}` and commit proto/"
    )


def test_protos_pass_the_lint_and_have_the_format_of_buf(copy: Path):
    lint, formatted = buf(copy, "lint"), buf(copy, "format", "--diff", "--exit-code")

    assert (lint.returncode, lint.stdout) == (0, "")
    assert (formatted.returncode, formatted.stdout) == (0, "")


def test_a_message_with_a_name_that_is_not_in_style_fails_the_lint(copy: Path):
    plant(copy, "message GetOrder {", "message get_order {")
    plant(copy, "(GetOrder)", "(get_order)")

    assert 'Message name "get_order" should be PascalCase' in buf(copy, "lint").stdout


def test_protos_have_changed_compatibly_since_the_last_release(copy: Path):
    done = buf(copy, "breaking", "--against", str(Releases().protos()))

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("int64 total_minor = 7;", "int64 total_minor = 70;", 'Previously present field "7" with name "total_minor"'),
        ("int64 total_minor = 7;", "int64 sum_minor = 7;", 'from "total_minor" to "sum_minor"'),
        ("int64 total_minor = 7;", "string total_minor = 7;", 'from "int64" to "string"'),
        ("STATUS_CANCELLED = 4;", "STATUS_CANCELLED = 5;", 'Previously present enum value "4"'),
        ("rpc Pay(PayOrder)", "rpc PayNow(PayOrder)", 'Previously present RPC "Pay"'),
        ("  reserved 6, 9, 10;\n", "  reserved 9, 10;\n", 'Previously present reserved range "[6]"'),
    ],
)
def test_a_breaking_change_is_named(copy: Path, before: str, after: str, sentence: str):
    plant(copy, before, after)

    done = buf(copy, "breaking", "--against", str(update_schemas.PROTOS))

    assert done.returncode == 100
    assert sentence in done.stdout


def plant(folder: Path, before: str, after: str) -> None:
    file = folder / "mercato/orders/v1/orders.proto"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def test_the_first_protos_serve_until_a_release_has_some(tmp_path: Path):
    releases = Releases(tmp_path)
    assert releases.protos() == FIRST_PROTOS

    releases.file.write_text('["0.3.0"]\ncommit = ""\ncontracts = ""\n["0.4.0"]\ncommit = ""\ncontracts = ""\n')
    (releases.folder / "0.3.0/proto").mkdir(parents=True)
    assert releases.protos() == releases.folder / "0.3.0/proto"


# ---------------------------------------------------------------------------------------------------- what is in them


def test_every_public_operation_is_a_method_and_no_other_is():
    methods = {method.public.operation.full_name for file in FILES if file.service for method in file.service.methods}

    assert methods == {public.operation.full_name for public in public_operations()}
    assert "orders.place" in methods
    assert not methods & {"inventory.reserve", "payments.charge", "users.sign_in_named"}


def fields_of(message: str) -> dict[str, int]:
    found = next(m for file in FILES for m in file.messages if m.full_name == message)
    return {field.name: field.number for field in found.fields}


def test_fields_that_the_gateway_fills_are_reserved():
    place = next(m for file in FILES for m in file.messages if m.full_name == "mercato.orders.v1.PlaceOrder")

    assert place.reserved == {6: "fingerprint", 9: "expected_total", 10: "guest"}
    assert not {"fingerprint", "guest"} & set(fields_of("mercato.orders.v1.PlaceOrder"))
    for name in ("SignIn", "Refresh", "UpdateProfile", "ChangePassword", "EraseAccount"):
        assert not {"address", "session_id"} & set(fields_of(f"mercato.users.v1.{name}")), name


def test_every_other_field_has_the_number_of_its_contract():
    for file in FILES:
        module = file.package.split(".")[1]
        for message in file.messages:
            numbering = NUMBERS[module]["messages"][message.name]
            assert {**{f.number: f.name for f in message.fields}, **message.reserved} == {
                **{number: name for name, number in numbering.numbers.items()},
                **numbering.reserved,
            }, message.full_name


def requests() -> Iterable[tuple[type[Message], str, Any]]:
    for public in public_operations():
        for name, hint in field_numbers.hints_of(public.operation.request).items():
            yield public.operation.request, name, hint


def test_names_of_the_gateways_fields_are_never_left_to_clients():
    """A new message with a field of such a name is filled by the gateway, or this test names it."""
    internal = {"address", "fingerprint", "session_id", "guest", "order_nonce"}

    assert [
        (message.__name__, name)
        for message, name, hint in requests()
        if name in internal and (filling(hint) is None or filling(hint) in GIVEN)
    ] == []


# ------------------------------------------------------------------------------------------------------ how it is made

Colour = Literal["red", "green"]


class Part(Message):
    """A part."""

    colour: Open[Colour]
    size: int | None = None


class Ask(Message):
    """What is asked for."""

    id: int
    colour: Colour = "green"
    count: int = 5
    """How many."""
    note: str = ""
    secret: Annotated[bytes, Meta(extra=filled("fingerprint"))] = b""


class Said(Message):
    parts: tuple[Part, ...]
    anything: Any = None


class Shop(Contract, name="test_protos"):
    """A shop."""

    take_back = single(Ask, Said, allow=frozenset())


def test_a_file_has_comments_presence_and_numbers():
    numbers = field_numbers.assign({}, [Shop])
    public = PublicOperation(Shop.take_back, Said, "Take it back.")
    (made,) = protos.files({Shop.service: Shop}, [public], numbers)

    assert (made.path, made.package) == ("mercato/test_protos/v1/test_protos.proto", "mercato.test_protos.v1")
    text = written(made)
    assert "  // Take it back.\n  rpc TakeBack(Ask) returns (Said);\n" in text
    assert (
        "// What is asked for.\n"
        "message Ask {\n"
        "  reserved 5;\n"
        '  reserved "secret";\n'
        "  int64 id = 1;\n"
        "  // Left out, it is green.\n"
        "  optional Colour colour = 2;\n"
        "  // How many.\n"
        "  //\n"
        "  // Left out, it is 5.\n"
        "  optional int64 count = 3;\n"
        "  string note = 4;\n"
        "}\n"
    ) in text
    assert "  repeated Part parts = 1;\n  google.protobuf.Value anything = 2;\n" in text
    assert "  Colour colour = 1;\n  optional int64 size = 2;\n" in text
    assert "enum Colour {\n  COLOUR_UNSPECIFIED = 0;\n  COLOUR_RED = 1;\n  COLOUR_GREEN = 2;\n}\n" in text
