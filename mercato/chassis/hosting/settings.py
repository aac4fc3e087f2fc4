"""What a process is told by its environment, read once at start-up.

Every variable begins with `MERCATO_`. A wrong one ends the start with a sentence that names it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


class SettingsError(Exception):
    """A sentence that names the variable and what is wrong with it."""


class Settings(BaseSettings):
    """The settings of a process, with what they are when nobody says otherwise."""

    model_config = SettingsConfigDict(env_prefix="MERCATO_", extra="ignore", env_ignore_empty=True)

    postgres_dsn: SecretStr | None = None
    """An administrator's DSN of a PostgreSQL >= 16 to use instead of the embedded one."""
    secret: SecretStr | None = None
    """At least 32 characters from which all keys and database passwords are derived, instead of `<data>/secret`.

    Machines that share one PostgreSQL need the same one."""
    transport: Literal["local", "loopback"] = "local"
    """How services reach each other; `loopback` encodes every message and repeats what may be repeated, for tests."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """`info` logs every request."""

    pool_size: Annotated[int, Field(ge=1, le=50)] = 6
    """Database connections of one service in one process, at most."""
    audit_seconds: Annotated[float, Field(ge=0)] = 300.0
    """How often the shop checks its own books, all its processes together; 0: never."""
    faults: str = ""
    """Faults to inject at start, for crash tests: `orders.place.after_commit=kill`."""

    @property
    def log_requests(self) -> bool:
        return self.log_level in ("debug", "info")


def service_options(services: Iterable[str]) -> dict[str, str]:
    """The variables that belong to services: `MERCATO_<SERVICE>_<OPTION>`. Each service reads its own."""
    prefixes = tuple(f"MERCATO_{service.upper()}_" for service in services)
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes) and value}


def load() -> Settings:
    """Reads the environment. Raises `SettingsError`."""
    try:
        settings = Settings()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = "MERCATO_" + str(first["loc"][0]).upper()
        raise SettingsError(f"The setting {name} is not valid: {first['msg']}.") from None
    if settings.secret is not None and len(settings.secret.get_secret_value()) < 32:
        raise SettingsError("The setting MERCATO_SECRET is not valid: it must have at least 32 characters.")
    return settings
