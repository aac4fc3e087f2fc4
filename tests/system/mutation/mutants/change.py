"""A change that can be made in a file."""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class Change(msgspec.Struct, frozen=True):
    """`apply` gives the text of the whole file with the change. `statement`: the first and the last line of the
    statement that it is in; of a compound statement those of its head."""

    kind: str
    line: int
    statement: tuple[int, int]
    function: str
    apply: Callable[[], str]


MODULE = "<module>"
"""The function of what is in none."""
