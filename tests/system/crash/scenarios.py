"""What clients do to come to each fault point, and the table of all points.

A scenario is written so that a client can begin it again from the start, with the same keys, wherever it was
interrupted; it asserts its result at its end.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from mercato.chassis.messaging.events import TRIES
from mercato.chassis.postgres import outbox_row
from mercato.testing.caller import Caller, everything
from mercato.testing.command import run_command
from mercato.testing.responses import Response
from mercato.testing.waiting import wait_until
from system.crash import injectable
from system.crash.crashing import CONVERGED_SECONDS, NO_SETTINGS, POLL_SECONDS, Crash, Shop

PASSWORD: Final = "a long enough password"
ALICE: Final = ("alice@example.com", "demo-password")
USER: Final = 1
PRODUCT: Final = 100

Scenario = Callable[[Caller, str], object]


def expect(answer: Response, *statuses: int) -> Any:
    assert answer.status in statuses, f"{answer.status} {answer.text}"
    return answer.json


def slug(key: str) -> str:
    return key.replace(".", "-").replace("_", "-")


# -------------------------------------------------------------------------------------------------------------- buying


def place(caller: Caller, key: str, method: str | None = None) -> int:
    """The order of this key, however often it is asked for."""
    body = {"user_id": USER, "product_id": PRODUCT, **({"payment_method": method} if method else {})}
    order_id = expect(caller.post("/orders", body, Idempotency_Key=key), 201)["id"]
    again = caller.post("/orders", body, Idempotency_Key=key)
    assert expect(again, 201)["id"] == order_id
    assert again.headers["idempotent-replayed"] == "true"
    return order_id


def find(caller: Caller, order_id: int) -> dict[str, Any]:
    return expect(caller.read(f"/orders/{order_id}"), 200)


def await_order(caller: Caller, order_id: int, **wanted: str) -> dict[str, Any]:
    """The order, once its axes are where they are wanted."""
    end = time.monotonic() + CONVERGED_SECONDS
    while True:
        order = find(caller, order_id)
        if all(order[axis] == state for axis, state in wanted.items()):
            return order
        assert time.monotonic() < end, f"wanted {wanted}: {order}"
        time.sleep(POLL_SECONDS)


def await_outcome(caller: Caller, order_id: int) -> dict[str, Any]:
    """The order, once it is decided whether it is sold, and paid if it is."""
    end = time.monotonic() + CONVERGED_SECONDS
    while (order := find(caller, order_id))["status"] == "pending" or order["payment"] == "authorized":
        assert time.monotonic() < end, order
        time.sleep(POLL_SECONDS)
    return order


def payments_of(caller: Caller, order_id: int) -> list[dict[str, Any]]:
    return everything(caller, f"/payments?order_id={order_id}")


def buying(method: str, status: str = "confirmed", payment: str = "paid") -> Scenario:
    def buy(caller: Caller, key: str) -> int:
        order_id = place(caller, key, method)
        await_order(caller, order_id, status=status, payment=payment)
        assert len(payments_of(caller, order_id)) == 1
        return order_id

    return buy


buy = buying("sandbox:ok")
buy_with_lost_answers = buying("sandbox:lost_answer")
buy_with_errors = buying("sandbox:error_then_ok")


def buy_declined(caller: Caller, key: str) -> None:
    """A declined payment leaves the order payable; another one pays it."""
    order_id = place(caller, key, "sandbox:declined")
    end = time.monotonic() + CONVERGED_SECONDS
    while not any(payment["status"] == "failed" for payment in payments_of(caller, order_id)):
        assert time.monotonic() < end, f"no payment of order {order_id} was declined"
        time.sleep(POLL_SECONDS)
    pay(caller, f"{key}-again", order_id=order_id)
    await_order(caller, order_id, status="confirmed", payment="paid")


def pay(caller: Caller, key: str, **body: Any) -> dict[str, Any]:
    """The payment of this key. While the stock of its order is only being held, the client has to try again."""
    end = time.monotonic() + CONVERGED_SECONDS
    while (answer := caller.post("/payments", body, Idempotency_Key=key)).status == 409:
        assert answer.json["code"] == "orders.payment_in_progress", answer.text
        assert "retry-after" in answer.headers
        assert time.monotonic() < end, answer.text
        time.sleep(POLL_SECONDS)
    return expect(answer, 201)


def pay_later(caller: Caller, key: str) -> None:
    order_id = place(caller, key)
    paid = pay(caller, key, order_id=order_id)
    await_order(caller, order_id, status="confirmed", payment="paid")
    assert [payment["id"] for payment in payments_of(caller, order_id)] == [paid["id"]]


def pay_by_hand(caller: Caller, key: str) -> tuple[int, int]:
    """An order whose amount is reserved, or what has become of it; and its payment."""
    order_id = place(caller, key)
    return order_id, pay(caller, key, order_id=order_id, capture=False)["id"]


def capture_by_hand(caller: Caller, key: str) -> None:
    order_id, payment_id = pay_by_hand(caller, key)
    expect(caller.post(f"/payments/{payment_id}/capture"), 200)
    await_order(caller, order_id, status="confirmed", payment="paid")


def void_by_hand(caller: Caller, key: str) -> None:
    order_id, payment_id = pay_by_hand(caller, key)
    expect(caller.post(f"/payments/{payment_id}/void"), 200)
    await_order(caller, order_id, status="cancelled", payment="voided")


def sell_on_account(caller: Caller, key: str) -> None:
    order_id = place(caller, key)
    expect(caller.call("PATCH", f"/orders/{order_id}", {"status": "confirmed"}), 200)
    await_order(caller, order_id, status="confirmed", payment="unpaid")


# ----------------------------------------------------------------------------------------------------------- undoing it


def cancel(caller: Caller, order_id: int) -> None:
    cancelled = expect(caller.post(f"/orders/{order_id}/cancel", {"reason": "power failure"}), 200)
    assert cancelled["status"] == "cancelled"
    moves = [entry for entry in caller.read(f"/orders/{order_id}/history").json if entry["after"] == "cancelled"]
    assert len(moves) == 1


def buy_and_cancel(caller: Caller, key: str) -> None:
    order_id = place(caller, key, "sandbox:ok")
    await_outcome(caller, order_id)
    cancel(caller, order_id)
    order = await_order(caller, order_id, payment="refunded")
    assert order["refunded"] == order["total"]


def reserve_and_cancel(caller: Caller, key: str) -> None:
    order_id, _ = pay_by_hand(caller, key)
    cancel(caller, order_id)
    await_order(caller, order_id, payment="voided")


def order_and_cancel(caller: Caller, key: str) -> None:
    cancel(caller, place(caller, key))


def let_expire(caller: Caller, key: str) -> None:
    order = await_order(caller, place(caller, key), status="cancelled", payment="unpaid")
    assert order["reason"]["code"] == "expired"


def refund(caller: Caller, key: str) -> None:
    order_id = buy_once(caller, key)
    [payment] = payments_of(caller, order_id)
    body = {"amount": "1.00", "reason": "scratched"}
    given = caller.post(f"/payments/{payment['id']}/refunds", body, Idempotency_Key=f"{key}-refund")
    assert expect(given, 201)["status"] == "succeeded"
    order = await_order(caller, order_id, payment="partially_refunded")
    assert order["refunded"]["amount"] == "1.00"


def take_back(caller: Caller, key: str) -> None:
    order_id = buy_once(caller, key)
    deliver(caller, order_id)
    returned = caller.post(f"/orders/{order_id}/returns", Idempotency_Key=f"{key}-return")
    assert expect(returned, 201)["status"] == "succeeded"
    order = await_order(caller, order_id, payment="refunded", fulfilment="returned")
    assert order["refunded"] == order["total"]
    assert [item["returned"] for item in order["items"]] == [1]


def buy_once(caller: Caller, key: str) -> int:
    """A paid order, of which something may have been given back already."""
    order_id = place(caller, key, "sandbox:ok")
    await_outcome(caller, order_id)
    return order_id


def deliver(caller: Caller, order_id: int) -> None:
    for before, after in (("unfulfilled", "shipped"), ("shipped", "delivered")):
        if find(caller, order_id)["fulfilment"] == before:
            expect(caller.call("PATCH", f"/orders/{order_id}", {"fulfilment": after}), 200)


def buy_and_ship(caller: Caller, key: str) -> None:
    order_id = buy_once(caller, key)
    expect(caller.call("PATCH", f"/orders/{order_id}", {"fulfilment": "shipped"}), 200)
    moves = [entry for entry in caller.read(f"/orders/{order_id}/history").json if entry["after"] == "shipped"]
    assert len(moves) == 1


# -------------------------------------------------------------------------------------------- what the bank does later


class Begun(msgspec.Struct):
    """A payment with which the bank is not done, and what comes of it."""

    shop: Shop
    order_id: int
    payment: str


def slow_order(shop: Shop, key: str) -> Begun:
    """An order whose payment takes the bank more than a second; by then this shop has asked again several times."""
    with shop.caller() as caller:
        order_id = place(caller, key, "sandbox:slow:1200")
    shop.until("payments", "SELECT key FROM intents")
    return Begun(shop, order_id, "paid")


def unwanted_authorization(shop: Shop, key: str) -> Begun:
    """A payment that is closed on our side, while its authorization is open on the bank's."""
    with shop.caller() as caller:
        order_id, payment_id = pay_by_hand(caller, key)
    assert shop.comes_to_rest()
    shop.execute("payments", "UPDATE payments SET status = 'voided', version = version + 1 WHERE id = $1", payment_id)
    return Begun(shop, order_id, "voided")


