"""Types of request fields whose service checks more than their contract: what a JSON schema can say of those checks.

The services enforce the checks, and word their errors; this module only describes them. `STRICTER` is the key of a
schema whose value is a pattern that replaces the contract's.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from msgspec import Meta

from mercato.chassis.contract import checked
from mercato.chassis.mail import addresses
from mercato.contracts import payments, products, users

STRICTER: Final = "x-stricter-pattern"

_CONTROLS: Final = r"\x00-\x1f\x7f-\x9f\u2028\u2029"
_VISIBLE: Final = rf"^[^{_CONTROLS}]*[^\s{_CONTROLS}][^{_CONTROLS}]*\Z"

Email = Annotated[
    users.Email,
    Meta(
        extra=checked(lambda email: addresses.problem(addresses.composed(email))),
        extra_json_schema={"format": "email"},
    ),
]
UserName = Annotated[users.Name, Meta(extra_json_schema={"pattern": _VISIBLE})]
ProductName = Annotated[products.Name, Meta(extra_json_schema={"pattern": _VISIBLE})]
ProductDescription = Annotated[
    products.Description, Meta(extra_json_schema={"pattern": r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]*\Z"})
]
NewPassword = Annotated[
    users.Password,
    Meta(
        description="Not one character repeated, not the e-mail address, and none of the commonest passwords.",
        extra=checked(
            lambda password: (
                f"must have at least {users.MIN_PASSWORD} characters" if len(password) < users.MIN_PASSWORD else None
            )
        ),
        extra_json_schema={"minLength": users.MIN_PASSWORD, "pattern": rf"^(?=(.)\1*(?!\1).)[^{_CONTROLS}]*\Z"},
    ),
]
PAYMENT_METHOD_PATTERN: Final = (
    r"^sandbox:(ok|declined|insufficient_funds|lost_answer|error_then_ok|capture_expired|slow:[0-9]{1,5})\Z"
)
"""The methods of the only provider, the sandbox."""
PaymentMethod = Annotated[
    payments.Method,
    Meta(
        examples=["sandbox:ok"],
        extra_json_schema={
            STRICTER: PAYMENT_METHOD_PATTERN,
        },
    ),
]

_ZERO: Final[dict[str, Any]] = {"anyOf": [{"type": "number", "const": 0}, {"type": "string", "pattern": r"^[0.]*\Z"}]}
NOT_ZERO: Final[dict[str, Any]] = {
    "not": {"anyOf": [*_ZERO["anyOf"], {"type": "object", "properties": {"amount": _ZERO}, "required": ["amount"]}]}
}
"""The schema of an amount that is not 0, bare or with its currency."""


def _absent(*names: str) -> dict[str, Any]:
    return {"properties": {name: {"type": "null"} for name in names}}


def _given(name: str, kind: str) -> dict[str, Any]:
    return {"properties": {name: {"type": kind}}, "required": [name]}


def _both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {"allOf": [one, other]}


RULES: Final[dict[str, dict[str, Any]]] = {
    "PlaceOrderIn": {
        "not": {
            "anyOf": [
                _absent("items", "product_id"),
                _both(_given("items", "array"), _given("product_id", "integer")),
                _both(_given("items", "array"), _given("quantity", "integer")),
            ]
        }
    },
    "MoveOrderIn": {"not": _absent("status", "fulfilment")},
    "ReturnItemIn": {"not": _absent("line_id", "product_id")},
}
"""By the name of a model: which of its fields must or must not be given together."""
