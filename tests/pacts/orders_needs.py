"""What orders asks of the services that it calls, as examples.

Each example is about an order of its own (`order_id`, `order_nonce`) at its provider, so that verifying one does not
change the state of another. Orders itself gives other ids: its requests are compared by their types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mercato.chassis.contract import InvalidRequest
from mercato.contracts.inventory import (
    AnotherOrder as StockOfAnotherOrder,
    HoldLimitReached,
    Inventory,
    OutOfStock,
    ReservationClosed,
)
from mercato.contracts.payments import AttemptReused, OutcomePending, Payments, RefundTooLarge
from mercato.contracts.products import ProductArchived, ProductNotFound, Products, SkuNotFound
from mercato.contracts.users import UserNotFound, Users
from pacts.examples import exactly
from pacts.rpc import Exchange, State, given, refusal

AT: Final = "2026-11-30T12:00:00Z"
MUG: Final = 7_101
MUG_MINOR: Final = 1_250
QUANTITY: Final = 2
TOTAL_MINOR: Final = QUANTITY * MUG_MINOR
BUYER: Final = 7_001
UNKNOWN: Final = 2**53 - 2
METHOD: Final = "sandbox:ok"

LINES: Final = [{"product_id": MUG, "quantity": QUANTITY}]


def nonce(order_id: int) -> int:
    return order_id * 1_000_003


def of_order(order_id: int, what: str) -> dict[str, Any]:
    return {
        "order_id": order_id,
        "idempotency_key": f"order:{order_id}:{what}",
        "order_nonce": nonce(order_id),
    }


# -------------------------------------------------------------------------------------------------- users and products


def user(**fields: Any) -> Mapping[str, Any]:
    return {
        "id": BUYER,
        "email": "buyer@example.com",
        "name": "Buyer",
        "role": "customer",
        "created_at": AT,
        "updated_at": AT,
        "version": 1,
        **fields,
    }


BUYER_FOUND: Final = Exchange(
    description="the buyer is read",
    operation=Users.get,
    request={"id": BUYER},
    answer=user(),
    states=(given("an account", user_id=BUYER),),
)
BUYER_UNKNOWN: Final = Exchange(
    description="an unknown buyer is read",
    operation=Users.get,
    request={"id": UNKNOWN},
    error=refusal(UserNotFound, user_id=UNKNOWN),
)
CLAIMANT: Final = Exchange(
    description="an account claims an order",
    operation=Users.get,
    request={"id": BUYER},
    answer=user(email_proven=exactly(True)),
    states=(given("an account with a proven address", user_id=BUYER),),
)

MUG_EXISTS: Final = given("a product", product_id=MUG, price_minor=MUG_MINOR)


QUOTE: Final = Exchange(
    description="a product is quoted",
    operation=Products.quote,
    request={"id": MUG},
    answer={"id": MUG, "sku": f"PACT-{MUG}", "name": "Mug", "price_minor": MUG_MINOR, "currency": "USD"},
    states=(MUG_EXISTS,),
)
QUOTE_OF_NOTHING: Final = Exchange(
    description="an unknown product is quoted",
    operation=Products.quote,
    request={"id": UNKNOWN},
    error=refusal(ProductNotFound, product_id=UNKNOWN),
)
QUOTE_OF_ARCHIVED: Final = Exchange(
    description="an archived product is quoted",
    operation=Products.quote,
    request={"id": 7_102},
    error=refusal(ProductArchived, product_id=7_102),
    states=(given("a product that is archived", product_id=7_102, price_minor=MUG_MINOR),),
)
FOUND_BY_SKU: Final = Exchange(
    description="a product is found by its sku",
    operation=Products.find,
    request={"sku": f"PACT-{MUG}"},
    answer={
        "id": MUG,
        "sku": f"PACT-{MUG}",
        "name": "Mug",
        "description": "",
        "price_minor": MUG_MINOR,
        "currency": "USD",
        "category": "things",
        "status": "active",
        "created_at": AT,
        "updated_at": AT,
        "version": 1,
    },
    states=(MUG_EXISTS,),
)
SKU_UNKNOWN: Final = Exchange(
    description="an unknown sku is looked for",
    operation=Products.find,
    request={"sku": "NO-SUCH-SKU"},
    error=refusal(SkuNotFound, sku="NO-SUCH-SKU"),
)

# ----------------------------------------------------------------------------------------------------------- inventory


def stock(name: str, order_id: int) -> State:
    return given(name, order_id=order_id, order_nonce=nonce(order_id), product_id=MUG, quantity=QUANTITY)


def reservation(order_id: int, state: str, *, expires: bool = False) -> Mapping[str, Any]:
    return {
        "order_id": order_id,
        "state": exactly(state),
        "lines": LINES,
        "expires_in_s": 900.0 if expires else None,
    }


LIMITS: Final = {"units": 10, "share_percent": 20, "before": [0]}
"""What the open orders of a customer may hold together, and what they hold; orders of staff have no such bound."""


def reserve(
    order_id: int,
    description: str,
    *,
    for_payment: bool,
    guest: bool = False,
    bound: Mapping[str, Any] | None = LIMITS,
    answer: Mapping[str, Any] | None = None,
    error: Mapping[str, Any] | None = None,
    states: tuple[State, ...] = (given("pieces in stock", product_id=MUG, pieces=50),),
    lines: Any = LINES,
) -> Exchange:
    held = reservation(order_id, "held", expires=not for_payment)
    return Exchange(
        description=description,
        operation=Inventory.reserve,
        request={
            **of_order(order_id, "reserve"),
            "lines": lines,
            "for_payment": exactly(for_payment),
            "guest": exactly(guest),
            "customer_bound": bound,
        },
        answer=(answer or held) if error is None else None,
        error=error,
        states=states,
    )


HELD: Final = reserve(7_201, "stock is held until it is paid", for_payment=False)
HELD_FOR_STAFF: Final = reserve(7_202, "stock is held for an order that staff placed", for_payment=False, bound=None)
HELD_FOR_PAYMENT: Final = reserve(7_203, "stock is held for a payment", for_payment=True)
HELD_BY_STAFF_FOR_PAYMENT: Final = reserve(
    7_204, "stock is held for a payment of an order that staff placed", for_payment=True, bound=None
)
HELD_FOR_GUEST: Final = reserve(7_209, "stock is held for a guest", for_payment=False, guest=True, bound=None)
SHORT: Final = [{"product_id": 7_103, "quantity": QUANTITY}]
OUT_OF_STOCK: Final = reserve(
    7_205,
    "too little is in stock",
    for_payment=False,
    error=refusal(
        OutOfStock,
        order_id=7_205,
        lines=[{"product_id": 7_103, "requested": QUANTITY, "available": exactly(1)}],
    ),
    states=(given("pieces in stock", product_id=7_103, pieces=1),),
    lines=SHORT,
)
HOLD_LIMIT: Final = reserve(
    7_206,
    "open orders of the customer hold too much",
    for_payment=False,
    bound={"units": 10, "share_percent": 20, "before": [1_000]},
    error=refusal(
        HoldLimitReached,
        order_id=7_206,
        lines=[{"product_id": MUG, "requested": QUANTITY, "available": 0}],
        bounds=[10],
    ),
)
HOLD_EXPIRED: Final = reserve(
    7_207,
    "the stock of an order is reserved after it was released",
    for_payment=True,
    error=refusal(ReservationClosed, order_id=7_207, state=exactly("released")),
    states=(stock("stock is released", 7_207),),
)
RESERVED_BY_ANOTHER: Final = reserve(
    7_208,
    "another order had the id",
    for_payment=True,
    error=refusal(StockOfAnotherOrder, order_id=7_208, newest_order_id=7_208),
    states=(given("stock of another order is held", order_id=7_208, product_id=MUG, quantity=QUANTITY),),
)

SOLD: Final = Exchange(
    description="held stock is sold",
    operation=Inventory.commit,
    request=of_order(7_211, "commit"),
    answer=reservation(7_211, "committed"),
    states=(stock("stock is held", 7_211),),
)
SALE_OF_RELEASED: Final = Exchange(
    description="released stock is sold",
    operation=Inventory.commit,
    request=of_order(7_212, "commit"),
    error=refusal(ReservationClosed, order_id=7_212, state="released"),
    states=(stock("stock is released", 7_212),),
)
RELEASED: Final = Exchange(
    description="held stock is released",
    operation=Inventory.release,
    request=of_order(7_213, "release"),
    answer=reservation(7_213, "released"),
    states=(stock("stock is held", 7_213),),
)
RELEASE_OF_NOTHING: Final = Exchange(
    description="stock that was never held is released",
    operation=Inventory.release,
    request=of_order(7_214, "release"),
    answer={**reservation(7_214, "released"), "lines": []},
)
RELEASE_OF_SOLD: Final = Exchange(
    description="sold stock is released",
    operation=Inventory.release,
    request=of_order(7_215, "release"),
    answer=reservation(7_215, "committed"),
    states=(stock("stock is sold", 7_215),),
)


def restocked(order_id: int, description: str, reference: Any) -> Exchange:
    return Exchange(
        description=description,
        operation=Inventory.restock,
        request={**of_order(order_id, "restock"), "lines": LINES, "reference": reference},
        answer=reservation(order_id, "committed"),
        states=(stock("stock is sold", order_id),),
    )


RESTOCKED: Final = restocked(7_216, "the goods of a cancelled order are restocked", exactly("cancel"))
TAKEN_BACK: Final = restocked(7_217, "returned goods are restocked", "0f3a5c7e9b1d2f4a6c8e0b1d")

HOLDS: Final = Exchange(
    description="holds without an expiry are listed",
    operation=Inventory.holds,
    request={"before": None, "quiet_seconds": 0.0},
    answer={"holds": [{"order_id": 7_218, "order_nonce": nonce(7_218)}], "next_before": None},
    states=(stock("stock is held for a payment", 7_218),),
)
STOCK_TRACED: Final = Exchange(
    description="the changes of the stock of an order are listed",
    operation=Inventory.trace,
    request={"order_id": 7_219, "order_nonce": nonce(7_219)},
    answer={"steps": [{"what": "held", "lines": LINES, "at": AT}]},
    states=(stock("stock is held", 7_219),),
)

# ------------------------------------------------------------------------------------------------------------ payments


def paid(name: str, order_id: int, payment_id: int | None = None) -> State:
    known = {} if payment_id is None else {"payment_id": payment_id}
    about = {"order_id": order_id, "order_nonce": nonce(order_id), "user_id": BUYER, "amount_minor": TOTAL_MINOR}
    return given(name, **about, **known)


def payment(order_id: int, status: str, *, payment_id: int = 1, code: Any = None, **minor: Any) -> Mapping[str, Any]:
    amounts = {"authorized_minor": TOTAL_MINOR, "captured_minor": 0, "refunded_minor": 0}
    return {
        "id": payment_id,
        "order_id": order_id,
        "attempt": exactly(1),
        "user_id": BUYER,
        "method": METHOD,
        "currency": "USD",
        "amount_minor": TOTAL_MINOR,
        **amounts,
        **minor,
        "status": exactly(status),
        "code": code,
        "created_at": AT,
        "updated_at": AT,
        "version": 1,
    }


CAPTURED: Final = {"captured_minor": exactly(TOTAL_MINOR)}
REFUNDED: Final = {**CAPTURED, "refunded_minor": exactly(TOTAL_MINOR)}
NOTHING_TAKEN: Final = {"authorized_minor": exactly(0), "captured_minor": exactly(0)}


def paying(order_id: int, what: str, method: str = METHOD) -> Mapping[str, Any]:
    return {
        **of_order(order_id, what),
        "attempt": exactly(1),
        "user_id": BUYER,
        "amount_minor": TOTAL_MINOR,
        "currency": "USD",
        "method": exactly(method),
    }


def checked(method: str | None) -> Exchange:
    what = "the default payment method is asked for" if method is None else f"the payment method {method} is checked"
    return Exchange(
        description=what,
        operation=Payments.check_method,
        request={"method": exactly(method)},
        answer={"method": exactly(method or METHOD)},
    )


METHOD_UNKNOWN: Final = Exchange(
    description="an unknown payment method is checked",
    operation=Payments.check_method,
    request={"method": exactly("nobank:x")},
    error=refusal(InvalidRequest, errors=[{"field": "payment_method", "message": "A sentence."}]),
)


def charge(order_id: int, description: str, answer: Any, method: str = METHOD) -> Exchange:
    return Exchange(
        description=description, operation=Payments.charge, request=paying(order_id, "charge", method), answer=answer
    )


CHARGED: Final = charge(7_301, "an order is charged", payment(7_301, "captured", **CAPTURED))
DECLINED: Final = charge(
    7_302,
    "a charge is declined",
    payment(7_302, "failed", code="card_declined", **NOTHING_TAKEN),
    "sandbox:declined",
)
CHARGE_PENDING: Final = Exchange(
    description="a charge is processing at the provider",
    operation=Payments.charge,
    request=paying(7_303, "charge", "sandbox:slow:60000"),
    error=refusal(OutcomePending, operation="charge", order_id=7_303, settles_at=AT),
)
CHARGE_DIFFERS: Final = Exchange(
    description="an attempt was begun with another amount",
    operation=Payments.charge,
    request=paying(7_304, "charge"),
    error=refusal(AttemptReused, order_id=7_304, attempt=1, field="amount_minor"),
    states=(
        given(
            "a payment is captured",
            order_id=7_304,
            order_nonce=nonce(7_304),
            user_id=BUYER,
            amount_minor=TOTAL_MINOR + 1,
        ),
    ),
)
AUTHORIZED: Final = Exchange(
    description="an order is authorized",
    operation=Payments.authorize,
    request=paying(7_305, "authorize"),
    answer=payment(7_305, "authorized"),
)
CAPTURE: Final = Exchange(
    description="an authorized payment is captured",
    operation=Payments.capture,
    request={**of_order(7_306, "capture"), "attempt": exactly(1)},
    answer=payment(7_306, "captured", **CAPTURED),
    states=(paid("a payment is authorized", 7_306),),
)
PART_MINOR: Final = 1_000
CAPTURE_PART: Final = Exchange(
    description="a part of an authorized payment is captured",
    operation=Payments.capture_part,
    request={**of_order(7_307, "capture"), "attempt": exactly(1), "amount_minor": exactly(PART_MINOR)},
    answer=payment(7_307, "captured", captured_minor=exactly(PART_MINOR)),
    states=(paid("a payment is authorized", 7_307),),
)
VOID_OF_NOTHING: Final = Exchange(
    description="a payment that was never begun is voided",
    operation=Payments.void,
    request=paying(7_318, "void"),
    answer=payment(7_318, "voided", **NOTHING_TAKEN),
)
VOIDED: Final = Exchange(
    description="an authorized payment is voided",
    operation=Payments.void,
    request=paying(7_308, "void"),
    answer=payment(7_308, "voided"),
    states=(paid("a payment is authorized", 7_308),),
)
VOID_OF_CAPTURED: Final = Exchange(
    description="a captured payment is to be undone",
    operation=Payments.void,
    request=paying(7_309, "void"),
    answer=payment(7_309, "captured", **CAPTURED),
    states=(paid("a payment is captured", 7_309),),
)


def refund(order_id: int, description: str, **outcome: Any) -> Exchange:
    return Exchange(
        description=description,
        operation=Payments.refund,
        request={
            **of_order(order_id, "refund"),
            "attempt": exactly(1),
            "amount_minor": TOTAL_MINOR,
            "reference": f"refund-{order_id}",
        },
        states=(paid("a payment is captured", order_id),),
        **outcome,
    )


REFUND: Final = refund(7_310, "a captured payment is refunded", answer=payment(7_310, "refunded", **REFUNDED))
REFUND_BY_CANCELLING: Final = refund(
    7_311, "the payment of a cancelled order is refunded", answer=payment(7_311, "refunded", **REFUNDED)
)
REFUND_TOO_LARGE: Final = Exchange(
    description="more is refunded than is left",
    operation=Payments.refund,
    request={
        **of_order(7_312, "refund"),
        "attempt": exactly(1),
        "amount_minor": TOTAL_MINOR,
        "reference": "refund-7312",
    },
    error=refusal(RefundTooLarge, payment_id=1, wanted_minor=TOTAL_MINOR, left_minor=exactly(0), currency="USD"),
    states=(paid("a payment is refunded", 7_312),),
)


def read(id_: int, status: str, purpose: str, **minor: Any) -> Exchange:
    """Payments is asked for a payment by its id, which staff have named. Its order has the same id."""
    return Exchange(
        description=f"a payment that is {status} is read, to {purpose}",
        operation=Payments.get,
        request={"id": id_},
        answer={**payment(id_, status, payment_id=id_, **minor), "order_id": id_},
        states=(paid(f"a payment is {status}", id_, id_),),
    )


PAYMENTS_TRACED: Final = Exchange(
    description="the operations with the provider for an order are listed",
    operation=Payments.trace,
    request={"order_id": 7_313, "order_nonce": nonce(7_313)},
    answer={
        "steps": [
            {
                "payment_id": 1,
                "kind": "charge",
                "amount_minor": TOTAL_MINOR,
                "currency": "USD",
                "status": "succeeded",
                "code": None,
                "calls": 1,
                "began_at": AT,
                "settled_at": AT,
            }
        ]
    },
    states=(paid("a payment is captured", 7_313),),
)


HAS: Final = {"authorized": "is authorized", "captured": "is captured", "failed": "has failed"}


def listed(order_id: int, description: str, status: str, **minor: Any) -> Exchange:
    return Exchange(
        description=description,
        operation=Payments.list,
        request={
            "order_id": order_id,
            "user_id": None,
            "before": None,
            "limit": exactly(200),
            "order_nonce": nonce(order_id),
            "count": exactly(False),
        },
        answer={"payments": [payment(order_id, status, **minor)]},
        states=(paid(f"a payment {HAS[status]}", order_id),),
    )


ASSIGNED: Final = Exchange(
    description="the payments of an order get another owner",
    operation=Payments.assign,
    request={"order_id": 7_317, "order_nonce": nonce(7_317), "user_id": BUYER + 1},
    answer={},
    states=(paid("a payment is captured", 7_317),),
)
