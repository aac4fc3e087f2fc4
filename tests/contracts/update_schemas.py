"""Writes the JSON schemas of all contracts to `schemas/`, where a test compares them with the contracts.

    python tests/contracts/update_schemas.py

Refuses a change that is not additive. With `--break` it writes that too: for a contract that nobody has deployed yet.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mercato import topology
from mercato.chassis.contract import Contract, schemas
from mercato.chassis.contract.compatibility import breaks

FOLDER = Path(__file__).with_name("schemas")
COMMAND = "make schemas"


def contracts() -> dict[str, type[Contract]]:
    """Every contract of the shop, by the name of its service."""
    return dict(topology.SERVICES)


def committed(service: str) -> dict[str, Any] | None:
    file = FOLDER / f"{service}.json"
    return json.loads(file.read_text()) if file.exists() else None


def main(arguments: list[str]) -> int:
    FOLDER.mkdir(exist_ok=True)
    for service, contract in sorted(contracts().items()):
        now, before = schemas(contract), committed(service)
        broken = breaks(before, now) if before else []
        for sentence in broken:
            sys.stderr.write(f"{service}: {sentence}\n")
        if broken and "--break" not in arguments:
            return 1
        (FOLDER / f"{service}.json").write_text(json.dumps(now, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