def read_statement_again(_caller: Caller, begun: Begun) -> None:
    begun.shop.execute("payments", "UPDATE reconciliation SET after = 0")


def nothing(_caller: Caller, _prepared: object) -> None:
    """What comes is done by the shop itself."""


def settled(caller: Caller, begun: Begun) -> None:
    if begun.payment == "voided":
        cancel(caller, begun.order_id)
    order = await_order(caller, begun.order_id, payment=begun.payment)
    assert len(payments_of(caller, begun.order_id)) == 1, order


def forgotten_order(shop: Shop, key: str) -> int:
    """An order that waits for its payment, and whose saga was parked by hand."""
    with shop.caller() as caller:
        order_id = place(caller, key)
    asleep = """
        UPDATE sagas SET wake_at = NULL, updated_at = '-infinity'
         WHERE subject_id = $1 AND step = 'awaiting' AND wake_at IS NOT NULL
        RETURNING 1
    """
    shop.until("orders", asleep, order_id)
    return order_id


def carried_on(caller: Caller, order_id: int) -> None:
    """Its hold has an end again, and it can be paid."""
    pay(caller, f"forgotten-{order_id}", order_id=order_id)
    await_order(caller, order_id, status="confirmed", payment="paid")


# --------------------------------------------------------------------------------------------------------------- stock


