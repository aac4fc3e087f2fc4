"""How a pact is recorded: it states what the consumer sends and needs, and nothing else."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from mercato.chassis.contract import Contract, Kind, Message, Retry, ServiceError, batched, current
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.client import Connector, acting
from mercato.testing.actors import SERVICE
from pacts.book import WRITES, PactBook, interactions_of, new_pact
from pacts.examples import exactly
from pacts.messages import check_needs
from pacts.rpc import Exchange, Stage, refusal


class Find(Message):
    name: str
    limit: int = 10


class Part(Message):
    size: int
    colour: str = "white"


class Found(Message):
    id: int
    parts: tuple[Part, ...]
    note: str = ""


class Missing(ServiceError, code="recorded.missing", kind=Kind.NOT_FOUND):
    sentence = "There is no {name}."
    name: str
    near: str = ""


class Shelf(Contract, name="recorded"):
    find = batched(Find, Found, allow=frozenset({"service"}), retry=Retry.SAFE)
    other = batched(Find, Found, allow=frozenset({"service"}), retry=Retry.SAFE)


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PactBook:
    monkeypatch.delenv(WRITES, raising=False)
    return PactBook("tests", tmp_path)


class Client:
    def __init__(self, book: PactBook) -> None:
        self.stage = Stage(book)
        self._connector = Connector(SystemClock(), Telemetry())
        self.shelf = self._connector.client(Shelf, self.stage.transport)

    async def close(self) -> None:
        await self._connector.close()
        await self.stage.transport.close()


@pytest_asyncio.fixture
async def client(book: PactBook) -> AsyncGenerator[Client]:
    made = Client(book)
    yield made
    await made.close()


@pytest.fixture(autouse=True)
def as_service() -> Generator[None]:
    token = current.set(acting(SERVICE, clock=SystemClock(), seconds=60.0))
    yield
    current.reset(token)


def finding(answer: Any = None, *, error: Any = None, request: Any = None) -> Exchange:
    return Exchange(
        description="a thing is found",
        operation=Shelf.find,
        request=request or {"name": exactly("mug"), "limit": 10},
        answer={"id": 1, "parts": [{"size": 2}]} if answer is None else answer,
        error=error,
    )


async def test_what_the_code_reads_is_noted_for_the_provider(client: Client, book: PactBook):
    async with client.stage.expects(finding()):
        found = await client.shelf.find(Find(name="mug"))
        assert found.parts[0].size == 2
    [noted] = book.noted("recorded").values()
    assert noted["comments"] == {"text": ["Read by the code of the consumer: parts, parts.size."]}


Use = Callable[[Shelf], Awaitable[Any]]


async def problem(client: Client, exchange: Exchange, use: Use) -> str:
    """What is wrong with the exchange, or with the consumer that `use` plays."""
    try:
        async with client.stage.expects(exchange):
            await use(client.shelf)
    except AssertionError as error:
        return str(error)
    return ""


async def find(shelf: Shelf) -> Found:
    return await shelf.find(Find(name="mug"))


async def find_in_vain(shelf: Shelf) -> None:
    with pytest.raises(ServiceError):
        await find(shelf)


async def test_a_field_that_the_code_reads_and_the_pact_does_not_state_fails(client: Client):
    async def use(shelf: Shelf) -> str:
        return (await find(shelf)).note

    assert "the code reads note, which the pact does not state" in await problem(client, finding(), use)


async def test_a_field_of_a_part_that_the_code_reads_and_the_pact_does_not_state_fails(client: Client):
    async def use(shelf: Shelf) -> str:
        return (await find(shelf)).parts[0].colour

    assert "the code reads parts.colour, which the pact does not state" in await problem(client, finding(), use)


async def test_a_read_that_the_consumer_survives_fails_all_the_same(client: Client):
    async def use(shelf: Shelf) -> None:
        found = await find(shelf)
        with pytest.raises(AssertionError):
            assert found.note

    assert "the code reads note" in await problem(client, finding(), use)


async def test_a_field_that_the_decoder_requires_and_the_pact_does_not_state_fails(client: Client):
    found = await problem(client, finding({"parts": []}), find_in_vain)
    assert "decoder needs more than the pact states" in found


async def test_a_stated_field_that_the_consumer_does_not_need_fails(client: Client):
    found = await problem(client, finding({"id": 1, "parts": [], "note": "x"}), find)
    assert "states ['note'], which the consumer does not read" in found


async def test_a_detail_of_an_error_that_the_code_reads_is_stated(client: Client):
    async def use(shelf: Shelf) -> None:
        with pytest.raises(Missing) as raised:
            await find(shelf)
        with pytest.raises(AssertionError):
            assert raised.value.near

    missing = finding(error=refusal(Missing, name="mug"))
    assert "the code reads details.near" in await problem(client, missing, use)


async def test_another_request_than_the_stated_one_fails(client: Client):
    lamp = finding(request={"name": exactly("lamp"), "limit": 10})
    assert "Expected 'mug' (String) to be equal to 'lamp'" in await problem(client, lamp, find_in_vain)


async def test_a_field_that_is_sent_and_not_stated_fails(client: Client):
    assert "limit" in await problem(client, finding(request={"name": exactly("mug")}), find_in_vain)


async def test_a_call_that_is_stated_and_not_made_fails(client: Client):
    async def use(_: Shelf) -> None:
        pass

    assert await problem(client, finding(), use) == "/rpc/recorded/find is not called"


async def test_a_call_that_no_interaction_states_fails(client: Client):
    async def use(shelf: Shelf) -> None:
        await find(shelf)
        with pytest.raises(ServiceError):
            await shelf.other(Find(name="mug"))

    found = await problem(client, finding(), use)
    assert found.startswith("recorded.other is called")
    assert found.endswith("no interaction states it")


def test_a_field_of_an_event_that_the_consumer_does_not_need_fails():
    pact = new_pact("tests", "recorded")
    pact.upon_receiving("an event", "Async").with_body({"id": 1, "extra": 2}, "application/json")
    [made] = interactions_of(pact)

    def handle(content: bytes) -> None:
        assert json.loads(content)["id"] == 1

    with pytest.raises(AssertionError, match="the consumer does not need extra"):
        check_needs(made, handle)


# ------------------------------------------------------------------------------------------------- what is committed


def interaction(description: str, **fields: Any) -> dict[str, Any]:
    return {"description": description, **fields}


def committed(folder: Path, *interactions: dict[str, Any]) -> None:
    (folder / "tests-recorded.json").write_text(json.dumps({"interactions": interactions}))


def test_a_pact_as_it_is_committed_passes(book: PactBook, tmp_path: Path):
    committed(tmp_path, interaction("a"))
    book.add("recorded", interaction("a"))
    book.close(is_complete=True)


@pytest.mark.parametrize(
    ("before", "sentence"),
    [([], "'a' is not as it is committed"), ([interaction("a", x=1)], "'a' is not as it is committed"),
     ([interaction("a"), interaction("b")], r"no test has \['b'\] any more")],
)  # fmt: skip
def test_a_pact_that_differs_from_the_committed_one_fails(
    book: PactBook, tmp_path: Path, before: list[dict[str, Any]], sentence: str
):
    committed(tmp_path, *before)
    book.add("recorded", interaction("a"))
    with pytest.raises(AssertionError, match=f"{sentence}.*Run `make pacts`"):
        book.close(is_complete=True)


def test_a_committed_interaction_of_a_test_that_did_not_run_passes(book: PactBook, tmp_path: Path):
    committed(tmp_path, interaction("a"), interaction("b"))
    book.add("recorded", interaction("a"))
    book.close(is_complete=False)


def test_a_pact_that_no_test_writes_any_more_fails(book: PactBook, tmp_path: Path):
    committed(tmp_path, interaction("a"))
    with pytest.raises(AssertionError, match="no test of tests writes"):
        book.close(is_complete=True)


def test_two_interactions_of_one_description_fail(book: PactBook):
    book.add("recorded", interaction("a"))
    with pytest.raises(AssertionError, match="two interactions 'a'"):
        book.add("recorded", interaction("a", x=1))


def test_a_pact_of_which_a_test_fails_is_not_written(book: PactBook, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv(WRITES, "1")
    book.add("recorded", interaction("a"))
    with pytest.raises(AssertionError, match="are not written"):
        book.close(is_complete=False)
    assert not list(tmp_path.iterdir())
