"""A blocking client, for tests of processes: one connection, without retries or a pool."""

from __future__ import annotations

import http.client
import itertools
import json
import select
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import urlsplit

from .responses import Response
from .waiting import BOUND_SECONDS

PAUSE_SECONDS_MAX = 0.5
BETWEEN_SECONDS = 0.02
"""Before a client sends a request again, and between the requests of one that leaves cores to what starts beside it."""
LATER = frozenset({503, 504})
"""Statuses of a shop that recovers, or whose machine is busy: a client sends the request again."""


class Caller:
    """A client of one shop. Raises OSError or HTTPException where it gets no answer."""

    def __init__(self, url: str, token: str | None = None) -> None:
        address = urlsplit(url)
        assert address.hostname
        self.token = token
        self.connection = http.client.HTTPConnection(address.hostname, address.port, timeout=BOUND_SECONDS)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Response:
        """`body` is sent as JSON; `If_Match="1"` is sent as a header."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.token is not None:
            sent["Authorization"] = f"Bearer {self.token}"
        if body is not None:
            sent["Content-Type"] = "application/json"
        if _has_ended(self.connection):
            self.connection.close()
        try:
            self.connection.request(method, path, None if body is None else json.dumps(body), sent)
            return self.answer()
        except (OSError, http.client.HTTPException):
            self.connection.close()
            raise

    def answer(self) -> Response:
        """The answer to the last request."""
        received = self.connection.getresponse()
        return Response(received.status, {k.lower(): v for k, v in received.headers.items()}, received.read())

    def get(self, path: str, **headers: str) -> Response:
        return self.call("GET", path, **headers)

    def read(self, path: str, **headers: str) -> Response:
        """As `get`, and again until the shop has recovered."""
        return self.repeated("GET", path, **headers)

    def repeated(self, method: str, path: str, body: Any = None, **headers: str) -> Response:
        """As `call`, and again until the shop has recovered: what changes something needs a key for that."""
        return _recovered(lambda: self.call(method, path, body, **headers))

    def post(self, path: str, body: Any = None, **headers: str) -> Response:
        return self.call("POST", path, body, **headers)

    def order(self, key: str | None = None, *, user_id: int = 1, product_id: int = 100) -> Response:
        """Places an order of one piece."""
        headers = {} if key is None else {"Idempotency_Key": key}
        return self.post("/orders", {"user_id": user_id, "product_id": product_id}, **headers)

    def ordered(self, key: str) -> Response:
        """As `order`, and again until the shop has recovered."""
        return _recovered(lambda: self.order(key))

    def paid(self, key: str) -> Response:
        """Places an order of one piece that is paid at once, again until the shop has recovered."""
        order = {"user_id": 1, "product_id": 100, "amount": 99.99, "payment_method": "sandbox:ok"}
        return self.repeated("POST", "/orders", order, Idempotency_Key=key)

    def sign_in(self, email: str, password: str) -> Response:
        """Signs in: further calls come from this account."""
        reply = self.post("/login", {"email": email, "password": password})
        assert reply.status == 200, reply.text
        self.token = reply.json["access_token"]
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()


def _has_ended(connection: http.client.HTTPConnection) -> bool:
    """Whether the server has closed an idle connection. The next request then opens a new one."""
    return connection.sock is not None and bool(select.select([connection.sock], [], [], 0)[0])


def _recovered(send: Callable[[], Response]) -> Response:
    """Sends again after 503 or 504, as documented. A request that changes something needs a key for that."""
    end = time.monotonic() + BOUND_SECONDS
    while True:
        answer = send()
        if answer.status not in LATER or time.monotonic() > end:
            return answer
        time.sleep(min(PAUSE_SECONDS_MAX, float(answer.headers.get("retry-after", PAUSE_SECONDS_MAX))))


class Clients:
    """So many clients, each a thread that runs `work` until `stopped` is set: at the end of the `with` block."""

    def __init__(self, count: int) -> None:
        self.stopped = threading.Event()
        self._threads = [threading.Thread(target=self.work, args=(number,), daemon=True) for number in range(count)]

    def work(self, number: int) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for thread in self._threads:
            thread.join(BOUND_SECONDS)


class Buyers(Clients):
    """Clients that place orders, each with a new key, until the block ends; every answer is counted.

    A buyer whose request got no answer, a 503 or a 504, sends it again with the same key, as documented. Each waits
    for `pause_seconds` between two orders.
    """

    _runs = itertools.count(1)

    def __init__(self, caller: Callable[[], Caller], count: int = 4, pause_seconds: float = 0.0) -> None:
        super().__init__(count)
        self.placed: dict[str, int] = {}
        self.statuses: Counter[int] = Counter()
        self.unanswered = 0
        self.pending: set[str] = set()
        self._caller = caller
        self._pause_seconds = pause_seconds
        self._name = f"load-{next(self._runs)}"

    def work(self, number: int) -> None:
        with self._caller() as caller:
            for turn in itertools.count():
                key = f"{self._name}-{number}-{turn}"
                self.pending.add(key)
                while not self._try(caller, key):
                    if self.stopped.wait(BETWEEN_SECONDS):
                        return
                self.pending.discard(key)
                if self.stopped.wait(self._pause_seconds):
                    return

    def order(self, caller: Caller, key: str) -> Response:
        """Sends the request of a buyer."""
        return caller.order(key)

    def _try(self, caller: Caller, key: str) -> bool:
        try:
            reply = self.order(caller, key)
        except (OSError, http.client.HTTPException):
            self.unanswered += 1
            return False
        self.statuses[reply.status] += 1
        if reply.status == 201:
            self.placed[key] = reply.json["id"]
        return reply.status == 201

    def assert_nothing_lost(self, caller: Caller) -> None:
        """Asserts that each answered order exists, and that a key without an answer gives one order."""
        assert set(self.statuses) <= {201, *LATER}
        assert set(self.placed.values()) <= set(all_order_ids(caller))
        for key in self.pending:
            order = self._ordered(caller, key)
            assert order.status == 201, order.text
            assert self._ordered(caller, key).json["id"] == order.json["id"]
        for key, order_id in list(self.placed.items())[-3:]:
            assert self._ordered(caller, key).json["id"] == order_id

    def _ordered(self, caller: Caller, key: str) -> Response:
        return _recovered(lambda: self.order(caller, key))


def all_order_ids(caller: Caller) -> list[int]:
    """Every order that the shop has."""
    return [order["id"] for order in everything(caller, "/orders?limit=200")]


def everything(caller: Caller, path: str) -> list[Any]:
    """All entries of a collection, by following the links to the next page."""
    found: list[Any] = []
    following: str | None = path
    while following is not None:
        reply = caller.read(following)
        assert reply.status == 200, reply.text
        found += reply.json
        following = _next(reply.headers.get("link", ""))
    return found


def _next(link: str) -> str | None:
    target, _, relation = link.partition(">; ")
    if 'rel="next"' not in relation:
        return None
    parts = urlsplit(target.removeprefix("<"))
    return f"{parts.path}?{parts.query}"