def product(caller: Caller, key: str) -> int:
    """The product of this key, which is also its category."""
    price, category = {"amount": "10.00", "currency": "USD"}, slug(key)
    expect(caller.post("/products", {"sku": category, "name": "Lamp", "price": price, "category": category}), 201, 409)
    [found] = everything(caller, f"/products?category={category}")
    return found["id"]


def count_stock(caller: Caller, key: str) -> None:
    product_id = product(caller, key)
    expect(caller.call("PUT", f"/products/{product_id}/stock", {"on_hand": 7}), 200)
    assert caller.read(f"/products/{product_id}/stock").json["on_hand"] == 7


def receive_stock(caller: Caller, key: str) -> int:
    product_id = product(caller, key)
    path = f"/products/{product_id}/stock"
    expect(caller.post(f"{path}/adjustments", {"delta": 7, "reason": "delivery"}, Idempotency_Key=key), 200)
    assert caller.read(path).json["on_hand"] == 7
    return product_id


def receive_stock_event(caller: Caller, key: str) -> None:
    await_in_stock(caller, receive_stock(caller, key))


def await_in_stock(caller: Caller, product_id: int) -> None:
    end = time.monotonic() + CONVERGED_SECONDS
    while not caller.read(f"/products/{product_id}").json["in_stock"]:
        assert time.monotonic() < end
        time.sleep(POLL_SECONDS)


# ------------------------------------------------------------------------------------------------------------- products


def create_product(caller: Caller, key: str) -> int:
    return product(caller, key)


