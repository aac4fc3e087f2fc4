"""Clients of a shop in which two versions serve: they pay orders, return and cancel some, and read."""

from __future__ import annotations

import http.client
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from mercato.testing.caller import LATER, Buyers, Caller, Clients
from mercato.testing.responses import Response

PAUSE_SECONDS: Final = 0.02
"""Between two reads: processes start beside them."""
PATHS: Final = ("/products/100", "/users/1", "/orders?user_id=1&limit=5", "/products/100/stock", "/events?limit=5")
LINES: Final = [{"product_id": 100, "quantity": 2}]
METHOD: Final = "sandbox:ok"


class PayingBuyers(Buyers):
    """Buyers whose orders are paid at once."""

    def order(self, caller: Caller, key: str) -> Response:
        body = {"user_id": 1, "product_id": 100, "payment_method": METHOD}
        return caller.post("/orders", body, Idempotency_Key=key, Prefer="wait=20")


class Readers(Clients):
    """Clients that read what several services answer, until the block ends."""

    def __init__(self, caller: Callable[[], Caller], count: int = 1) -> None:
        super().__init__(count)
        self.statuses: Counter[int] = Counter()
        self.failures: list[str] = []
        """What was not answered by 200, with the answer."""
        self._caller = caller

    def work(self, number: int) -> None:
        with self._caller() as caller:
            while not self.stopped.is_set():
                for path in PATHS:
                    self._read(caller, path)
                    self.stopped.wait(PAUSE_SECONDS)

    def _read(self, caller: Caller, path: str) -> None:
        try:
            answer = caller.get(path)
        except (OSError, http.client.HTTPException) as error:
            self.failures.append(f"{path}: {error!r}")
            return
        self.statuses[answer.status] += 1
        if answer.status != 200:
            self.failures.append(f"{path}: {answer.text}")


class Customers(Clients):
    """Clients that do all that can be done with orders, three a turn. They repeat a request after 503 and 504."""

    _runs = itertools.count(1)

    def __init__(self, caller: Callable[[], Caller], count: int = 1) -> None:
        super().__init__(count)
        self.turns = 0
        self.orders: list[int] = []
        self.failures: list[str] = []
        """Answers with another status than the wanted one; the client ends with the first."""
        self._caller = caller
        self._name = f"customer-{next(self._runs)}"

    def work(self, number: int) -> None:
        with self._caller() as caller:
            for turn in itertools.count():
                if self.stopped.is_set():
                    return
                try:
                    self._turn(_Sending(caller, f"{self._name}-{number}-{turn}"))
                except _Unwanted as answer:
                    self.failures.append(str(answer))
                    return
                self.turns += 1

    def _turn(self, send: _Sending) -> None:
        delivered, captured, cancelled = (self._place(send, step) for step in ("deliver", "capture", "cancel"))
        self._return(send, delivered)
        payment = send(201, "POST", "/payments", _payment(captured, capture=False), key="authorize")
        send(200, "POST", f"/payments/{payment['id']}/capture", {})
        send(201, "POST", "/payments", _payment(cancelled, capture=False), key="authorize-too")
        send(200, "POST", f"/orders/{cancelled}/cancel", {})
        for order in (delivered, captured, cancelled):
            send(200, "GET", f"/orders/{order}/timeline")
        send(200, "GET", f"/payments/{payment['id']}")

    def _place(self, send: _Sending, step: str) -> int:
        order: int = send(201, "POST", "/orders", {"user_id": 2, "items": LINES}, key=step)["id"]
        self.orders.append(order)
        return order

    def _return(self, send: _Sending, order: int) -> None:
        send(201, "POST", "/payments", _payment(order), key="pay")
        for fulfilment in ("shipped", "delivered"):
            send(200, "PATCH", f"/orders/{order}", {"fulfilment": fulfilment})
        send(201, "POST", f"/orders/{order}/returns", {}, key="return")


def _payment(order: int, **more: Any) -> dict[str, Any]:
    return {"order_id": order, "payment_method": METHOD, **more}


class _Unwanted(Exception):
    """An answer with another status than the wanted one, or none."""


class _Sending:
    """Sends the requests of a turn, each with a key of its own where it needs one."""

    def __init__(self, caller: Caller, name: str) -> None:
        self._caller = caller
        self._name = name

    def __call__(self, wanted: int, method: str, path: str, body: Any = None, key: str | None = None) -> Any:
        headers = {} if key is None else {"Idempotency_Key": f"{self._name}-{key}"}
        try:
            answer = self._caller.repeated(method, path, body, **headers)
        except (OSError, http.client.HTTPException) as error:
            raise _Unwanted(f"{method} {path}: {error!r}") from error
        if answer.status != wanted:
            raise _Unwanted(f"{method} {path}: {answer.status} {answer.text}")
        return answer.json


def unmendable(statuses: Counter[int], success: int) -> set[int]:
    """The statuses that are neither a success nor mended by sending the request again."""
    return set(statuses) - {success, *LATER}
