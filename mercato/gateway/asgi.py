"""The types of ASGI, and of an answer, that the gateway shares."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
"""An application."""
Client = tuple[str, int] | None
"""The address and port of a connection."""
Lines = list[bytes]
"""Header fields of an answer as they are on the wire, `name: value`. The server adds Date and Content-Length."""
