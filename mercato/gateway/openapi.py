"""The API's description (OpenAPI 3.1), derived from the table of routes, the types of their messages and their errors.

A route, a field, a limit or an error that is added to the code is described without a change here. Only the few paths
beside the table (`PAGES`) and the introduction are written by hand.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast, get_origin

import msgspec

from mercato import __version__
from mercato.chassis.contract import (
    MAX_ID,
    Contract,
    DeadlineExceeded,
    Forbidden,
    IdempotencyKeyReused,
    Internal,
    InvalidRequest,
    OutcomeUnknown,
    Overloaded,
    RequestInProgress,
    ServiceError,
    StaleVersion,
    Unauthenticated,
    Unavailable,
)
from mercato.contracts.roles import ALL_ROLES, ANONYMOUS, CUSTOMER
from mercato.gateway import cursors, examples, guests, problems, refusals, schemas, totals
from mercato.gateway.described_headers import HEADERS, PARAMETERS
from mercato.gateway.explained import EXPLAINED
from mercato.gateway.problems import Problem
from mercato.gateway.readiness import DOWN, READINESS
from mercato.gateway.route import MAX_BODY_BYTES, Route
from mercato.gateway.streams.described import streamed_example
from mercato.gateway.streams.opening import MEDIA_TYPE

Json = dict[str, Any]

PAGES_TAG: Final = "shop"
REFERENCE_TAG: Final = "reference forms"

INTRODUCTION: Final = f"""\
Everything is JSON over HTTP. Send bodies of at most {MAX_BODY_BYTES} bytes, with `Content-Type: application/json`. \
Unknown fields and query parameters are refused, so that a misspelt one is never ignored, and so is a body \
where none is described (`{{}}` counts as none). Answers may get \
new fields: ignore those that you do not know.

**Money** is a decimal string with its currency (ISO 4217). In the `data` of events and the \
texts of a timeline it is an integer of minor units: 1250 is 12.50 EUR. Ids are integers below 2^53. Times are \
RFC 3339, in UTC.

**Refusals** are problems (RFC 9457). Decide by `code`, show `detail`, and quote `trace_id` when you ask for help; \
`errors` names every wrong field at once. All codes are at [/docs/problems](/docs/problems).

**Collections** are arrays. They take `limit`, and a `cursor`. The next page is the address in the header `Link` with \
`rel="next"`, which has the cursor of it; where there is none, the page is the last. A cursor belongs to its filters. \
With `Prefer: count=exact`, `Total-Count` says how many entries there are on all pages.

**Idempotency.** Send an `Idempotency-Key` of your own with each order. When no answer comes, send the same \
request with the same key again, as often as you like: it is one order.

**Concurrent changes.** An answer that has a version carries an `ETag`. Send it back in `If-Match`, and the \
change is made only if the version is still the same.

Every GET answers HEAD too. OPTIONS says in `Allow` which methods a path takes, and `OPTIONS *` which the API has; \
another method is refused with 405, which has `Allow` too."""

TOKENS: Final = """\
**Signing in.** `POST /login` gives an access token; send it as `Authorization: Bearer ...`."""

NO_TOKENS: Final = """\
**This shop runs without tokens**, on this machine alone: a caller who sends none acts as staff. A token that is sent \
counts."""

ROLES: Final[Mapping[frozenset[str], str]] = {
    ALL_ROLES: "Needs no account.",
    ALL_ROLES - {ANONYMOUS}: "For callers who are signed in.",
    ALL_ROLES - {ANONYMOUS, CUSTOMER}: "For staff.",
}


def document(routes: Sequence[Route], *, open_shop: bool, server_url: str | None) -> Json:
    """The OpenAPI document. `open_shop`: callers need no token. `server_url`: where the API is, if that is known."""
    asked = [form for route in routes for form in (route, *(form.of(route) for form in route.forms))]
    models = [model for route in asked for model in (route.body, route.query, route.output) if model is not None]
    references, named = schemas.components([*models, Problem], [route.query for route in routes])
    described = _Described(dict(zip(map(repr, models), references, strict=False)), named, open_shop)
    paths: dict[str, Json] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = described.operation(route)
    for path, page in PAGES.items():
        paths[path] = {"get": described.page(page)}
    for route in routes:
        if route.query is not None:
            named.pop(route.query.__name__, None)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Mercato",
            "version": __version__,
            "summary": "A shop: users, products, orders.",
            "description": f"{INTRODUCTION}\n\n{NO_TOKENS if open_shop else TOKENS}",
            "license": {"name": "Apache License 2.0", "identifier": "Apache-2.0"},
        },
        **({"servers": [{"url": server_url}]} if server_url else {}),
        "tags": _tags(routes),
        "paths": paths,
        "components": described.components(),
    }


def operation_id(route: Route) -> str:
    """A stable name: `orders.place`; `users.me.get` where the operation also has a route for one's own account."""
    service, _, name = route.operation.full_name.partition(".")
    if route.stream and route.stream.is_only:
        return f"{service}.{route.path.rpartition('/')[2]}"
    if route.parts:
        return f"{service}.me.{route.path.rpartition('/')[2]}"
    if route.system:
        return f"{service}.reference_{route.system.lower()}.{name}"
    return f"{service}.me.{name}" if "me" in route.path.split("/") else f"{service}.{name}"


