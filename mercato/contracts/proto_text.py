"""Protobuf files as texts, with the docstrings of the contracts as comments; reads the source of the contracts.

`make schemas` writes them, and nothing of the running shop needs them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterator, Mapping
from typing import Final

from .protos import ProtoEnum, ProtoField, ProtoFile, ProtoMessage, ProtoService, package_of

WIDTH: Final = 116
HEADER: Final = "// Written by `make schemas` from the contracts of the shop: change those, not this file.\n"

BUF: Final = """\
# The rules for the files in this folder. `make schemas` writes them from mercato/contracts, and `make test` runs buf.
version: v2
lint:
  use:
    - STANDARD
  except:
    # Requests and answers are the messages of the contracts: what an order is, it is in every answer.
    - RPC_REQUEST_RESPONSE_UNIQUE
    - RPC_REQUEST_STANDARD_NAME
    - RPC_RESPONSE_STANDARD_NAME
breaking:
  use:
    - FILE
"""


def written(file: ProtoFile) -> str:
    """The text of a file."""
    imports = "".join(f'import "{path}";\n' for path in file.imports)
    parts = [HEADER + '\nsyntax = "proto3";\n', f"package {file.package};\n", imports]
    parts += [_service(file.service)] if file.service else []
    parts += [_message(message, file.package) for message in file.messages]
    parts += [_enum(enum) for enum in file.enums]
    return "\n".join(part for part in parts if part)


def _service(service: ProtoService) -> str:
    package, methods = package_of(service.owner.service), {method.name for method in service.methods}
    lines = [*_comment(inspect.getdoc(service.owner), ""), f"service {service.name} {{"]
    for i, method in enumerate(service.methods):
        short = [_short(name, package) for name in (method.request, method.answer)]
        # Within the service, the name of a method hides that of a message.
        request, answer = (f".{package}.{name}" if name in methods else name for name in short)
        lines += [""] if i else []
        lines += [*_comment(method.public.comment, "  "), f"  rpc {method.name}({request}) returns ({answer});"]
    return "\n".join([*lines, "}", ""])


def _message(message: ProtoMessage, package: str) -> str:
    docs = field_docs(message.owner)
    lines = [*_comment(_own_doc(message.owner), ""), f"message {message.name} {{"]
    if message.reserved:
        lines += _reserved(message.reserved)
    for field in message.fields:
        lines += _comment(_field_doc(field, docs), "  ")
        label = "repeated " if field.is_repeated else "optional " if field.is_optional else ""
        lines.append(f"  {label}{_short(field.type, package)} {field.name} = {field.number};")
    if lines[-1].endswith("{"):
        return "\n".join([*lines[:-1], lines[-1] + "}", ""])
    return "\n".join([*lines, "}", ""])


def _reserved(reserved: Mapping[int, str]) -> list[str]:
    numbers = ", ".join(map(str, reserved))
    names = ", ".join(f'"{name}"' for name in reserved.values())
    return [f"  reserved {numbers};", f"  reserved {names};"]


def _enum(enum: ProtoEnum) -> str:
    lines = [f"enum {enum.name} {{"]
    lines += _reserved(enum.reserved) if enum.reserved else []
    lines += [f"  {name} = {number};" for name, number in enum.values]
    return "\n".join([*lines, "}", ""])


def _short(type_: str, package: str) -> str:
    """The name of a type within a package: without the package for its own."""
    home, _, name = type_.rpartition(".")
    return name if home == package else type_


def _field_doc(field: ProtoField, docs: Mapping[str, str]) -> str:
    default = field.default
    if field.shape == "enum":
        is_given = default in [value for _, value in field.numbers]
    else:
        is_given = isinstance(default, (str, int, float)) and bool(default)
    said = f"Left out, it is {str(default).lower() if isinstance(default, bool) else default}." if is_given else ""
    return "\n\n".join(part for part in (docs.get(field.name, ""), said) if part)


def _own_doc(owner: type) -> str:
    """The docstring of a class itself, not of its base."""
    doc = owner.__dict__.get("__doc__")
    return inspect.cleandoc(doc) if doc else ""


def _comment(text: str | None, indent: str) -> list[str]:
    lines = itertools.chain.from_iterable(_wrapped(line, len(indent)) for line in (text or "").splitlines())
    return [f"{indent}// {line}".rstrip() for line in lines]


def _wrapped(line: str, indent: int) -> Iterator[str]:
    yield from textwrap.wrap(line, WIDTH - indent) or [""]


@functools.cache
def field_docs(owner: type) -> Mapping[str, str]:
    """The docstring that follows each field of a class, where there is one."""
    source = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    body = source.body[0].body if isinstance(source.body[0], ast.ClassDef) else []
    found: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            found[statement.target.id] = inspect.cleandoc(following.value.value)
    return found
