"""The environment variables of Mercato: every module but `settings.py` reads and writes them through this one.

A variable that is set to an empty text counts as not set. An unknown name is a misspelling, and ends the start with a
sentence that has the nearest known one: otherwise its lack of effect would be noticed only when it is needed.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final

PREFIX: Final = "MERCATO_"
TESTS_PREFIX: Final = "MERCATO_TEST_"
"""Names that tests use among themselves."""
SERVICE_LINK: Final = re.compile(r"MERCATO\w*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)\Z")
LINK_PORT: Final = re.compile(r"(tcp|udp|sctp)://")


class SettingsError(Exception):
    """A sentence that names the variable and what is wrong with it."""


def value(name: str) -> str | None:
    """The value of a variable; None where it is not set, or empty."""
    return os.environ.get(name) or None


def given() -> Mapping[str, str]:
    """All variables of Mercato that have a value, but for those of tests."""
    return {
        name: value
        for name, value in os.environ.items()
        if value and name.startswith(PREFIX) and not name.startswith(TESTS_PREFIX)
    }


def forget_empty() -> None:
    """Removes empty variables of Mercato: libraries would treat them as values."""
    for name in [name for name, value in os.environ.items() if name.startswith(PREFIX) and not value]:
        del os.environ[name]


def forget_postgres() -> None:
    """Removes the variables of PostgreSQL's clients: what a DSN leaves out has our default, not one of the shell."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]


def replace(values: Mapping[str, str]) -> None:
    """Sets variables of this process, and of the processes that it starts."""
    os.environ.update(values)


def set_default(name: str, value: str) -> None:
    """Sets a variable unless it has a value."""
    if not os.environ.get(name):
        os.environ[name] = value


def for_child(without: Collection[str] = (), **added: str) -> dict[str, str]:
    """The environment for a child process."""
    return {**{name: value for name, value in os.environ.items() if name not in without}, **added}


def is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes has set the variable, for a `Service` named `mercato` or `mercato-...` in the namespace."""
    if not SERVICE_LINK.match(name):
        return False
    return not name.endswith("_PORT") or "_SERVICE_" in name or LINK_PORT.match(value) is not None


def unknown(known: Collection[str], passed_over: Iterable[str] = ()) -> list[str]:
    """The variables that are set and not `known`; those that begin with a prefix of `passed_over` are left out."""
    prefixes = tuple(passed_over)
    return sorted(
        name
        for name, value in given().items()
        if name not in known and not name.startswith(prefixes) and not is_service_link(name, value)
    )


def no_such(name: str, known: Iterable[str]) -> str:
    """The sentence about a variable that is not known, with the nearest name that is."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else "`mercato settings` lists those that there are."
    return f"There is no setting {name}: {hint}"