def errors_of(route: Route, *, open_shop: bool) -> tuple[type[ServiceError], ...]:
    """Every error that a route can answer with: its own, and those that follow from its properties."""
    following: list[type[ServiceError]] = [InvalidRequest, problems.MethodNotAllowed]
    if not route.ignores_token:
        following += [Unauthenticated, problems.SessionsNotKnown]
    if open_shop:
        following.append(problems.HostNotAllowed)
    elif ANONYMOUS not in route.roles:
        following.append(problems.SignInFirst)
    if "{" in route.path:
        following.append(problems.RouteNotFound)
    if CUSTOMER not in route.roles:
        following.append(Forbidden)
    if route.limits.per_second is not None or route.is_guest is not None:
        following.append(problems.TooManyRequests)
    if route.body is not None:
        following += [problems.MalformedJson, problems.BodyTooLarge, problems.UnsupportedMediaType]
    if route.idempotency:
        following += [IdempotencyKeyReused, RequestInProgress]
    if route.idempotency_required:
        following.append(problems.IdempotencyKeyMissing)
    if route.if_match:
        following.append(StaleVersion)
    if route.stream:
        following += [problems.TooManyStreams, problems.StreamsFull]
        if route.stream.is_only:
            following.append(problems.NotAcceptable)
    of_forms = (error for form in route.forms for error in form.errors)
    waited = route.wait.refusals if route.wait else ()
    return tuple(dict.fromkeys((*route.errors, *waited, *of_forms, *following, *_CALLING)))


_CALLING: Final = (Overloaded, Unavailable, DeadlineExceeded, OutcomeUnknown, Internal)
"""The errors of every call of an operation."""


def _tags(routes: Sequence[Route]) -> list[Json]:
    """One tag a service, in the order of the table, described by its contract."""
    tags: dict[str, Json] = {}
    for route in routes:
        operation = route.operation
        contract = next(c for c in Contract.__subclasses__() if c.operations.get(operation.name) is operation)
        tags[contract.service] = {"name": contract.service, "description": inspect.getdoc(contract) or ""}
    return [
        *tags.values(),
        {
            "name": REFERENCE_TAG,
            "description": "Requests as the documents of five reference systems (A to E) print them. Each is another "
            "form of an operation that the API has; the answer has their fields in addition.",
        },
        {"name": PAGES_TAG, "description": "The state of the shop, and the documentation of its API."},
    ]


# ------------------------------------------------------------------------------------------------------- operations


