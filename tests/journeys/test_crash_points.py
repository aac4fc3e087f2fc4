"""The power fails at each fault point that a request can reach: what a client then does, as documented, is right.

The shop is started with the fault planted, a request runs into it and gets no answer, everything is gone, the shop is
started again (with the next fault), and the client tries again.
"""

from __future__ import annotations

import http.client
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mercato import topology
from mercato.chassis import faults
from support.caller import Answer, Caller, everything
from support.process import Keeper, Process, data_folder

PASSWORD = "a long enough password"
ALICE, DEMO_PASSWORD = "alice@example.com", "demo-password"
BOB, NEW_PASSWORD = "bob@example.com", "another long password"

numbers = itertools.count(1)


class Crash(msgspec.Struct):
    """`prepare` gives what `act` needs; `act` runs into the fault; `recover` does it again and looks."""

    point: str
    prepare: Callable[[Caller], Any]
    act: Callable[[Caller, Any], Answer]
    recover: Callable[[Caller, Any], None]


# --------------------------------------------------------------------------------------------------------------- orders


def a_new_key(caller: Caller) -> tuple[str, int]:
    count = len(everything(caller, "/orders?limit=200"))
    return f"crash-{next(numbers)}", count


def place(caller: Caller, prepared: tuple[str, int]) -> Answer:
    return caller.order(prepared[0])


def exactly_one_order(*, was_committed: bool) -> Callable[[Caller, tuple[str, int]], None]:
    def recover(caller: Caller, prepared: tuple[str, int]) -> None:
        retried = place(caller, prepared)
        assert retried.status == 201
        assert ("idempotent-replayed" in retried.headers) == was_committed
        again = place(caller, prepared)
        assert again.json == retried.json
        assert again.headers["idempotent-replayed"] == "true"
        assert len(everything(caller, "/orders?limit=200")) == prepared[1] + 1

    return recover


def an_order(caller: Caller) -> int:
    return caller.order().json["id"]


def cancel(caller: Caller, order_id: int) -> Answer:
    return caller.post(f"/orders/{order_id}/cancel", {"reason": "power failure"})


def cancelled_once(caller: Caller, order_id: int) -> None:
    assert cancel(caller, order_id).json["status"] == "cancelled"
    moves = [entry for entry in caller.get(f"/orders/{order_id}/history").json if entry["after"] == "cancelled"]
    assert len(moves) == 1


# ------------------------------------------------------------------------------------------------------------- products


def a_sku(_: Caller) -> str:
    return f"CRASH-{next(numbers)}"


def create(caller: Caller, sku: str) -> Answer:
    price = {"amount": "10.00", "currency": "USD"}
    return caller.post("/products", {"sku": sku, "name": "Lamp", "price": price, "category": "crash"})


def exactly_one_product(*, was_committed: bool) -> Callable[[Caller, str], None]:
    def recover(caller: Caller, sku: str) -> None:
        retried = create(caller, sku)
        assert retried.status == (409 if was_committed else 201), retried.text
        assert [p["sku"] for p in everything(caller, "/products?category=crash") if p["sku"] == sku] == [sku]

    return recover


def a_product(caller: Caller) -> int:
    return create(caller, a_sku(caller)).json["id"]


def reprice(caller: Caller, product_id: int) -> Answer:
    return caller.call("PATCH", f"/products/{product_id}", {"price": {"amount": "12.34", "currency": "USD"}})


def repriced(caller: Caller, product_id: int) -> None:
    assert reprice(caller, product_id).status == 200
    assert caller.get(f"/products/{product_id}").json["price"]["amount"] == "12.34"


def archive(caller: Caller, product_id: int) -> Answer:
    return caller.post(f"/products/{product_id}/archive", {})


def archived(caller: Caller, product_id: int) -> None:
    assert archive(caller, product_id).json["status"] == "archived"
    assert caller.get(f"/products/{product_id}").json["version"] == 2
    assert product_id not in {p["id"] for p in everything(caller, "/products?category=crash")}


# ---------------------------------------------------------------------------------------------------------------- users


def an_email(_: Caller) -> str:
    return f"crash-{next(numbers)}@example.com"


def register(caller: Caller, email: str) -> Answer:
    return caller.post("/register", {"email": email, "name": "Carol", "password": PASSWORD})


