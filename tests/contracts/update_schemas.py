"""Commits to the contracts as they are now: writes their schemas, field numbers and protos, which a test compares.

    python tests/contracts/update_schemas.py [--break]

The schemas go to `tests/contracts/schemas/`, the numbers to `mercato/contracts/field_numbers.json`, the protos of the
public gRPC API to `proto/`. Refuses a change of a schema that is not additive. With `--break` it writes that too: for a
contract that is not deployed yet. Numbers are only ever added.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mercato
from mercato import topology
from mercato.chassis.contract import Contract
from mercato.chassis.contract.compatibility import Chassis, breaks, misplaced, schemas
from mercato.chassis.messaging.outbox import EventLog
from mercato.contracts import field_numbers, proto_text
from mercato.contracts.field_numbers import Numbers
from mercato.gateway.public import proto_files

FOLDER = Path(__file__).with_name("schemas")
FIELD_NUMBERS = Path(mercato.__file__).parent / "contracts/field_numbers.json"
PROTOS = Path(mercato.__file__).parents[1] / "proto"
BUF = "buf.yaml"
COMMAND = "make schemas"


def contracts() -> dict[str, type[Contract]]:
    """Every contract of the shop, by its name: those of its services, and those of the chassis."""
    return {**topology.SERVICES, "chassis": Chassis, "log": EventLog}


def committed(service: str) -> dict[str, Any] | None:
    """The committed schemas of a contract; None where it has none."""
    file = FOLDER / f"{service}.json"
    return json.loads(file.read_text()) if file.exists() else None


def committed_numbers() -> Numbers:
    return field_numbers.read(FIELD_NUMBERS.read_bytes()) if FIELD_NUMBERS.exists() else {}


def protos(numbers: Numbers) -> Mapping[str, str]:
    """The files of `proto/`, by their paths in it."""
    made = {file.path: proto_text.written(file) for file in proto_files(topology.SERVICES, numbers)}
    return {BUF: proto_text.BUF, **made}


def committed_protos() -> Mapping[str, str]:
    """The files of `proto/` that are made here; others, such as those of the transport, are written by hand."""
    found = {path.relative_to(PROTOS).as_posix(): path.read_text() for path in PROTOS.rglob("*") if path.is_file()}
    return {path: text for path, text in found.items() if path == BUF or text.startswith(proto_text.HEADER)}


def write_protos(made: Mapping[str, str]) -> None:
    for path in committed_protos().keys() - made.keys():
        (PROTOS / path).unlink()
    for path, text in made.items():
        file = PROTOS / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def text_of(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 1, and nothing written, where a change is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--break", action="store_true", dest="breaking", help="write a change that is not additive")
    given = parser.parse_args(arguments)
    made = {service: schemas(contract) for service, contract in sorted(contracts().items())}
    wrong = [f"{service}: {sentence}" for service, schema in made.items() for sentence in misplaced(schema)]
    broken = [f"{s}: {sentence}" for s, new in made.items() if (old := committed(s)) for sentence in breaks(old, new)]
    sys.stderr.writelines(f"{sentence}\n" for sentence in (*wrong, *broken))
    if wrong or (broken and not given.breaking):
        return 1
    FOLDER.mkdir(exist_ok=True)
    for service, schema in made.items():
        (FOLDER / f"{service}.json").write_text(text_of(schema))
    numbers = field_numbers.assign(committed_numbers(), contracts().values())
    FIELD_NUMBERS.write_bytes(field_numbers.written(numbers))
    write_protos(protos(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