class _Described:
    """Describes routes and pages, and collects the components that several of them share."""

    def __init__(self, references: Mapping[str, Json], named: dict[str, Json], open_shop: bool) -> None:
        self._references = references
        self._schemas = named
        self._open_shop = open_shop
        self._responses: dict[str, Json] = {}
        self._examples: dict[str, Json] = {}
        # A connection that is refused before its request is read, such as one that sends too much, has no trace.
        named["Problem"]["required"].remove("trace_id")

    def components(self) -> Json:
        return {
            "schemas": dict(sorted(self._schemas.items())),
            "responses": {"304": _KNOWN, **dict(sorted(self._responses.items()))},
            "parameters": dict(PARAMETERS),
            "examples": dict(sorted(self._examples.items())),
            "headers": dict(HEADERS),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
                "metrics": {"type": "http", "scheme": "bearer", "description": "`MERCATO_METRICS_TOKEN` of the shop."},
            },
        }

    # ----------------------------------------------------------------------------------------------------- a route

    def operation(self, route: Route) -> Json:
        described: Json = {
            "operationId": operation_id(route),
            "summary": route.summary,
            "description": _description(route),
            "tags": [route.operation.service, *([REFERENCE_TAG] if route.system or route.forms else [])],
            "security": self._security(route),
            "x-roles": sorted(route.roles),
        }
        if parameters := self._parameters(route):
            described["parameters"] = parameters
        if route.body is not None:
            described["requestBody"] = self._body(route)
        refusals = self._refusals(
            errors_of(route, open_shop=self._open_shop), located=route.wait.refusals if route.wait else ()
        )
        known = {"304": {"$ref": "#/components/responses/304"}} if route.is_public else {}
        described["responses"] = {str(route.status): self._success(route), **known, **refusals}
        return described

    def _security(self, route: Route) -> list[Json]:
        if ANONYMOUS in route.roles:
            return []
        without = self._open_shop or route.is_guest is not None or route.takes_access_token
        return [{}, {"bearer": []}] if without else [{"bearer": []}]

    def _parameters(self, route: Route) -> list[Json]:
        parameters: list[Json] = [
            {
                "name": name,
                "in": "path",
                "required": True,
                **self._path_parameter(route, name),
            }
            for name in re.findall(r"\{(\w+)\}", route.path)
        ]
        if route.query is not None:
            parameters += self._query(self._schemas[route.query.__name__])
        if cursors.is_paged(route):
            parameters.append({"$ref": "#/components/parameters/Cursor"})
        if route.takes_access_token:
            parameters.append({"$ref": "#/components/parameters/AccessToken"})
        if route.idempotency:
            name = "RequiredIdempotencyKey" if route.idempotency_required else "IdempotencyKey"
            parameters.append({"$ref": f"#/components/parameters/{name}"})
        if route.wait:
            parameters.append({"$ref": "#/components/parameters/Prefer"})
        if totals.are_counted(route):
            parameters.append({"$ref": "#/components/parameters/PreferCount"})
        if route.is_public:
            parameters.append({"$ref": "#/components/parameters/IfNoneMatch"})
        if route.if_match:
            parameters.append({"$ref": "#/components/parameters/IfMatch"})
        if route.stream:
            parameters.append({"$ref": "#/components/parameters/LastEventId"})
        return parameters

    def _path_parameter(self, route: Route, name: str) -> Json:
        if name in route.text:
            schema = schemas.plain(route.text[name])
            return {"schema": schema, "example": schema["examples"][0]}
        number: Json = {"type": "integer", "minimum": 1, "maximum": MAX_ID}
        texts = [{**schemas.plain(f.text[name]), "description": f.summary} for f in route.forms if name in f.text]
        return {
            "schema": {"anyOf": [number, *texts]} if texts else number,
            "example": examples.number(route, name),
        }

    def _query(self, model: Json) -> list[Json]:
        required: Sequence[str] = model.get("required", ())
        parameters: list[Json] = []
        for name, property_ in cast(Mapping[str, Json], model["properties"]).items():
            schema = schemas.as_text(schemas.without_null(property_))
            words = {"description": schema["description"]} if "description" in schema else {}
            schema = {key: value for key, value in schema.items() if key != "description"}
            must = {"required": True} if name in required else {}
            parameters.append({"name": name, "in": "query", **words, **must, "schema": schema})
        return parameters

    def _body(self, route: Route) -> Json:
        shown = {name: {"value": body} for name, body in examples.bodies(route).items()}
        forms = [form for form in route.forms if form.body is not None]
        shown |= {
            f"reference form of system {form.system}: {name}": {"value": dict(body)}
            for form in forms
            for name, body in form.examples.items()
        }
        content = {"schema": self._any_of([route.body, *(form.body for form in forms)]), "examples": shown}
        return {"required": not route.body_optional, "content": {"application/json": content}}

    def _success(self, route: Route) -> Json:
        collection = get_origin(route.output) is list
        wanted = {
            "ETag": route.etag is not None or route.is_public,
            "Idempotent-Replayed": route.replayed is not None,
            "Link": collection and route.query is not None,
            "Location": route.location is not None,
            "Preference-Applied": route.wait is not None or totals.are_counted(route),
            "Total-Count": totals.are_counted(route),
            "X-Request-Id": True,
        }
        success: Json = {
            "description": "Accepted; with `Prefer: wait=N`, as it is after the wait"
            if route.wait
            else _SUCCESSES[route.status],
            "headers": _headers(name for name, there in wanted.items() if there),
        }
        if route.stream and route.stream.is_only:
            success["content"] = {MEDIA_TYPE: _streamed(route)}
        elif route.output is not None:
            outputs = [route.output, *(form.output for form in route.forms if form.output is not None)]
            content = {"schema": self._any_of(outputs), "example": examples.answer(route)}
            success["content"] = {"application/json": content}
            if route.stream:
                success["content"][MEDIA_TYPE] = _streamed(route)
        return success

    def _any_of(self, models: Sequence[Any]) -> Json:
        schemas_of = [self._references[repr(model)] for model in models]
        return schemas_of[0] if len(schemas_of) == 1 else {"anyOf": schemas_of}

    # ---------------------------------------------------------------------------------------------------- refusals

    def _refusals(self, kinds: Iterable[type[ServiceError]], located: tuple[type[ServiceError], ...] = ()) -> Json:
        """By HTTP status, each a reference: many routes have the same. `located`: those that have a Location."""
        by_status: dict[int, dict[str, refusals.Shown]] = {}
        takes_body = problems.BodyTooLarge in (kinds := tuple(kinds))
        of_errors = (refusals.of_error(kind, is_located=issubclass(kind, located)) for kind in kinds)
        for shown in (*of_errors, *refusals.of_server(takes_body=takes_body)):
            by_status.setdefault(shown.status, {}).setdefault(shown.code, shown)
        return {
            str(status): {"$ref": f"#/components/responses/{self._refusal(status, by_status[status].values())}"}
            for status in sorted(by_status)
        }

    def _refusal(self, status: int, shown: Iterable[refusals.Shown]) -> str:
        errors = sorted(shown, key=lambda error: error.code)
        is_located = any(error.is_located for error in errors)
        name = "-".join((str(status), *(error.code for error in errors), *(["located"] if is_located else [])))
        if name not in self._responses:
            wanted = {
                "Idempotent-Replayed": is_located or any(error.is_replayed for error in errors),
                "Location": is_located,
                "Preference-Applied": is_located,
                "Allow": status == 405,
                "Retry-After": any(error.retries for error in errors),
                "WWW-Authenticate": status == 401,
                "X-Request-Id": True,
            }
            self._responses[name] = {
                "description": errors[0].title,
                "headers": _headers(name for name, there in wanted.items() if there),
                "content": {
                    problems.MEDIA_TYPE: {
                        "schema": _problem([error.code for error in errors]),
                        "examples": {error.code: self._example(error) for error in errors},
                    }
                },
            }
        return name

    def _example(self, error: refusals.Shown) -> Json:
        if error.code not in self._examples:
            self._examples[error.code] = {"summary": error.sentence, "value": error.body}
        return {"$ref": f"#/components/examples/{error.code}"}

    # ------------------------------------------------------------------------------------------------------ a page

    def page(self, page: PageBesideTheTable) -> Json:
        kinds = [
            InvalidRequest,
            problems.MethodNotAllowed,
            *page.errors,
            *([problems.HostNotAllowed] if self._open_shop else []),
        ]
        return {
            "operationId": page.operation_id,
            "summary": page.summary,
            "tags": [PAGES_TAG],
            "security": [{scheme: []} if scheme else {} for scheme in page.security],
            "x-roles": sorted(ALL_ROLES),
            "responses": {
                **self._refusals(kinds),
                **{str(status): _with_request_id(response) for status, response in page.responses.items()},
            },
        }