def new_product(shop: Shop, key: str) -> int:
    with shop.caller() as caller:
        return product(caller, key)


def reprice(caller: Caller, product_id: int) -> None:
    price = {"amount": "12.34", "currency": "USD"}
    expect(caller.call("PATCH", f"/products/{product_id}", {"price": price}), 200)
    assert caller.read(f"/products/{product_id}").json["price"]["amount"] == "12.34"


def archive(caller: Caller, product_id: int) -> None:
    assert expect(caller.post(f"/products/{product_id}/archive", {}), 200)["status"] == "archived"
    assert caller.read(f"/products/{product_id}").json["version"] == 2


# ---------------------------------------------------------------------------------------------------------------- users


def email_of(key: str) -> str:
    return f"{slug(key)}@example.com"


def register(caller: Caller, key: str) -> None:
    answer = caller.post("/register", {"email": email_of(key), "name": "Carol", "password": PASSWORD})
    assert answer.status == 201 or answer.json["code"] == "users.email_taken", answer.text
    caller.sign_in(email_of(key), PASSWORD)


def refresh_token(caller: Caller) -> str:
    answer = caller.sign_in(*ALICE)
    caller.token = None
    return answer.json["refresh_token"]


def signed_in(shop: Shop, _key: str) -> str:
    with shop.caller() as caller:
        return refresh_token(caller)


def refresh(caller: Caller, token: str) -> Response:
    return caller.post("/token/refresh", {"refresh_token": token})


def refreshed(caller: Caller, token: str) -> None:
    expect(refresh(caller, token), 200)


def refreshed_or_signed_in_again(caller: Caller, token: str) -> None:
    # A repeated request gets the same refresh token for 30 seconds; where the restart took longer, the session ends.
    repeated = refresh(caller, token)
    expect(repeated if repeated.status != 401 else refresh(caller, refresh_token(caller)), 200)


def registered(shop: Shop, key: str) -> str:
    with shop.caller() as caller:
        register(caller, key)
    return key


def change_password(caller: Caller, key: str) -> None:
    caller.sign_in(email_of(key), PASSWORD)
    new = f"another {PASSWORD}"
    expect(caller.post("/users/me/password", {"current_password": PASSWORD, "new_password": new}), 204)
    caller.sign_in(email_of(key), new)


def change_role(caller: Caller, key: str) -> None:
    account = caller.sign_in(email_of(key), PASSWORD).json["user"]
    caller.token = None
    expect(caller.call("PUT", f"/users/{account['id']}/role", {"role": "staff"}), 200)
    expect(caller.sign_in(email_of(key), PASSWORD), 200)
    expect(caller.get("/users/me"), 200)


def erase(caller: Caller, key: str) -> None:
    caller.sign_in(email_of(key), PASSWORD)
    expect(caller.call("DELETE", "/users/me", {"password": PASSWORD}), 204)


def erased(caller: Caller, key: str) -> None:
    """Also where the first request has done it: its session has ended, and its answer was lost."""
    credentials = {"email": email_of(key), "password": PASSWORD}
    caller.token = None
    answer = caller.post("/login", credentials)
    expect(answer, 200, 401)  # anything else is no statement about the account: the client asks again
    if answer.status == 200:
        erase(caller, key)
    caller.token = None
    expect(caller.post("/login", credentials), 401)


class Mailed(msgspec.Struct):
    """An account, and the folder that the shop puts its letters into."""

    folder: Path
    key: str

    def token(self, path: str) -> str:
        """Of the link to `path` in a letter to the account, once there is one."""
        wait_until(lambda: self._tokens(path))
        return self._tokens(path)[0]

    def _tokens(self, path: str) -> list[str]:
        letters = [file.read_text() for file in self.folder.glob("*.eml")]
        to = f"To: {email_of(self.key)}"
        return [found for text in letters if to in text for found in re.findall(rf"{path}#(\S+)", text)]


def unregistered(shop: Shop, key: str) -> Mailed:
    return Mailed(shop.data / "letters", key)


def forgotten(shop: Shop, key: str) -> Mailed:
    """An account whose owner has asked for a new password."""
    with shop.caller() as caller:
        register(caller, key)
        expect(caller.post("/password/forgot", {"email": email_of(key)}), 204)
    return unregistered(shop, key)


