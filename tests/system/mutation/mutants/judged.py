"""Survivors that were judged: a change that no caller can observe is written to `equivalent.toml`, with the reason."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from system.mutation.mutants.choosing import Mutant

FILE: Final = "tests/system/mutation/equivalent.toml"


class Judgement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`line`: the changed lines as they are with the change, joined, without indentation."""

    file: str
    function: str
    line: str
    reason: str


class Judgements(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    equivalent: tuple[Judgement, ...] = ()


def read(root: Path) -> tuple[Judgement, ...]:
    path = root / FILE
    return msgspec.convert(tomllib.loads(path.read_text()), Judgements).equivalent


def reason(mutant: Mutant, judgements: Sequence[Judgement]) -> str | None:
    """Why a mutant is equivalent; None where it was not judged so."""
    for judged in judgements:
        if (judged.file, judged.function, judged.line) == (mutant.file, mutant.function, mutant.mutated):
            return judged.reason
    return None
