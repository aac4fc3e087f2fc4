"""What a storefront needs of the REST API."""

from __future__ import annotations

from typing import Any, Final

import pytest

from pacts.book import PactBook
from pacts.examples import exactly
from pacts.rest import RestExample, exchange
from pacts.rpc import State, given
from pacts.storefront import DeclinedDetails, OutOfStockDetails, Refusal, Storefront

CONSUMER: Final = "storefront"

BUYER: Final = 7_001
MUG: Final = 7_101
PASSWORD: Final = "a password of the pacts"
ACCOUNT: Final = given("an account", user_id=BUYER)


def token() -> str:
    return f"token-of-{BUYER}"


def shown(order_id: int, status: str, payment: str) -> dict[str, Any]:
    money = {"amount": "25.00", "currency": "USD"}
    return {
        "id": order_id,
        "status": exactly(status),
        "payment": exactly(payment),
        "fulfilment": exactly("unfulfilled"),
        "items": [{"product_id": MUG, "name": "Mug", "quantity": 2, "line_total": money}],
        "total": money,
    }


def order(name: str, order_id: int) -> State:
    return given(name, order_id=order_id, user_id=BUYER, product_id=MUG, quantity=2)


async def test_a_customer_opens_an_account(book: PactBook):
    email = "new@example.com"
    example = RestExample(
        description="an account is opened",
        method="POST",
        path="/register",
        body={"email": email, "name": "New", "password": PASSWORD},
        status=201,
        answer={"id": 1, "email": exactly(email)},
    )
    account = await exchange(book, example, lambda s, url: Storefront(s, url).register(email, "New", PASSWORD))
    assert account.email == email


async def test_a_customer_signs_in(book: PactBook):
    email = f"pact-{BUYER}@example.com"
    example = RestExample(
        description="a customer signs in",
        method="POST",
        path="/login",
        body={"email": exactly(email), "password": exactly(PASSWORD)},
        status=200,
        answer={
            "access_token": "token",
            "refresh_token": "token",
            "expires_in": 900,
            "user": {"id": exactly(BUYER), "email": exactly(email)},
        },
        states=(ACCOUNT,),
    )
    signed_in = await exchange(book, example, lambda s, url: Storefront(s, url).sign_in(email, PASSWORD))
    assert signed_in.user.id == BUYER


async def test_a_wrong_password_is_refused(book: PactBook):
    email = f"pact-{BUYER}@example.com"
    example = RestExample(
        description="a customer signs in with a wrong password",
        method="POST",
        path="/login",
        body={"email": exactly(email), "password": exactly("a wrong password")},
        status=401,
        answer={"code": exactly("users.wrong_credentials")},
        states=(ACCOUNT,),
    )
    with pytest.raises(Refusal, match=r"401 users.wrong_credentials"):
        await refused(book, example, lambda s, url: Storefront(s, url).sign_in(email, "a wrong password"))


async def refused(book: PactBook, example: RestExample, use: Any) -> None:
    """Runs an exchange whose answer is a refusal, and raises it."""

    async def caught(session: Any, url: str) -> Refusal:
        try:
            await use(session, url)
        except Refusal as refusal:
            return refusal
        raise AssertionError("it is not refused")

    raise await exchange(book, example, caught)


async def test_a_search_finds_products_with_price_and_stock(book: PactBook):
    example = RestExample(
        description="products are searched",
        method="GET",
        path="/products",
        query={"q": "mug"},
        status=200,
        answer=[{"id": MUG, "name": "Mug", "price": {"amount": "12.50", "currency": "USD"}, "in_stock": True}],
        states=(given("pieces in stock", product_id=MUG, pieces=50),),
    )
    products = await exchange(book, example, lambda s, url: Storefront(s, url).search("mug"))
    assert [product.price.amount for product in products] == ["12.50"]


