"""Options of a service: environment variables that the operator sets, read once at start-up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

import msgspec

S = TypeVar("S", bound=msgspec.Struct)


class OptionsReader(Protocol):
    """Reads the options of one service into a struct of its own, whose defaults hold for what is not set."""

    def __call__(self, kind: type[S]) -> S: ...


class OptionError(Exception):
    """A sentence that names the variable and what is wrong with it."""


def option_reader(service: str, given: Mapping[str, str]) -> OptionsReader:
    """The options of `service` out of environment variables: `MERCATO_INVENTORY_HOLD_SECONDS` is its `hold_seconds`.

    What it gives raises `OptionError` for a value that does not fit.
    """
    prefix = f"MERCATO_{service.upper()}_"
    own = {name.removeprefix(prefix).lower(): value for name, value in given.items() if name.startswith(prefix)}

    def read(kind: type[S]) -> S:
        known = {field.name: field.type for field in msgspec.structs.fields(kind)}
        if unknown := sorted(own.keys() - known.keys()):
            names = ", ".join(prefix + name.upper() for name in sorted(known))
            raise OptionError(f"There is no setting {prefix}{unknown[0].upper()}; {service} has {names}.")
        values: dict[str, object] = {}
        for name, value in own.items():
            try:
                values[name] = msgspec.convert(value, known[name], strict=False)
            except msgspec.ValidationError as error:
                raise OptionError(f"The setting {prefix}{name.upper()} is not valid: {error}.") from None
        return kind(**values)

    return read
