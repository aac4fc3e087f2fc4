"""The requests in the documents of the five reference systems.

Two tables translate them to the operations of the shop:

    ROUTES    their paths that the API does not have
    FORMS     other forms of requests that the API has: how each is recognised, how it becomes the request of the
              operation, and which additional fields its answer has

A system has a letter:

    A   orders and payments         an order of an `item_id`; `/payments/process?order_id=..&amount=..`
    B   users and orders            in the API's own form
    C   orders and customers        `customer_id`, `items` as plain numbers; `/customers/{id}`
    D   users, products, orders     `username`, `product_ids` (skus), `/user/{id}`, `/products/SKU`
    E   gateway and services        in the API's own form
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, TypeVar, cast

import msgspec
from msgspec import Meta

from mercato.chassis.contract import MAX_ID, Forbidden, worded
from mercato.contracts import orders as contract
from mercato.contracts.orders import NAMED_BY_SKU, Orders, PaidOrder, PlacedOrder, PlaceLine
from mercato.contracts.products import FindProduct, Products, Sku, SkuNotFound
from mercato.contracts.roles import SIGNED_IN
from mercato.contracts.users import (
    GetUser,
    Password,
    RegisterWithoutPassword,
    SignInNamed,
    Tokens,
    User,
    Username,
    UserNotFound,
    Users,
)
from mercato.gateway import fields
from mercato.gateway.fields import PaymentMethod, UserName
from mercato.gateway.money import Amount, text_of
from mercato.gateway.route import Form, Input, Output, Route, RouteRequest
from mercato.gateway.routes import orders, payments, users
from mercato.gateway.validation import invalid

T = TypeVar("T", bound=Output)

UserNumber = (
    orders.Id
    | Annotated[
        str,
        Meta(pattern=r"^[1-9][0-9]{0,15}\Z", extra=worded("must be a number without leading zeros"), examples=["1"]),
    ]
)
"""An id of a user as a number, or as a string of digits."""


def _extended(kind: type[T], answer: Output, **more: Any) -> T:
    """The answer of the API's own form, with the additional fields of `kind`."""
    return kind(**{name: getattr(answer, name) for name in answer.__struct_fields__}, **more)


def _counted(named: Iterable[int | str]) -> Sequence[PlaceLine]:
    """A line for each product; its quantity is how often it is named. Text that is not a number is a sku."""
    return [
        PlaceLine(product_id=int(name), quantity=quantity)
        if str(name).isdigit()
        else PlaceLine(product_id=NAMED_BY_SKU, sku=str(name), quantity=quantity)
        for name, quantity in Counter(named).items()
    ]


# ---------------------------------------------------------------------------------------- A: an item and its amount


class ItemOrderIn(Input):
    """An order of one product: `item_id`, and the `amount` that the buyer was shown."""

    item_id: orders.Id
    amount: Amount
    user_id: orders.Id | None = None


class ItemOrderOut(orders.OrderOut, frozen=True, kw_only=True, gc=False):
    item_id: int


class ProcessQuery(Input):
    order_id: orders.Id
    amount: Annotated[Amount, Meta(description="What is due; another amount is refused.", examples=["99.99"])]
    payment_method: Annotated[PaymentMethod, Meta(description="Without it, the shop's default.")] | None = None


class ProcessedOut(payments.PaymentOut, frozen=True, kw_only=True, gc=False):
    message: str


def _order_item(request: RouteRequest) -> contract.PlaceOrder:
    body: ItemOrderIn = request.body
    return orders.placing(request, body.user_id, [PlaceLine(product_id=body.item_id)], body.amount)


def _ordered_item(placed: PlacedOrder) -> ItemOrderOut:
    return _extended(ItemOrderOut, orders.placed_out(placed), item_id=placed.order.lines[0].product_id)


def _process(request: RouteRequest) -> contract.PayOrder:
    query: ProcessQuery = request.query
    return contract.PayOrder(
        id=query.order_id,
        method=query.payment_method,
        expected_total=text_of(query.amount),
        idempotency_key=request.idempotency_key,
        fingerprint=request.fingerprint,
        access_token=request.access_token,
    )


def _processed(paid: PaidOrder) -> ProcessedOut:
    payment = payments.paid_out(paid)
    done = "is being processed" if payment.status == "pending" else "was processed"
    message = f"The payment of {payment.amount.amount} {payment.amount.currency} for order {payment.order_id} {done}."
    return _extended(ProcessedOut, payment, message=message)


