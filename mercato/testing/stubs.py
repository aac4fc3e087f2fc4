"""Stubs of the services that a service under test calls: each answers one operation from a mapping."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar, cast

from mercato.chassis.contract import Batch, BatchOperation, Contract, Message, ServiceError
from mercato.chassis.hosting.service import Env, Service
from mercato.chassis.rpc.server import Server
from mercato.contracts.products import GetProduct, Product, ProductNotFound, Products, Quote, QuoteProduct
from mercato.contracts.users import GetUser, User, UserNotFound, Users

from .builders import product, user

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)


class _ById(Protocol):
    id: int


class StubService(Generic[Q, A]):
    """A service with one batched operation, which reads by id.

    An id that is not in `answers` gets the error `unknown(id)`. While `failure` is set, every batch fails with it.
    `before_answer` runs before each batch is answered. `batches` has the ids of each received batch, in order.
    """

    def __init__(
        self,
        contract: type[Contract],
        operation: BatchOperation[Q, A],
        answers: Mapping[int, A | ServiceError],
        unknown: Callable[[int], ServiceError],
    ) -> None:
        self.answers = dict(answers)
        self.failure: ServiceError | None = None
        self.before_answer: Callable[[], Awaitable[None]] | None = None
        self.batches: list[list[int]] = []
        self._contract = contract
        self._operation = operation
        self._unknown = unknown

    @property
    def sizes(self) -> list[int]:
        """The sizes of the received batches, in order."""
        return [len(batch) for batch in self.batches]

    def build(self, env: Env) -> Service:
        server = Server(self._contract, env.clock)
        server.register(self._operation, self._answer)
        return Service(server, env.database)

    async def _answer(self, batch: Batch[Q]) -> Sequence[A | ServiceError]:
        ids = [cast(_ById, request).id for request in batch]
        self.batches.append(ids)
        if self.failure:
            raise self.failure.copy()
        if self.before_answer:
            await self.before_answer()
        return [self.answers.get(id_) or self._unknown(id_) for id_ in ids]


def stub_users(ids: Iterable[int]) -> StubService[GetUser, User]:
    return StubService(Users, Users.get, {id_: user(id_) for id_ in ids}, lambda id_: UserNotFound(user_id=id_))


def stub_products(ids: Iterable[int]) -> StubService[GetProduct, Product]:
    found = {id_: product(id_) for id_ in ids}
    return StubService(Products, Products.get, found, lambda id_: ProductNotFound(product_id=id_))


def stub_quotes(quotes: Iterable[Quote]) -> StubService[QuoteProduct, Quote]:
    """A stub of products with these quotes."""
    found = {quote.id: quote for quote in quotes}
    return StubService(Products, Products.quote, found, lambda id_: ProductNotFound(product_id=id_))
