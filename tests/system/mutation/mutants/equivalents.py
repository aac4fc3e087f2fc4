"""Equivalent mutants: a change that no caller can observe is listed in `equivalent.toml`, with the reason."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from system.mutation.mutants.choosing import Mutant

FILE: Final = "tests/system/mutation/equivalent.toml"


class EquivalentMutant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`line`: the changed lines as they are with the change, joined, without indentation."""

    file: str
    function: str
    line: str
    reason: str


class EquivalentMutants(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    equivalent: tuple[EquivalentMutant, ...] = ()


def read(root: Path) -> tuple[EquivalentMutant, ...]:
    path = root / FILE
    return msgspec.convert(tomllib.loads(path.read_text()), EquivalentMutants).equivalent


def reason(mutant: Mutant, known: Sequence[EquivalentMutant]) -> str | None:
    """Why a mutant is equivalent; None where it is not listed."""
    for one in known:
        if (one.file, one.function, one.line) == (mutant.file, mutant.function, mutant.mutated):
            return one.reason
    return None