def register_by_mail(caller: Caller, mailed: Mailed) -> None:
    register(caller, mailed.key)


def prove(caller: Caller, mailed: Mailed) -> None:
    register(caller, mailed.key)
    expect(caller.post("/email/proof", {"token": mailed.token("/account/email")}), 204)


def reset_password(caller: Caller, mailed: Mailed) -> None:
    new = f"another {PASSWORD}"
    asked = {"token": mailed.token("/account/password"), "new_password": new}
    expect(caller.post("/password/reset", asked), 204)
    caller.sign_in(email_of(mailed.key), new)


class Bought(msgspec.Struct):
    """A guest's order that is paid, and the account that is going to claim it."""

    order_id: int
    access_token: str
    email: str


def bought_by_guest(shop: Shop, key: str) -> Bought:
    with shop.caller() as caller:
        prove(caller, unregistered(shop, key))
        caller.token = None
        order = expect(caller.post("/orders", {"product_id": PRODUCT}, Prefer="wait=20"), 201)
        body = {"order_id": order["id"]}
        expect(caller.post("/payments", body, Authorization=f"Guest {order['access_token']}"), 201)
    return Bought(order["id"], order["access_token"], email_of(key))


def claim(caller: Caller, bought: Bought) -> None:
    user = caller.sign_in(bought.email, PASSWORD).json["user"]
    claimed = expect(caller.post(f"/orders/{bought.order_id}/claim", {"access_token": bought.access_token}), 200)
    assert claimed["user_id"] == user["id"]
    wait_until(lambda: payments_of(caller, bought.order_id))
    assert [payment["user_id"] for payment in payments_of(caller, bought.order_id)] == [user["id"]]
    caller.token = None


# --------------------------------------------------------------------------------------------------------- dead letters


class Poison(msgspec.Struct):
    """An event that its consumer cannot process."""

    shop: Shop
    product_id: int
    event_id: int


def emit_poison(shop: Shop, product_id: int, data: str = "poison") -> int:
    """Gives the position of an event about a product, which is not what its type says."""
    event = {
        "type": "stock.available", "subject": "product", "subject_id": product_id, "version": 1,
        "data": {"product_id": data},
    }  # fmt: skip
    [row_id] = shop.fetch("inventory", "INSERT INTO outbox (events) VALUES ($1) RETURNING id", json.dumps([event]))
    return outbox_row.position(row_id, 0)


def poison(shop: Shop, key: str) -> Poison:
    """An event that has failed for the first time, and from now on waits for its last try."""
    product_id = new_product(shop, key)
    made = Poison(shop, product_id, emit_poison(shop, product_id))
    failed = """
        UPDATE parked SET tries = 4, retry_at = now() + interval '1 hour' WHERE tries = 1 AND position = $1 RETURNING 1
    """
    shop.until("products", failed, made.event_id)
    return made


def tried_again(shop: Shop, key: str) -> Poison:
    """An event that has failed once, and whose next try will be good."""
    made = poison(shop, key)
    shop.execute("products", "UPDATE parked SET data = $2 WHERE position = $1", made.event_id, _mended(made))
    return made


def _mended(poison: Poison) -> str:
    return json.dumps({"product_id": poison.product_id, "version": 1})


def mended_when_parked(shop: Shop, key: str) -> Poison:
    """Nothing yet but a product. An event about it that is parked becomes right by that."""
    shop.execute(
        "products",
        """
        CREATE OR REPLACE FUNCTION mend() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            NEW.data := json_build_object('product_id', NEW.subject_id, 'version', NEW.version);
            RETURN NEW;
        END $$;
        CREATE OR REPLACE TRIGGER mend BEFORE INSERT ON parked
           FOR EACH ROW WHEN (NEW.data LIKE '%poison once%') EXECUTE FUNCTION mend();
        """,
    )
    return Poison(shop, new_product(shop, key), 0)


def fail_once(_caller: Caller, poison: Poison) -> None:
    emit_poison(poison.shop, poison.product_id, "poison once")


def try_again(_caller: Caller, poison: Poison) -> None:
    poison.shop.execute("products", "UPDATE parked SET retry_at = now() WHERE dead_at IS NULL")