def registered(caller: Caller, email: str) -> None:
    assert register(caller, email).json["code"] == "users.email_taken"
    caller.sign_in(email, PASSWORD)


def alices_refresh_token(caller: Caller) -> str:
    answer = caller.sign_in(ALICE, DEMO_PASSWORD)
    caller.token = None
    return answer.json["refresh_token"]


def refresh(caller: Caller, token: str) -> Answer:
    return caller.post("/token/refresh", {"refresh_token": token})


def refreshed(caller: Caller, token: str) -> None:
    assert refresh(caller, token).status == 200


def must_sign_in_again(caller: Caller, token: str) -> None:
    # The token was used, and who tries it again may be a thief: the documented way on is the password.
    assert refresh(caller, token).status == 401
    assert refresh(caller, alices_refresh_token(caller)).status == 200


def bob(caller: Caller) -> str:
    caller.sign_in(BOB, DEMO_PASSWORD)
    return caller.token or ""


def change_password(caller: Caller, token: str) -> Answer:
    caller.token = token
    return caller.post("/users/me/password", {"current_password": DEMO_PASSWORD, "new_password": NEW_PASSWORD})


def changed_now_and_not_before(caller: Caller, token: str) -> None:
    caller.sign_in(BOB, DEMO_PASSWORD)
    assert change_password(caller, token).status == 204
    caller.sign_in(BOB, NEW_PASSWORD)


# Two neighbours never concern the same operation: the recovery from one runs with the next fault planted.
CRASHES = [
    Crash("orders.place.before_commit", a_new_key, place, exactly_one_order(was_committed=False)),
    Crash("products.create.before_commit", a_sku, create, exactly_one_product(was_committed=False)),
    Crash("orders.move.before_commit", an_order, cancel, cancelled_once),
    Crash("products.update.before_commit", a_product, reprice, repriced),
    Crash("users.refresh.before_commit", alices_refresh_token, refresh, refreshed),
    Crash("products.archive.before_commit", a_product, archive, archived),
    Crash("users.change_password.before_commit", bob, change_password, changed_now_and_not_before),
    Crash("orders.place.after_commit", a_new_key, place, exactly_one_order(was_committed=True)),
    Crash("products.create.after_commit", a_sku, create, exactly_one_product(was_committed=True)),
    Crash("orders.move.after_commit", an_order, cancel, cancelled_once),
    Crash("products.update.after_commit", a_product, reprice, repriced),
    Crash("users.refresh.after_commit", alices_refresh_token, refresh, must_sign_in_again),
    Crash("products.archive.after_commit", a_product, archive, archived),
    Crash("users.register.after_commit", an_email, register, registered),
]
AT_START = {"products.seed.before_commit"}


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    with data_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def keeper(data: Path) -> Iterator[Keeper]:
    with Keeper(data) as made:
        yield made
        made.stop()


def test_every_declared_point_is_crashed_at():
    topology.builds()

    assert {crash.point for crash in CRASHES} | AT_START == faults.POINTS


def test_a_crash_while_demo_data_is_written_leaves_none_or_all_of_it(data: Path):
    environment = {"MERCATO_FAULTS": "products.seed.before_commit=kill"}
    with Process(data, environment=environment) as shop:
        shop.wait_for(lambda: not shop.is_running, "its end")
        assert shop.exit_code() == -9, shop.output
        shop.assert_gone()
    with Process(data) as shop, shop.ready().caller() as caller:
        assert caller.get("/products/100").status == 200
        shop.stop()


@pytest.mark.parametrize("number", range(len(CRASHES)), ids=[crash.point for crash in CRASHES])
def test_a_crash_at(number: int, keeper: Keeper):
    crash = CRASHES[number]
    shop = keeper.shop(MERCATO_FAULTS=planted(number))
    with shop.caller() as caller:
        prepared = crash.prepare(caller)
        with pytest.raises((OSError, http.client.HTTPException)):
            crash.act(caller, prepared)
    shop.assert_gone()
    assert shop.exit_code() == -9

    shop = keeper.shop(MERCATO_FAULTS=planted((number + 1) % len(CRASHES)))
    with shop.caller() as caller:
        crash.recover(caller, prepared)


def planted(number: int) -> str:
    return f"{CRASHES[number].point}=kill"