_SUCCESSES: Final = {200: "Done", 201: "Created", 202: "Accepted", 204: "Done; the answer has no body"}


_KNOWN: Final[Json] = {
    "description": "An ETag in If-None-Match is still current",
    "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in ("ETag", "X-Request-Id")},
}


def _streamed(route: Route) -> Json:
    """The stream of a route. Its messages are described in /asyncapi.json."""
    return {
        "schema": {
            "type": "string",
            "description": "Server-Sent Events without an end. Each has the position as `id`, the type as `event`, and "
            "as `data` an event as GET /events lists it; /asyncapi.json describes them.",
        },
        "example": streamed_example(route),
    }


def _headers(names: Iterable[str]) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _problem(codes: Sequence[str]) -> Json:
    """The schema of a problem with one of these codes: those of one operation at one status."""
    closed = {"type": "object", "properties": {"code": {"type": "string", "enum": list(codes)}}, "required": ["code"]}
    return {"allOf": [{"$ref": "#/components/schemas/Problem"}, closed]}


def _with_request_id(response: Json) -> Json:
    return {**response, "headers": {**response.get("headers", {}), **_headers(["X-Request-Id"])}}


def _description(route: Route) -> str:
    """What the route's properties mean for a caller, in sentences."""
    limits = route.limits
    explained = EXPLAINED.get(f"{route.method} {route.path}")
    sentences = [ROLES.get(route.roles, f"For {' and '.join(sorted(route.roles))}.")]
    if route.system:
        sentences.append(f"The reference form of system {route.system}.")
    sentences += [f"Reference form of system {form.system}: {form.summary}." for form in route.forms]
    if route.is_guest is not None:
        sentences.append(
            f"Without an account: as a guest, up to {guests.ORDERS.per_second} times a second from one address, and "
            f"{guests.ORDERS.burst} at once, with an Idempotency-Key of at least {guests.KEY_LENGTH} characters."
        )
    if route.takes_access_token:
        sentences.append("Guests may do it for the order whose access token they send.")
    if route.body_optional:
        sentences.append("The body may be left out.")
    if limits.per_second is not None:
        sentences.append(f"Up to {limits.per_second} times a second for one caller, and {limits.burst} at once.")
    if limits.done_per_hour is not None:
        sentences.append(f"Up to {limits.done_per_hour} times an hour from one address, without an account.")
    if route.tries is not None:
        sentences.append(
            "After several wrong passwords for an account, further attempts from the same address must wait."
        )
    if route.body is not None and limits.body_bytes < MAX_BODY_BYTES:
        sentences.append(f"The body has at most {limits.body_bytes} bytes.")
    return "\n\n".join(filter(None, (explained, " ".join(sentences))))