def has_its_effect(_caller: Caller, poison: Poison) -> None:
    poison.shop.until("products", "SELECT id FROM products WHERE id = $1 AND in_stock", poison.product_id)


def is_dead(_caller: Caller, poison: Poison) -> None:
    """It became a dead event, once. What is wrong with it is mended, and it is replayed: no dead event is left."""
    mend(poison)
    assert replay(poison).returncode == 0
    assert_replayed(poison)


def mend(poison: Poison) -> None:
    """Waits until the event is dead, and mends it."""
    mended = "UPDATE parked SET data = $2 WHERE position = $1 AND dead_at IS NOT NULL RETURNING tries"
    assert poison.shop.until("products", mended, poison.event_id, _mended(poison)) == [TRIES]


def replay(poison: Poison, crash_at: str = "") -> subprocess.CompletedProcess[str]:
    """`mercato events replay`, as an operator types it while the shop runs."""
    letter = f"inventory:{poison.event_id}"
    environment = {"CRASH_AT": crash_at}
    return run_command(
        "events", "replay", letter, "--data", poison.shop.data, environment=environment, first=injectable.prepare
    )


def assert_replayed(poison: Poison) -> None:
    assert poison.shop.fetch("products", "SELECT 1 FROM parked WHERE replayed_at IS NULL") == []
    assert poison.shop.fetch("products", "SELECT in_stock FROM products WHERE id = $1", poison.product_id) == [True]


# ----------------------------------------------------------------------------------------------------- all the points


def around(
    place: str,
    what: str,
    act: Callable[[Caller, Any], object],
    recover: Callable[[Caller, Any], object] | None = None,
    *,
    prepare: Callable[[Shop, str], Any] = lambda _shop, key: key,
    environment: Mapping[str, str] = NO_SETTINGS,
) -> list[Crash]:
    """The point before something, and the one after it."""
    return [Crash(f"{place}.{when}_{what}", act, recover, prepare, environment) for when in ("before", "after")]


def parts(flow: str, scenario: Scenario) -> list[Crash]:
    """The points of a payment's three parts."""
    return [crash for what in ("intent_commit", "call", "record_commit") for crash in around(flow, what, scenario)]


RECONCILED_FIRST: Final = {
    "MERCATO_PAYMENTS_SWEEP_SECONDS": "3600",
    "MERCATO_PAYMENTS_RECONCILE_SECONDS": "0.02",
}
"""The statement gives the result of an operation before it is requested again."""

