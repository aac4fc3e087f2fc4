"""Clients that do what the documentation says, and record every answer.

Who gets no answer, a 503 or a 504 sends the same request again, with the same key. Every request, with what was
answered, becomes a `ClientOperation`: the audit asks whether each of these answers was true.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import aiohttp
import msgspec

from mercato.operations.audit.history import ClientOperation, Outcome
from system.chaos.shop import ShopUnderTest

ANSWER_SECONDS: Final = 12.0
CONNECT_SECONDS: Final = 1.0
FIRST_PAUSE_SECONDS: Final = 0.2
LONGEST_PAUSE_SECONDS: Final = 1.0

UNSTORED: Final = frozenset({400, 401, 403, 404, 405, 409, 412, 413, 415})
"""Refusals before anything was begun: the key is as good as new, and the same request may be answered otherwise."""
EXPECTED: Final = frozenset({200, 201, 204, 402, 404, 409, 422, 429, 502, 503, 504})


class Who(msgspec.Struct):
    """The account of a client. `token` None: the anonymous client, which is staff in an open shop."""

    principal: str
    user_id: int
    role: str
    email: str = ""
    token: str | None = None


class Reply(msgspec.Struct, frozen=True):
    """An answer. `outcome` says what it tells."""

    status: int
    json: Any
    outcome: Outcome


class Clients:
    """Sends requests to the shop wherever it is at the moment, and keeps the history of all of them."""

    def __init__(self, shop: ShopUnderTest, password: str) -> None:
        self.history: list[ClientOperation] = []
        self.statuses: Counter[str] = Counter()
        self.unexpected: list[str] = []
        """Answers that no client should ever see."""
        self.retries: Counter[int] = Counter()
        """By how often an order was sent again before it was answered."""
        self.given_up = asyncio.Event()
        """Set when no client shall try again any more."""
        self._shop = shop
        self._password = password
        self._numbers = itertools.count(1)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS, sock_connect=CONNECT_SECONDS),
        )

    async def aclose(self) -> None:
        await self._session.close()

    # --------------------------------------------------------------------------------------------------------- requests

    async def insist(
        self,
        who: Who,
        method: str,
        route: str,
        body: Any = None,
        *,
        rng: random.Random,
        key: str | None = None,
        wait: bool = False,
        hasty: bool = False,
        **where: int,
    ) -> Reply | None:
        """Sends a request until its answer is final; None only when there was no more time.

        `hasty`: the first try goes away before the answer has come.
        """
        pause = FIRST_PAUSE_SECONDS
        for tries in itertools.count():
            seconds = rng.uniform(0.001, 0.03) if hasty and tries == 0 else ANSWER_SECONDS
            reply = await self.send(who, method, route, body, key=key, wait=wait, seconds=seconds, **where)
            if reply is not None and reply.outcome == "final":
                if route == "/orders" and method == "POST":
                    self.retries[tries - (hasty and tries > 0)] += 1
                return reply
            if self.given_up.is_set():
                return None
            await asyncio.sleep(pause * rng.uniform(0.5, 1.5))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            if not self._shop.up.is_set():
                await _first(self._shop.up.wait(), self.given_up.wait())
        return None

    async def send(
        self,
        who: Who,
        method: str,
        route: str,
        body: Any = None,
        *,
        key: str | None = None,
        wait: bool = False,
        seconds: float = ANSWER_SECONDS,
        **where: int,
    ) -> Reply | None:
        """Sends a request once; None where no answer came. `route` is the template, `where` its ids."""
        headers = {"Idempotency-Key": key} if key else {}
        if wait:
            headers["Prefer"] = "wait=3"
        if who.token:
            headers["Authorization"] = f"Bearer {who.token}"
        invoked_at = datetime.datetime.now(datetime.UTC)
        reply = await self._exchange(method, route.format(**where), body, headers, seconds)
        self._note(who, method, route, body, key, where, invoked_at, reply)
        if reply is not None and reply.status == 401 and who.email:
            await self.sign_in(who)
            return None
        return reply

    async def sign_in(self, who: Who) -> None:
        """Gives a client a token; tries again until it works."""
        credentials = {"email": who.email, "password": self._password}
        while not self.given_up.is_set():
            reply = await self._exchange("POST", "/login", credentials, {}, ANSWER_SECONDS)
            if reply is not None and reply.status == 200:
                who.token = reply.json["access_token"]
                return
            await asyncio.sleep(LONGEST_PAUSE_SECONDS)

    async def _exchange(
        self, method: str, path: str, body: Any, headers: Mapping[str, str], seconds: float
    ) -> Reply | None:
        try:
            async with asyncio.timeout(seconds):
                async with self._session.request(method, self._shop.url + path, json=body, headers=headers) as answer:
                    raw = await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return None
        value = msgspec.json.decode(raw) if raw and "json" in answer.headers.get("Content-Type", "") else None
        return Reply(answer.status, value, _outcome(answer.status, "Retry-After" in answer.headers, value))

    # ---------------------------------------------------------------------------------------------------------- history

    def _note(
        self,
        who: Who,
        method: str,
        route: str,
        body: Any,
        key: str | None,
        where: Mapping[str, int],
        invoked_at: datetime.datetime,
        reply: Reply | None,
    ) -> None:
        status = reply.status if reply else None
        self.statuses[str(status or "no answer")] += 1
        if reply and status not in EXPECTED and not (status == 401 and who.email):
            self.unexpected.append(f"{method} {route} {where} {body}: {status} {reply.json}")
        shown = reply.json if reply and reply.status < 300 and isinstance(reply.json, dict) else {}
        is_order = route in ("/orders", "/orders/{id}", "/orders/{id}/cancel") and bool(shown)
        self.history.append(
            ClientOperation(
                op_id=str(next(self._numbers)),
                principal=who.principal,
                user_id=who.user_id,
                role=who.role,
                route=f"{method} {route}",
                invoked_at=invoked_at,
                outcome=reply.outcome if reply else "unknown",
                completed_at=datetime.datetime.now(datetime.UTC) if reply else None,
                status=status,
                idempotency_key=None if status in UNSTORED and not _was_placed(route, reply) else key,
                fingerprint=_digest([method, route, dict(where), body]) if key else None,
                answer=_digest(_lasting(route, reply)) if reply else None,
                order_id=shown["id"] if is_order else None,
                version=shown["version"] if is_order else None,
            )
        )


def _outcome(status: int, has_retry_after: bool, value: Any) -> Outcome:
    if status in (429, 502, 503, 504) or (status == 409 and has_retry_after):
        return "retryable"
    if status >= 500 or status == 401:
        return "unknown"
    # A payment or a refund that was answered before its end: its key tells more later on.
    if status == 201 and isinstance(value, dict) and "order_id" in value and value.get("status") == "pending":
        return "retryable"
    return "final"


def _was_placed(route: str, reply: Reply | None) -> bool:
    """Whether the answer says that the order was placed, and refused while the client waited: its key has it."""
    if reply is None or route != "/orders" or not isinstance(reply.json, dict):
        return False
    return "order_id" in reply.json.get("details", {})


def _lasting(route: str, reply: Reply) -> Any:
    """What of an answer is the same whenever it is given: a payment that is refunded later on is still that payment."""
    value = reply.json
    if not isinstance(value, dict):
        return value
    if reply.status >= 400:
        return [reply.status, value.get("code")]
    if route.endswith("/adjustments"):
        return value
    items = [[i.get("product_id"), i.get("quantity"), i.get("line_total")] for i in value.get("items", ())]
    return [value.get(name) for name in ("id", "order_id", "user_id", "total", "amount", "created_at")] + items


def _digest(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:24]


async def _first(*waits: Any) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