# ------------------------------------------------------------------------------------ C: a customer and plain numbers


class CustomerOrderIn(Input):
    """An order of a customer: `items` are ids of products, or objects with `product_id` and `quantity`."""

    customer_id: orders.Id
    items: Annotated[tuple[orders.Id | orders.ItemIn, ...], Meta(min_length=1, max_length=contract.LINES_LIMIT)]


class CustomerOrderOut(orders.OrderOut, frozen=True, kw_only=True, gc=False):
    order_id: int


def _is_of_customer(members: Mapping[str, Any]) -> bool:
    """It has `customer_id`; or it needs one, because its items are plain numbers, or there are none."""
    items = members.get("items")
    is_plain = isinstance(items, list) and not any(isinstance(item, dict) for item in cast(list[Any], items))
    return "customer_id" in members or (is_plain and "user_id" not in members)


def _order_of_customer(request: RouteRequest) -> contract.PlaceOrder:
    body: CustomerOrderIn = request.body
    plain = _counted(item for item in body.items if isinstance(item, int))
    others = [
        PlaceLine(product_id=item.product_id, quantity=item.quantity)
        for item in body.items
        if not isinstance(item, int)
    ]
    return orders.placing(request, body.customer_id, [*plain, *others])


def _ordered_by_customer(placed: PlacedOrder) -> CustomerOrderOut:
    return _extended(CustomerOrderOut, orders.placed_out(placed), order_id=placed.order.id)


# ----------------------------------------------------------------------------------------- D: names instead of numbers


