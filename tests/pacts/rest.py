"""Pacts of clients of the REST API. What of an answer the client needs is shown by leaving out each field in turn."""

from __future__ import annotations

import copy
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import aiohttp
import msgspec
from aiohttp import web
from pact import match as matchers

from pacts.book import Interaction, PactBook, interactions_of, new_pact
from pacts.examples import expectation
from pacts.messages import paths, remove
from pacts.rpc import HOST, JSON, State, sentence_of

T = TypeVar("T")

PROVIDER = "mercato"
PROBLEM = "application/problem+json"


class RestExample(msgspec.Struct, frozen=True, kw_only=True):
    """A request of the client, and the answer: an example each, as in `pacts/examples.py`."""

    description: str
    method: str
    path: str
    status: int
    answer: Any
    query: Mapping[str, str] = {}
    body: Any = None
    headers: Mapping[str, str] = {}
    """Headers that the client sends with this value."""
    token_of: int | None = None
    """The account for which it calls, whose access token it sends."""
    has_key: bool = False
    """Whether it sends an Idempotency-Key."""
    states: tuple[State, ...] = ()


Use = Callable[[aiohttp.ClientSession, str], Awaitable[T]]
"""Uses the client at a URL."""


async def exchange(book: PactBook, example: RestExample, use: Use[T]) -> T:
    """Runs the client against Pact; gives what it has read. Raises where it sends or needs something else."""
    pact = new_pact(book.consumer, PROVIDER)
    _state(pact, example)
    async with aiohttp.ClientSession() as session:
        with pact.serve(HOST, raises=False, verbose=False) as server:
            try:
                read = await use(session, str(server))
            finally:
                if wrong := [sentence_of(each) for each in server.mismatches]:
                    raise AssertionError("; ".join(wrong))
        [made] = interactions_of(pact)
        await _check_needs(session, made, use)
    book.add(PROVIDER, made)
    return read


async def _check_needs(session: aiohttp.ClientSession, made: Interaction, use: Use[Any]) -> None:
    """Raises where the client reads an answer as well without a field that the interaction states."""
    response = made["response"]
    answer: Any = response["body"]["content"]

    async def respond(_: web.Request) -> web.Response:
        return web.Response(status=response["status"], body=json.dumps(answer).encode(), content_type=JSON)

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", respond)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, 0).start()
        url = f"http://{HOST}:{runner.addresses[0][1]}"
        whole = copy.deepcopy(answer)
        for path in paths(whole):
            answer = copy.deepcopy(whole)
            remove(answer, path)
            try:
                await use(session, url)
            except msgspec.ValidationError:
                continue
            except Exception as error:  # a refusal that the client has read whole
                raise AssertionError(_unneeded(made, path)) from error
            raise AssertionError(_unneeded(made, path))
    finally:
        await runner.cleanup()


def _unneeded(made: Interaction, path: tuple[str | int, ...]) -> str:
    return f"{made['description']}: the client does not need {'.'.join(map(str, path))}"


def _state(pact: Any, example: RestExample) -> None:
    interaction = pact.upon_receiving(example.description)
    for state in example.states:
        interaction = interaction.given(state.name, dict(state.parameters))
    interaction.with_request(example.method, example.path)
    for name, value in example.query.items():
        interaction.with_query_parameter(name, value)
    for name, value in example.headers.items():
        interaction.with_header(name, value)
    if example.token_of is not None:
        token = f"Bearer token-of-{example.token_of}"
        interaction.with_header("Authorization", matchers.regex(token, regex=r"^Bearer \S+$"))
    if example.has_key:
        key = f"key of {example.description}".replace(" ", "-")
        interaction.with_header("Idempotency-Key", matchers.regex(key, regex=r"^\S+$"))
    if example.body is not None:
        interaction.with_body(expectation(example.body), JSON)
    content_type = JSON if example.status < 400 else PROBLEM
    interaction.will_respond_with(example.status).with_body(expectation(example.answer), content_type)
