"""What the campaigns over the processes of a split shop have in common as commands."""

from __future__ import annotations

import argparse
import json
from typing import Any

import msgspec


def options(prog: str, description: str, *, transport: str) -> argparse.Namespace:
    """`seconds`, `seed`, `transport` and `json` as they were typed."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--transport", choices=("nats", "http", "grpc"), default=transport)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args()


def show(result: msgspec.Struct, *, as_json: bool) -> None:
    """Prints a result, for programs or for people."""
    shown: dict[str, Any] = msgspec.to_builtins(result)
    if as_json:
        print(json.dumps(shown))
        return
    for name, value in shown.items():
        print(f"{name:24} {value}")
