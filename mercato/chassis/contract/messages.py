"""Messages: frozen structs that are sent between services; and enumerations that may grow."""

from __future__ import annotations

from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Final,
    Literal,
    TypeAlias,
    TypeVar,
    dataclass_transform,
    get_args,
)

import msgspec
from msgspec import Meta

V = TypeVar("V", bound=str)

MAX_ID: Final = 2**53 - 1
"""Ids stay below 2^53, so that every JSON reader, JavaScript included, can hold them exactly."""


if TYPE_CHECKING:

    @dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
    class FrozenMeta(msgspec.StructMeta):
        """Declares to type checkers that subclasses of a frozen struct are frozen as well."""

else:
    FrozenMeta = msgspec.StructMeta  # a metaclass of our own would double the time that a message takes to make


class Message(msgspec.Struct, frozen=True, kw_only=True, metaclass=FrozenMeta):
    """A request, an answer or a part of one. Frozen; unknown fields are ignored when decoding (additive change)."""

    outcome_field: ClassVar[str] = ""
    """Of an event: the field with a code (one of few), or with a message that has a field `code`. Metrics and the log
    distinguish events of one type by it."""
    about_field: ClassVar[str] = ""
    """Of an event: the field with the id that traces are about, such as that of an order."""


def published_pattern(pattern: str) -> str:
    r"""A pattern in the syntax of JSON schemas, which have no `\Z`.

    In Python `$` also matches before a newline at the end, so that `^a$` would accept "a\n": our patterns end with
    `\Z`. In ECMA 262, which JSON schemas follow, `$` matches only the end.
    """
    return pattern.removesuffix(r"\Z") + "$" if pattern.endswith(r"\Z") else pattern


OPEN_VALUES: Final = "x-extensible-enum"
"""The key of a JSON schema for the known values of an open enumeration."""

OPEN_LENGTH_LIMIT: Final = 64


if TYPE_CHECKING:
    Open: TypeAlias = Annotated[V, "open"]
else:

    class Open:
        """`Open[Status]`: one of the values of `Status = Literal[...]`, or one that only a newer sender knows.

        For the fields of answers, errors and events. Decoding accepts any string of 1 to 64 characters unchanged.
        To a type checker the field is a `Status`, so that a service can only send known values. Code that
        branches on a value of another service has a default branch. Requests are closed: their fields are a `Status`,
        and a service refuses a value that it does not know (docs/decisions/0018-open-enums.md).
        """

        def __class_getitem__(cls, known: Any) -> Any:
            values = list(get_args(known))
            return Annotated[
                str,
                Meta(
                    min_length=1,
                    max_length=OPEN_LENGTH_LIMIT,
                    examples=values[:1],
                    extra_json_schema={OPEN_VALUES: values},
                ),
            ]


Filling = Literal["account", "own_account", "buyer", "guest", "session", "address", "fingerprint", "default"]
"""What the gateway fills a field of a request with, where a client sends the message itself (gRPC).

    account       the caller's account, which must be signed in
    own_account   the caller's account where the client leaves the field out
    buyer         as `own_account`; without an account, the user of a guest's order
    guest         whether the caller orders as a guest
    session       the session of the access token
    address       the address of the connection
    fingerprint   that of the whole request
    default       nothing: the field keeps its default, for it is not for clients
"""

FILLING: Final = "filling"
GIVEN: Final[frozenset[Filling]] = frozenset({"own_account", "buyer"})
"""Clients may send these fields."""


def filled(by: Filling) -> dict[str, Any]:
    """The `extra` of a `Meta`: a field of a request that the gateway fills."""
    return {FILLING: by}


class Empty(Message):
    """A request or answer without fields."""
