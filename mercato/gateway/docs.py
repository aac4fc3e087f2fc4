"""The documentation pages: `/docs` shows `/openapi.json` and calls the API, `/docs/problems` explains refusals.

Everything that the pages need comes from this shop (`docs.html`, `docs.js`, `samples.js`, `docs.css`, next to this
file); a policy forbids browsers to load or call anything else. The pages are rendered at start-up and never change
while the process runs.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Final

import msgspec

from mercato.chassis.contract import Message, ServiceError
from mercato.contracts.order_moves import AXES
from mercato.gateway import asyncapi, diagram, examples, openapi, problems
from mercato.gateway.route import Route

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HTML: Final = "text/html; charset=utf-8"
FRESH: Final = "no-cache"
FOR_EVER: Final = "public, max-age=31536000, immutable"
"""For files whose address has the hash of their content."""

REMEDIES: Final[Mapping[str, str]] = {
    "body_too_large": "Send less at once.",
    "deadline_exceeded": "It may or may not be done. GET the resource, or repeat it with the same Idempotency-Key.",
    "events.cursor_ahead": "Read the orders and products themselves, then continue after details.last.",
    "events.cursor_too_old": "Read the orders and products themselves, then continue after details.oldest.",
    "forbidden": "Sign in to an account that may do this; staff can make others staff.",
    "host_not_allowed": "Call the address that the shop printed when it started, or start it with tokens required.",
    "http_version_not_supported": "Send the request in HTTP/1.1.",
    "idempotency_key_missing": "Send Idempotency-Key, a fresh UUID for each request, the same one for a repetition.",
    "idempotency_key_reused": "Make a new key for each request; send an old key only with exactly its old request.",
    "outcome_unknown": "It may or may not be done. GET the resource, or repeat it with the same Idempotency-Key.",
    "internal": "This is a bug in the shop. Look for trace_id in the log, or report it.",
    "internal_error": "This is a bug in the shop. Look into the log, or report it.",
    "invalid_request": "Correct the fields that errors names; the description of the operation says what each takes.",
    "inventory.below_reserved": "Count again, or cancel orders that hold the pieces; GET .../stock says how many.",
    "malformed_json": "Correct the JSON at the line and column that are named.",
    "malformed_request": "Check the client: what it sends is not HTTP/1.1.",
    "not_acceptable": "Send Accept: text/event-stream, or no Accept at all.",
    "streams_full": "Wait for Retry-After, or request pages of GET /events; a setting of the shop has the limit.",
    "too_many_streams": "Close a stream that you do not need any more; a setting of the shop has the limit.",
    "method_not_allowed": "Use one of the methods in the header Allow.",
    "orders.amount_not_due": "Show what is due (details.due) to the buyer, and pay that. Nothing was charged.",
    "orders.cancelled": "Place a new order; GET /orders/{id} says why this one was cancelled.",
    "orders.hold_limit": "Pay or cancel open orders (GET /orders?status=pending), or order less, with a new key.",
    "orders.illegal_move": "Make one of the moves in details.legal; where it is empty, the order cannot move any more.",
    "orders.mixed_currencies": "Place one order for each currency.",
    "orders.not_found": "Check the id. The order of another account answers like one that does not exist.",
    "orders.not_returnable": "GET /orders/{id} says how many were bought, and how many have come back (returned).",
    "orders.already_claimed": "Sign in to the account that has claimed it.",
    "orders.another_email": "Sign in to the account whose address the order names.",
    "orders.email_not_proven": "Prove the address by the link of its letter: POST /users/me/proof sends another.",
    "orders.not_payable": "Settle it with the customer: goods were returned, or were never taken from the stock.",
    "orders.nothing_to_refund": "Refund at most details.left; where it is 0, all was refunded already.",
    "orders.lost": "Ask the shop about the order in details.order_id. Staff: GET /payments/{id} says what was paid.",
    "orders.too_many_open": "Pay or cancel open orders (GET /orders?status=pending), then send it again.",
    "orders.out_of_stock": "Order at most what details.items says is available, with a new key.",
    "orders.payment_declined": "No money has moved. Pay with another method (POST /payments) until "
    "details.payable_until.",
    "orders.payment_in_progress": "Wait a moment and look at the order: a payment or refund is just being made.",
    "orders.refund_not_found": "GET /orders/{id}/refunds lists them; the ids rest and cancel need ?order_id=.",
    "orders.price_changed": "Show the new total to the buyer, and place the order again with it. Nothing was ordered.",
    "overloaded": "Nothing was started: send it again after Retry-After seconds.",
    "payments.capture_amount_changed": "GET the payment, and show what was taken; a payment is captured once.",
    "payments.capture_too_large": "Capture at most details.authorized; the rest is released.",
    "payments.not_found": "Check the id. The payment of another account answers like one that does not exist.",
    "products.archived": "Take the product out of the order; staff can POST /products/{id}/restore.",
    "products.not_found": "Check the id; GET /products lists what is for sale.",
    "products.sku_not_found": "Check the sku; GET /products lists what is for sale.",
    "products.sku_taken": "Choose another sku, or change the product that has this one.",
    "request_header_too_large": "Send fewer or shorter headers.",
    "request_in_progress": "Wait a moment, then send the same again: it gets the answer of the first.",
    "request_timeout": "Send the whole request without pauses.",
    "route_not_found": "Check the path; /docs has all of them.",
    "sessions_not_known": "Send it again after Retry-After seconds: the users service has not answered for a while.",
    "sign_in_first": "POST /login, then send the access token as Authorization: Bearer ACCESS_TOKEN.",
    "stale_version": "GET it again, see what has changed, and send the change with the new ETag.",
    "too_many_connections_of_one": "Use fewer connections; close those that you do not need.",
    "too_many_connections": "Use fewer connections; keep them open for many requests.",
    "too_many_pipelined": "Wait for answers before sending more requests on one connection.",
    "too_many_requests": "Wait for Retry-After seconds.",
    "unauthenticated": "Get a new access token with POST /token/refresh, or sign in again.",
    "unavailable": "Send it again after Retry-After seconds, an order with its key; /health/ready says more.",
    "unsupported_media_type": "Send JSON, with Content-Type: application/json.",
    "uri_too_long": "Send a shorter path and query.",
    "users.email_taken": "Sign in, or use another e-mail address.",
    "users.link_not_valid": "POST /password/forgot, or POST /users/me/proof, has another letter sent.",
    "users.last_staff_member": "Make another account staff first.",
    "users.not_found": "Check the id. Another account answers like one that does not exist.",
    "users.session_ended": "Sign in again with POST /login.",
    "users.session_not_found": "GET /users/me/sessions lists those that have not ended.",
    "users.too_many_sign_ins": "Wait for Retry-After seconds.",
    "users.wrong_credentials": "Check e-mail and password.",
}


class DocsPage(msgspec.Struct, frozen=True):
    """The answer of a path. `headers` are without the length: the sender of the body adds it."""

    content_type: str
    body: bytes
    headers: Mapping[str, str]


class Refusal(msgspec.Struct, frozen=True):
    """A problem as `/docs/problems` shows it. `meaning` may be empty. Empty `routes`: any request can get it."""

    code: str
    status: int
    sentence: str
    meaning: str = ""
    routes: tuple[Route, ...] = ()


def pages(routes: Sequence[Route]) -> Mapping[str, DocsPage]:
    """Every page of the documentation, by path."""
    script, style, samples = _file("docs.js"), _file("docs.css"), _file("samples.js")
    version = hashlib.sha256(script + style + samples + _file("account.js")).hexdigest()[:12]
    frame = Template(_file("docs.html").decode()).substitute(version=version, states=_states(), events=_events())
    return {
        "/docs": _page(HTML, frame.encode(), FRESH),
        "/docs/docs.js": _page("text/javascript; charset=utf-8", script, FOR_EVER),
        "/docs/samples.js": _page("text/javascript; charset=utf-8", samples, FOR_EVER),
        "/docs/docs.css": _page("text/css; charset=utf-8", style, FOR_EVER),
        **{path: _page(HTML, page, FRESH) for path, page in _account_pages(version).items()},
        "/docs/account.js": _page("text/javascript; charset=utf-8", _file("account.js"), FOR_EVER),
        "/docs/problems": _page(HTML, _problems_page(refusals(routes), version).encode(), FRESH),
    }


def _states() -> str:
    """The diagrams of the states of an order, by axis."""
    return "\n".join(
        f"<figure><figcaption><code>{axis}</code></figcaption>{diagram.svg(axis, moves)}</figure>"
        for axis, moves in AXES.items()
    )


def _events() -> str:
    """The types of events, with those that have the same fields in one row."""
    types: dict[type[Message], list[str]] = {}
    for one in asyncapi.events():
        types.setdefault(one.message, []).append(one.type)
    rows = "\n".join(
        f"<tr><td>{_codes(names)}<td>{_codes(message.__struct_fields__)}" for message, names in types.items()
    )
    return f'<table class="events">\n<tr><th scope="col">Types<th scope="col">Fields of data\n{rows}\n</table>'


def _codes(names: Iterable[str]) -> str:
    return f"<code>{', '.join(names)}</code>"


def refusals(routes: Sequence[Route]) -> list[Refusal]:
    """Every problem that the API can answer, by code: of routes, of the gateway, and of the HTTP server before it."""
    routes_of: dict[type[ServiceError], list[Route]] = {}
    for route in routes:
        for kind in openapi.errors_of(route, open_shop=False):
            routes_of.setdefault(kind, []).append(route)
    anywhere = (problems.RouteNotFound, problems.MethodNotAllowed, problems.HostNotAllowed)
    of_errors = [
        *(
            _refusal(kind, () if len(used) == len(routes) else used)
            for kind, used in routes_of.items()
            if kind not in anywhere
        ),
        *(_refusal(kind, ()) for kind in anywhere),
    ]
    known = {refusal.code for refusal in of_errors}
    of_server = [refusal for refusal in _server_refusals() if refusal.code not in known]
    return sorted([*of_errors, *of_server], key=lambda refusal: refusal.code)


def _refusal(kind: type[ServiceError], routes: Iterable[Route]) -> Refusal:
    error = examples.error(kind)
    meaning = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
    return Refusal(error.code, problems.status_of(error), str(error), meaning, tuple(routes))


def _server_refusals() -> list[Refusal]:
    """The refusals that the server answers before the API sees a request."""
    return [Refusal(refusal.code, refusal.status, refusal.detail) for refusal in examples.server_refusals()]


def _account_pages(version: str) -> Mapping[str, bytes]:
    """The pages of the links in letters. The token after # stays in the browser, which sends it in a body."""
    frame = Template(_file("account.html").decode())
    return {
        "/account/password": frame.substitute(
            version=version, title="A new password", path="/password/reset", fields=_FIELD, button="Save"
        ).encode(),
        "/account/email": frame.substitute(
            version=version, title="Confirm your address", path="/email/proof", fields="", button="Confirm"
        ).encode(),
    }


