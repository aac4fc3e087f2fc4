# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownParameterType=false, reportUntypedFunctionDecorator=false, reportUnknownArgumentType=false
"""What schemathesis is given about the shop: which refusals of requests that fit their schemas are right.

A schema says what one field may hold. Refused for the state of the shop, or for how two fields go together, are the
requests below, each with a problem that names the reason; any other refusal of such a request is a fault.
"""

from __future__ import annotations

import re
from typing import Any, Final

import schemathesis
from schemathesis.checks import CheckContext
from schemathesis.core.failures import Failure
from schemathesis.core.transport import Response
from schemathesis.specs.openapi.checks import positive_data_acceptance

IF_MATCH: Final = r'\*|(W/)?"[1-9][0-9]{0,8}(-in-stock)?"'
STATES: Final = {
    (410, "events.cursor_ahead"),
    (410, "events.cursor_too_old"),
    (412, "stale_version"),
    (422, "idempotency_key_reused"),
    (402, "orders.payment_declined"),
}
"""By status and code: what the request says of the shop is not so, or not any more."""

_AMOUNTS: Final = r"(price\.)?amount(\.amount)?|\?amount|\?(min|max)_(price|total)"
BETWEEN_FIELDS: Final = (
    # The digits of an amount, and how large it may be, are those of its currency.
    (_AMOUNTS, r"has more than \d digits|has digits after|is larger than|is more than|Must be between 0 and"),
    # A JSON number as schemas know it has one value; amounts are read as they are written, without an exponent.
    (_AMOUNTS + r"|price|price\.amount", r"is not an amount: digits"),
    (r"(amount\.)?currency|\?currency", r"is [A-Z]{3}, and|is not that of|the order is in"),
    (r"\?after", r"Must be the next_after of a page with the same sort"),
    (r"\?sort", r"relevance only together with a text|only be id for archived"),
    # Types are open: a reader of events takes one that is not known yet, and a request for it names those that are.
    (r"\?types", r"and there are only"),
    (r"\?subject", r"is a filter of streams alone"),
    (r"\?cursor", r"stands for after and before|is not a cursor of this collection"),
    (r"items\[\d+\](\.product_id)?", r"product \d+ is in items|has not|is not of this order"),
    (r"header Idempotency-Key", r"the least for a caller without an account"),
    (r"delta", r"would be more than"),
    (r"(new_)?password|current_password", r"must not be|commonest|is missing|is needed"),
    (r"(guest_)?email", r"before the @|domain such as"),
)


@schemathesis.check
def refuses_only_what_no_schema_can_say(ctx: CheckContext, response: Response, case: schemathesis.Case) -> bool | None:
    try:
        return positive_data_acceptance(ctx, response, case)
    except Failure:
        problem: dict[str, Any] = response.json()
        if (response.status_code, problem["code"]) in STATES:
            return None
        if _is_made_without_its_schema(case):
            return None
        if problem["code"] == "invalid_request" and all(map(_is_between_fields, problem["errors"])):
            return None
        raise


def _is_made_without_its_schema(case: schemathesis.Case) -> bool:
    """schemathesis makes values of If-Match by itself, also some that do not match the pattern of the description."""
    value = (case.headers or {}).get("If-Match")
    return value is not None and re.fullmatch(IF_MATCH, str(value)) is None


def _is_between_fields(error: dict[str, str]) -> bool:
    return any(
        re.fullmatch(place, error["field"]) and re.search(reason, error["message"], re.IGNORECASE)
        for place, reason in BETWEEN_FIELDS
    )