class ProductsOrderIn(Input, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An order of several products: `product_ids` are skus, compared without case, or ids."""

    user_id: UserNumber | None = None
    product_ids: Annotated[tuple[orders.Id | Sku, ...], Meta(min_length=1, max_length=contract.LINES_LIMIT)]


class ProductsOrderOut(orders.OrderOut, frozen=True, kw_only=True, gc=False):
    product_ids: list[str]
    """The sku of each piece."""


class NamedUserOut(users.UserOut, frozen=True, kw_only=True, gc=False):
    username: str


class RegisterNamedIn(Input):
    """An account without a password: its owner sets one by a link that is mailed to the address."""

    username: UserName
    email: fields.Email


class LoginNamedIn(Input):
    """`username` is the name of an account, or with an `@` its e-mail address."""

    username: Username
    password: Password


class NamedTokensOut(users.TokensOut, frozen=True, kw_only=True, gc=False):
    message: str


def _register_named(request: RouteRequest) -> RegisterWithoutPassword:
    body: RegisterNamedIn = request.body
    return RegisterWithoutPassword(email=body.email, name=body.username)


def _sign_in_named(request: RouteRequest) -> SignInNamed:
    body: LoginNamedIn = request.body
    return SignInNamed(username=body.username, password=body.password, address=request.address)


def _signing_in_named(request: RouteRequest) -> str:
    body: LoginNamedIn = request.body
    return users.account_of(body.username) if "@" in body.username else f"name {users.folded(body.username)}"


def _signed_in_named(tokens: Tokens) -> NamedTokensOut:
    return _extended(NamedTokensOut, users.tokens_out(tokens), message=f"{tokens.user.name} is signed in.")


def _order_products(request: RouteRequest) -> contract.PlaceOrder:
    body: ProductsOrderIn = request.body
    user_id = None if body.user_id is None else int(body.user_id)
    if user_id is not None and user_id > MAX_ID:
        raise invalid(("user_id", "is not an id"))
    return orders.placing(request, user_id, _counted(body.product_ids))


def _ordered_products(placed: PlacedOrder) -> ProductsOrderOut:
    skus = [sku for line in placed.order.lines for sku in [line.sku] * line.quantity]
    return _extended(ProductsOrderOut, orders.placed_out(placed), product_ids=skus)


def _find_product(request: RouteRequest) -> FindProduct:
    return FindProduct(sku=request.text["id"])


def _get_user(request: RouteRequest) -> GetUser:
    return GetUser(id=request.path["id"])


def _named_user(user: User) -> NamedUserOut:
    return _extended(NamedUserOut, users.user_out(user), username=user.name)


# ----------------------------------------------------------------------------------------------------------- the tables

ROUTES: Final[tuple[Route, ...]] = (
    Route(
        system="A",
        method="POST",
        path="/payments/process",
        operation=Orders.pay,
        summary="Pay an order that is not paid yet, by query parameters",
        roles=SIGNED_IN,
        query=ProcessQuery,
        takes_access_token=True,
        request=_process,
        answer=_processed,
        output=ProcessedOut,
        idempotency=True,
        etag=lambda paid: paid.payment.version,
        replayed=lambda paid: paid.replayed,
        fields={"id": "?order_id", "method": "?payment_method", "expected_total": "?amount"},
        errors=tuple(
            error
            for route in payments.ROUTES
            if route.operation is Orders.pay
            for error in route.errors
            if error is not Forbidden  # only payments without capture raise it
        ),
    ),
    Route(
        system="C",
        method="GET",
        path="/customers/{id}",
        operation=Users.get,
        summary="One customer: yourself, or any for staff",
        roles=SIGNED_IN,
        request=_get_user,
        answer=users.user_out,
        output=users.UserOut,
        etag=users.version_of,
        errors=(UserNotFound,),
    ),
    Route(
        system="D",
        method="GET",
        path="/user/{id}",
        operation=Users.get,
        summary="One user: yourself, or any for staff",
        roles=SIGNED_IN,
        request=_get_user,
        answer=_named_user,
        output=NamedUserOut,
        etag=users.version_of,
        errors=(UserNotFound,),
    ),
)

FORMS: Final[tuple[Form, ...]] = (
    Form(
        system="A",
        method="POST",
        path="/orders",
        summary="an order of an item and its amount",
        is_body=lambda members: "item_id" in members,
        body=ItemOrderIn,
        examples={"an item and its amount": {"item_id": 1, "amount": 1299.99}},
        request=_order_item,
        answer=_ordered_item,
        output=ItemOrderOut,
    ),
    Form(
        system="D",
        method="POST",
        path="/orders",
        summary="an order of several products by their skus",
        is_body=lambda members: "product_ids" in members,
        body=ProductsOrderIn,
        examples={"several products by sku": {"user_id": "1", "product_ids": ["p1", "p2"]}},
        request=_order_products,
        answer=_ordered_products,
        output=ProductsOrderOut,
        errors=(SkuNotFound,),
    ),
    Form(
        system="C",
        method="POST",
        path="/orders",
        summary="an order of a customer",
        is_body=_is_of_customer,
        body=CustomerOrderIn,
        examples={"a customer and numbers of products": {"customer_id": 1, "items": [1, 2]}},
        request=_order_of_customer,
        answer=_ordered_by_customer,
        output=CustomerOrderOut,
        fields={"user_id": "customer_id"},
    ),
    Form(
        system="D",
        method="POST",
        path="/register",
        summary="an account without a password, which is set by a link that is mailed to the address",
        is_body=lambda members: "username" in members,
        body=RegisterNamedIn,
        examples={"a name without a password": {"username": "carol", "email": "carol@example.com"}},
        operation=Users.register_without_password,
        request=_register_named,
        answer=_named_user,
        output=NamedUserOut,
        fields={"name": "username"},
    ),
    Form(
        system="D",
        method="POST",
        path="/login",
        summary="by the name of an account or its e-mail address; of accounts with one name, the oldest",
        is_body=lambda members: "username" in members,
        body=LoginNamedIn,
        examples={"Alice by her name": {"username": "Alice", "password": "demo-password"}},
        operation=Users.sign_in_named,
        request=_sign_in_named,
        tries=_signing_in_named,
        answer=_signed_in_named,
        output=NamedTokensOut,
    ),
    Form(
        system="D",
        method="GET",
        path="/products/{id}",
        summary="a product by its sku, compared without case",
        text={"id": Sku},
        operation=Products.find,
        request=_find_product,
        errors=(SkuNotFound,),
    ),
)


def added_to(routes: Sequence[Route]) -> tuple[Route, ...]:
    """The routes with their forms, and the routes of this module."""
    found: dict[tuple[str, str], list[Form]] = {}
    for form in FORMS:
        found.setdefault((form.method, form.path), []).append(form)
    own = [msgspec.structs.replace(r, forms=tuple(found.pop((r.method, r.path), ()))) for r in routes]
    assert not found, f"there are no routes for {sorted(found)}"
    return (*own, *ROUTES)
