"""Which processes a shop has, and what each serves: one small file for each placement.

A file lists processes; each hosts the gateway, services, or both, and runs `replicas` times. The code is the same in
all of them: a process calls services of other processes over its transport.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

import msgspec


class ProcessPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of process."""

    hosts: tuple[str, ...]
    """Services, and `gateway`."""
    replicas: int = 1


class Placement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All processes of a shop, by a name for people."""

    about: str
    processes: Mapping[str, ProcessPlan]


def read(name: str) -> Placement:
    """The placement of that name. Raises `FileNotFoundError`."""
    text = Path(__file__).with_name(f"{name}.toml").read_text("utf-8")
    return msgspec.convert(tomllib.loads(text), Placement)