_FIELD: Final = (
    '<label>New password <input name="new_password" type="password" autocomplete="new-password" required></label>'
)


def _file(name: str) -> bytes:
    return files("mercato.gateway").joinpath(name).read_bytes()


def _page(content_type: str, body: bytes, caching: str) -> DocsPage:
    headers = {
        "cache-control": caching,
        "content-security-policy": POLICY,
        "referrer-policy": "no-referrer",
    }
    return DocsPage(content_type, body, headers)


# -------------------------------------------------------------------------------------------------------- problems

_PROBLEMS: Final = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Problems - Mercato API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/docs.css?v=$version">
</head>
<body>
<a class="skip" href="#main">Skip to the problems</a>
<header class="bar"><a class="brand" href="/docs">Mercato <span>API</span></a></header>
<main id="main" class="problems" tabindex="-1">
<h1>Problems</h1>
<p>A refusal is answered with a problem (RFC 9457, <code>application/problem+json</code>): <code>code</code> is
for programs, <code>detail</code> for people, <code>errors</code> names wrong fields, <code>details</code> has further
facts, <code>trace_id</code> finds the request in the logs of the shop, and <code>type</code> leads to this page. The
caller must correct what is refused with a status below 500; 503 and 504 pass; 500 is a bug in the shop.</p>
$articles
</main>
</body>
</html>
""")

_ARTICLE: Final = Template("""\
<article id="$code">
<h2><a href="#$code"><code>$code</code></a> <span class="status s$class_">$status</span></h2>
$meaning<dl>
<dt>Says</dt><dd>$sentence</dd>
<dt>What to do</dt><dd>$remedy</dd>
<dt>Answered by</dt><dd class="from">$routes</dd>
</dl>
</article>""")


def _problems_page(shown: Sequence[Refusal], version: str) -> str:
    return _PROBLEMS.substitute(version=version, articles="\n".join(map(_article, shown)))


def _article(refusal: Refusal) -> str:
    return _ARTICLE.substitute(
        code=escape(refusal.code),
        status=refusal.status,
        class_=refusal.status // 100,
        meaning=f"<p>{_marked(refusal.meaning)}</p>\n" if refusal.meaning else "",
        sentence=escape(refusal.sentence),
        remedy=escape(REMEDIES.get(refusal.code, "See the description of the operation.")),
        routes=" ".join(map(_link, refusal.routes)) or "any request",
    )


def _link(route: Route) -> str:
    return f'<a href="/docs#{openapi.operation_id(route)}">{route.method} {escape(route.path)}</a>'


_CODE: Final = re.compile(r"`([^`]+)`")


def _marked(text: str) -> str:
    """HTML of a docstring, with its `code` as an element."""
    return _CODE.sub(r"<code>\1</code>", escape(text))
