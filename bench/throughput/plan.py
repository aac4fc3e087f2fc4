"""What is measured, for how long, and with which requests. Pure data: nothing runs here."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

CONNECTIONS: Final = (1, 32, 128)
MOST_CONNECTIONS: Final = CONNECTIONS[-1]
PRODUCTS: Final = 1_000
"""Orders are spread over so many products; the catalogue has a few more, those of the demo shop."""
PIECES: Final = 1_000_000_000
"""In stock of each product: more than a run can sell."""
USERS: Final = (1, 2)
FLOODED_CONNECTIONS: Final = (1, 32)
"""Of browsing beside a flood of sign-ins."""
PAYMENT_METHOD: Final = "sandbox:ok"
PAGE: Final = 20
"""Products on a page of a list or a search."""
PAGES: Final = 40
"""Different requests of each kind while browsing."""

Subject = Literal["reference", "mercato"]
Case = Literal["place", "pay", "one_product", "browse"]
"""`place`: an order without payment. `pay`: an order with a payment method, until it is paid. `one_product`: the same,
every order for one product. `browse`: lists, searches and single products."""


class Step(msgspec.Struct, frozen=True):
    """One load: `case` on one of the two shops, over so many connections."""

    subject: Subject
    case: Case
    connections: int


class Length(msgspec.Struct, frozen=True):
    """How long a run takes."""

    rounds: int
    load_seconds: float
    warm_seconds: float
    counted_loads: int
    """Loads after each of which CPU, rows, WAL and disk are counted."""
    counted_orders: int
    """Orders of each of them."""
    leaves_out: tuple[str, ...] = ()
    """Parts that it does not have."""


FULL: Final = Length(rounds=5, load_seconds=3.0, warm_seconds=3.0, counted_loads=3, counted_orders=5_000)
QUICK: Final = Length(
    rounds=2,
    load_seconds=1.0,
    warm_seconds=1.0,
    counted_loads=1,
    counted_orders=2_000,
    leaves_out=("commit-latency", "observed"),
)

STEPS: Final = (
    *(
        step
        for connections in CONNECTIONS
        for step in (
            Step("reference", "place", connections),
            Step("mercato", "place", connections),
            Step("mercato", "pay", connections),
        )
    ),
    Step("mercato", "one_product", MOST_CONNECTIONS),
    *(Step(subject, "browse", connections) for connections in CONNECTIONS for subject in ("reference", "mercato")),
)
"""One round."""


def steps_of_round(number: int) -> tuple[Step, ...]:
    """The steps of a round in their order. Every second round goes backwards, so that a drift favours neither shop."""
    return STEPS if number % 2 == 0 else STEPS[::-1]


# ------------------------------------------------------------------------------------------------------------ requests


class Request(msgspec.Struct, frozen=True):
    """A request as the load generator knows it (`bench/load/main.go`)."""

    kind: str
    method: str
    path: str
    body: str = ""
    creates: bool = False


class Product(msgspec.Struct, frozen=True):
    """A product of the catalogue of both shops. The id is the one that Mercato has given."""

    id: int
    sku: str
    name: str
    description: str
    price_minor: int
    category: str


_ADJECTIVES: Final = ("Plain", "Walnut", "Copper", "Folding", "Tall", "Woven", "Glass", "Narrow", "Heavy", "Painted")
_NOUNS: Final = ("Shelf", "Lamp", "Chair", "Basket", "Mirror", "Table", "Clock", "Bench", "Vase", "Stool")
_ROOMS: Final = ("kitchen", "hall", "study", "bedroom", "garden")


def catalogue(count: int = PRODUCTS) -> tuple[Product, ...]:
    """Products without ids (0): each adjective and each noun names a tenth of them, both together a hundredth."""
    made: list[Product] = []
    for n in range(count):
        adjective, noun = _ADJECTIVES[n % 10], _NOUNS[n // 10 % 10]
        room = _ROOMS[n % 5]
        made.append(
            Product(
                id=0,
                sku=f"BENCH-{n:04d}",
                name=f"{adjective} {noun} {n}",
                description=f"A {adjective.lower()} {noun.lower()} for the {room}, in model {n}.",
                price_minor=1_000 + n,
                category=f"bench-{room}",
            )
        )
    return tuple(made)


def requests(
    subject: Subject, case: Case, products: Sequence[Product], list_paths: Sequence[str]
) -> tuple[Request, ...]:
    """What is sent; the load generator chooses among them at random. `list_paths` are pages of the shop's own list."""
    match case:
        case "browse":
            return _browse(products, list_paths)
        case "one_product":
            return _orders(subject, products[:1], method=PAYMENT_METHOD)
        case "place":
            return _orders(subject, products, method=None)
        case "pay":
            return _orders(subject, products, method=PAYMENT_METHOD)


def _orders(subject: Subject, products: Sequence[Product], *, method: str | None) -> tuple[Request, ...]:
    made: list[Request] = []
    for product, user_id in itertools.product(products, USERS):
        body: dict[str, object] = {"user_id": user_id, "product_id": product.id}
        if subject == "reference":
            body["amount"] = product.price_minor  # the reference believes its clients
        elif method is not None:
            body["payment_method"] = method
        made.append(Request("order", "POST", "/orders", msgspec.json.encode(body).decode(), creates=True))
    return tuple(made)


def _browse(products: Sequence[Product], list_paths: Sequence[str]) -> tuple[Request, ...]:
    """As many lists, searches and single products; each search finds a hundredth of the catalogue."""
    lists = list_paths[:PAGES]
    every = max(1, len(products) // len(lists))
    words = [f"{a.lower()}+{n.lower()}" for a, n in itertools.product(_ADJECTIVES, _NOUNS)]
    return (
        *(Request("list", "GET", path) for path in lists),
        *(Request("search", "GET", f"/products?q={words[n]}&limit={PAGE}") for n in range(len(lists))),
        *(Request("get", "GET", f"/products/{product.id}") for product in products[::every][: len(lists)]),
    )