# ------------------------------------------------------------------------------------------------ beside the table


class PageBesideTheTable(msgspec.Struct, frozen=True, kw_only=True):
    """A path that `pages.py` answers. All are GET."""

    operation_id: str
    summary: str
    responses: Mapping[int, Json]
    security: tuple[str, ...] = ()
    """The schemes of tokens of which one is needed; an empty text: some callers need none."""
    errors: tuple[type[ServiceError], ...] = ()


def _json_response(description: str, schema: Json, example: Any) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema, "example": example}}}


def _object(**properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


PAGES: Final[Mapping[str, PageBesideTheTable]] = {
    "/health/live": PageBesideTheTable(
        operation_id="shop.live",
        summary="Whether this process runs",
        responses={200: _json_response("It does", _object(status={"const": "live"}), {"status": "live"})},
    ),
    "/health/ready": PageBesideTheTable(
        operation_id="shop.ready",
        summary="Whether every service can work; says which cannot",
        responses={
            200: _json_response("All can", READINESS, {"status": "ready", "services": {"orders": "up"}}),
            503: _json_response("Some cannot", READINESS, DOWN) | {"headers": _headers(["Retry-After"])},
        },
        errors=(Internal,),
    ),
    "/health/self": PageBesideTheTable(
        operation_id="shop.ready_itself",
        summary="Whether this process can work, whatever the others do: for the checks of a load balancer",
        responses={
            200: _json_response("It can", READINESS, {"status": "ready", "services": {"orders": "up"}}),
            503: _json_response("It cannot", READINESS, DOWN) | {"headers": _headers(["Retry-After"])},
        },
        errors=(Internal,),
    ),
    "/metrics": PageBesideTheTable(
        operation_id="shop.metrics",
        summary="Metrics for Prometheus: for staff, a collector with MERCATO_METRICS_TOKEN, or one on the same machine",
        responses={
            200: {
                "description": "All metrics of this process",
                "content": {"text/plain": {"schema": {"type": "string"}}},
            }
        },
        security=("", "metrics", "bearer"),
        errors=(Unauthenticated, problems.SignInFirst, Forbidden, problems.SessionsNotKnown, *_CALLING),
    ),
    "/.well-known/jwks.json": PageBesideTheTable(
        operation_id="shop.keys",
        summary="The public keys of access tokens (RFC 7517)",
        responses={
            200: _json_response(
                "The keys",
                _object(keys={"type": "array", "items": _object(kty={"type": "string"}, kid={"type": "string"})}),
                {
                    "keys": [
                        {
                            "kty": "OKP",
                            "crv": "Ed25519",
                            "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo",
                            "kid": "1",
                            "use": "sig",
                            "alg": "EdDSA",
                        }
                    ]
                },
            )
        },
        errors=_CALLING,
    ),
    "/asyncapi.json": PageBesideTheTable(
        operation_id="shop.asyncapi",
        summary="The description of the events (AsyncAPI 3)",
        responses={
            200: _json_response("An AsyncAPI document", _object(asyncapi={"const": "3.0.0"}), {"asyncapi": "3.0.0"})
        },
    ),
    "/openapi.json": PageBesideTheTable(
        operation_id="shop.openapi",
        summary="This description (OpenAPI 3.1)",
        responses={
            200: _json_response("An OpenAPI document", _object(openapi={"const": "3.1.0"}), {"openapi": "3.1.0"})
        },
    ),
}
"""The paths beside the table. The documentation's own pages are not described."""