ORDERS: Final = (
    *around("orders.place", "commit", buy),
    *around("orders.pay", "commit", pay_later),
    *around("orders.cancel", "commit", order_and_cancel),
    *around("orders.confirm", "commit", sell_on_account),
    *around("orders.move", "commit", buy_and_ship),
    *around("orders.refund", "commit", refund),
    *around("orders.claim", "commit", claim, prepare=bought_by_guest),
    *around("claim.assign", "call", claim, prepare=bought_by_guest),
    *around("products.create", "commit", create_product),
    *around("products.update", "commit", reprice, prepare=new_product),
    *around("products.archive", "commit", archive, prepare=new_product),
    Crash("users.register.after_commit", register),
    Crash("users.refresh.before_commit", refresh, refreshed, signed_in),
    Crash("users.refresh.after_commit", refresh, refreshed_or_signed_in_again, signed_in),
    Crash("users.change_password.before_commit", change_password, prepare=registered),
    Crash("users.set_role.before_commit", change_role, prepare=registered),
    Crash("users.letters.after_send", register_by_mail, prove, unregistered),
    *around("users.reset_password", "commit", reset_password, prepare=forgotten),
    *around("users.erase", "commit", erase, erased, prepare=registered),
)
CHECKOUT: Final = (
    *around("checkout.reserve", "call", buy),
    *around("checkout.charge", "call", buy_with_lost_answers),
    *around("checkout.authorize", "call", capture_by_hand),
    *around("checkout.reserve", "commit", buy),
    *around("checkout.commit", "call", buy_with_errors),
    *around("checkout.capture", "call", capture_by_hand),
    *around("checkout.settle", "commit", capture_by_hand),
    *around("checkout.void", "call", void_by_hand),
    *around("checkout.refund", "call", buy_and_cancel),
    *around("checkout.release", "call", reserve_and_cancel),
    *around("checkout.restock", "call", buy_and_cancel),
    *around("checkout.unwind", "commit", order_and_cancel),
    *around("refund.restock", "call", take_back),
    *around("refund.refund", "call", refund),
    *around("refund.save", "commit", take_back),
    *around("orders.reconcile", "commit", nothing, carried_on, prepare=forgotten_order),
)
PAYMENTS: Final = (
    *parts("payments.charge", buy_with_lost_answers),
    *parts("payments.authorize", capture_by_hand),
    *parts("payments.capture", capture_by_hand),
    *parts("payments.void", void_by_hand),
    *parts("payments.refund", refund),
)
PAYMENTS_SETTINGS: Final = {
    # So that after a crash the checkout comes to the same point again, before the sweeper does it in another way.
    "MERCATO_PAYMENTS_SWEEP_SECONDS": "5",
}
BANK: Final = (
    *around("sandbox.charge", "commit", buy_declined),
    *around("sandbox.authorize", "commit", capture_by_hand),
    *around("sandbox.capture", "commit", capture_by_hand),
    *around("sandbox.void", "commit", reserve_and_cancel),
    *around("sandbox.refund", "commit", buy_and_cancel),
    *around("sandbox.finish", "commit", nothing, settled, prepare=slow_order),
    *around("payments.sweep", "intent_commit", nothing, settled, prepare=slow_order),
    *around("payments.sweep", "call", nothing, settled, prepare=slow_order),
    *around("payments.sweep", "record_commit", nothing, settled, prepare=slow_order),
    *around("payments.reconcile", "call", nothing, settled, prepare=slow_order),
    *around("payments.reconcile", "cursor_commit", nothing, settled, prepare=slow_order),
    *around("payments.reconcile", "record_commit", nothing, settled, prepare=slow_order, environment=RECONCILED_FIRST),
    *around(
        "payments.void_authorization", "intent_commit", read_statement_again, settled, prepare=unwanted_authorization
    ),
    *around("payments.void_authorization", "call", read_statement_again, settled, prepare=unwanted_authorization),
    *around(
        "payments.void_authorization", "record_commit", read_statement_again, settled, prepare=unwanted_authorization
    ),
)
STOCK: Final = (
    *around("inventory.reserve", "commit", buy),
    *around("inventory.commit", "commit", buy),
    *around("inventory.release", "commit", let_expire),
    *around("inventory.restock", "commit", buy_and_cancel),
    *around("inventory.expire", "commit", let_expire),
    *around("checkout.waiting", "commit", let_expire),
    *around("inventory.set", "commit", count_stock),
    *around("inventory.adjust", "commit", receive_stock),
)
STOCK_SETTINGS: Final = {
    "MERCATO_INVENTORY_HOLD_SECONDS": "1",
    # A hold that is over is mostly ended by inventory itself before orders, whose turn it is next, gives it back.
    "MERCATO_INVENTORY_EXPIRE_EVERY_SECONDS": "0.02",
    "MERCATO_ORDERS_SWEEP_SECONDS": "0.5",
}
EVENTS: Final = (
    *around("consumer.batch", "commit", receive_stock_event),
    Crash("feed.before_commit", buy),
    *around("consumer.park", "commit", fail_once, has_its_effect, prepare=mended_when_parked),
    *around("consumer.retry", "commit", try_again, has_its_effect, prepare=tried_again),
    *around("consumer.dead", "commit", try_again, is_dead, prepare=poison),
)
TABLES: Final[Sequence[Sequence[Crash]]] = (ORDERS, CHECKOUT, PAYMENTS, BANK, STOCK, EVENTS)
CRASHES: Final[Sequence[Crash]] = tuple(itertools.chain.from_iterable(TABLES))

AT_REPLAY: Final = ("consumer.replay.before_commit", "consumer.replay.after_commit")
"""Reached by an operator's command, not by the shop."""
AT_START: Final = ("products.seed.before_commit", "inventory.seed.before_commit")
"""Reached once, while a new shop gets its demo data."""
