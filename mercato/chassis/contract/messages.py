"""Messages: what travels, as frozen structs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, dataclass_transform

import msgspec

MAX_ID: Final = 2**53 - 1
"""Ids stay below 2^53, so that every JSON reader, JavaScript included, can hold them exactly."""


if TYPE_CHECKING:

    @dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
    class FrozenMeta(msgspec.StructMeta):
        """Tells type checkers that what is derived from a frozen struct is frozen as well."""

else:
    FrozenMeta = msgspec.StructMeta  # a metaclass of our own would double the time that a message takes to make


class Message(msgspec.Struct, frozen=True, kw_only=True, metaclass=FrozenMeta):
    """A request, an answer or a part of one. Frozen; unknown fields are ignored when decoding (additive change)."""


class Empty(Message):
    """The request or answer of an operation that has nothing to say."""