async def test_a_customer_places_an_order(book: PactBook):
    example = RestExample(
        description="an order is placed",
        method="POST",
        path="/orders",
        body={"items": [{"product_id": MUG, "quantity": 2}]},
        token_of=BUYER,
        has_key=True,
        status=201,
        answer=shown(1, "pending", "unpaid"),
        states=(ACCOUNT, given("pieces in stock", product_id=MUG, pieces=50)),
    )
    placed = await exchange(book, example, lambda s, url: Storefront(s, url, token()).place(MUG, 2, "a-key"))
    assert placed.status == "pending"


async def test_an_order_without_stock_says_what_there_is(book: PactBook):
    short = 7_103
    example = RestExample(
        description="an order without stock is placed",
        method="POST",
        path="/orders",
        body={"items": [{"product_id": exactly(short), "quantity": exactly(2)}]},
        headers={"Prefer": "wait=10"},
        token_of=BUYER,
        has_key=True,
        status=409,
        answer={
            "code": exactly("orders.out_of_stock"),
            "details": {"items": [{"product_id": exactly(short), "available": exactly(1)}]},
        },
        states=(ACCOUNT, given("pieces in stock", product_id=short, pieces=1)),
    )

    with pytest.raises(Refusal) as raised:
        await refused(
            book, example, lambda s, url: Storefront(s, url, token()).place(short, 2, "a-key", wait_seconds=10)
        )
    assert isinstance(raised.value.details, OutOfStockDetails)
    assert raised.value.details.items[0].available == 1


def paying(description: str, order_id: int, method: str, status: int, answer: Any) -> RestExample:
    return RestExample(
        description=description,
        method="POST",
        path="/payments",
        body={"order_id": order_id, "payment_method": exactly(method)},
        token_of=BUYER,
        has_key=True,
        status=status,
        answer=answer,
        states=(order("an order waits for its payment", order_id),),
    )


async def test_a_customer_pays_an_order(book: PactBook):
    captured = {"id": 1, "status": exactly("captured"), "captured": {"amount": "25.00", "currency": "USD"}}
    example = paying("an order is paid", 7_601_000, "sandbox:ok", 201, captured)
    paid = await exchange(book, example, lambda s, url: Storefront(s, url, token()).pay(7_601_000, "sandbox:ok", "key"))
    assert paid.status == "captured"


async def test_a_declined_payment_says_why(book: PactBook):
    problem = {
        "code": exactly("orders.payment_declined"),
        "details": {"order_id": 7_602_000, "provider_code": exactly("card_declined")},
    }
    example = paying("a payment is declined", 7_602_000, "sandbox:declined", 402, problem)

    with pytest.raises(Refusal) as raised:
        await refused(
            book, example, lambda s, url: Storefront(s, url, token()).pay(7_602_000, "sandbox:declined", "key")
        )
    assert isinstance(raised.value.details, DeclinedDetails)
    assert raised.value.details.provider_code == "card_declined"


async def test_a_customer_sees_a_paid_order(book: PactBook):
    example = RestExample(
        description="a paid order is read",
        method="GET",
        path="/orders/7603000",
        token_of=BUYER,
        status=200,
        answer=shown(7_603_000, "confirmed", "paid"),
        states=(order("an order is paid", 7_603_000),),
    )
    seen = await exchange(book, example, lambda s, url: Storefront(s, url, token()).order(7_603_000))
    assert seen.payment == "paid"


async def test_a_customer_cancels_an_order(book: PactBook):
    example = RestExample(
        description="an order is cancelled",
        method="POST",
        path="/orders/7604000/cancel",
        body={},
        token_of=BUYER,
        status=200,
        answer=shown(7_604_000, "cancelled", "unpaid"),
        states=(order("an order waits for its payment", 7_604_000),),
    )
    cancelled = await exchange(book, example, lambda s, url: Storefront(s, url, token()).cancel(7_604_000))
    assert cancelled.status == "cancelled"
