"""Options of a service: environment variables that the operator sets, read once at start-up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

import msgspec

from .variables import PREFIX, is_service_link, no_such

S = TypeVar("S", bound=msgspec.Struct)


class OptionsReader(Protocol):
    """Reads the options of one service into its struct; options that are not set have the defaults of the struct."""

    def __call__(self, kind: type[S]) -> S: ...


class OptionError(Exception):
    """A sentence that names the variable and what is wrong with it."""


class OptionReader:
    """The options of `service` from environment variables: `MERCATO_INVENTORY_HOLD_SECONDS` is its `hold_seconds`."""

    def __init__(self, service: str, given: Mapping[str, str]) -> None:
        self._prefix = f"{PREFIX}{service.upper()}_"
        self._own = {
            name.removeprefix(self._prefix).lower(): value
            for name, value in given.items()
            if name.startswith(self._prefix) and not is_service_link(name, value)
        }
        self._known: frozenset[str] = frozenset()

    def __call__(self, kind: type[S]) -> S:
        """Raises `OptionError` for a value that does not fit."""
        known = {field.name: field.type for field in msgspec.structs.fields(kind)}
        self._known |= known.keys()
        self.require_known()
        values: dict[str, object] = {}
        for name, value in self._own.items():
            try:
                values[name] = msgspec.convert(value, known[name], strict=False)
            except msgspec.ValidationError as error:
                raise OptionError(f"The setting {self._prefix}{name.upper()} is not valid: {error}.") from None
        return kind(**values)

    def require_known(self) -> None:
        """Raises `OptionError` for an option that the service lacks. Called after `build`, which may read none."""
        for name in sorted(self._own.keys() - self._known):
            known = [self._prefix + each.upper() for each in self._known]
            raise OptionError(no_such(self._prefix + name.upper(), known))
