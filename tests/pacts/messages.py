"""Pacts of events: what a consumer needs of an event, run through the consumer by Pact.

An event is a message as it stands in an outbox, which is how the event log carries it: type, subject, version and data.
A consumer needs a field if it refuses, or handles otherwise, an event without it. `check_needs` shows that for each
field that the pact states; what the decoder of the consumer requires besides, the example itself shows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from pacts.book import Interaction, PactBook, interactions_of, new_pact
from pacts.examples import expectation
from pacts.rpc import JSON, State


class EventExample(msgspec.Struct, frozen=True, kw_only=True):
    """An event that a consumer needs: its whole content, as far as the consumer reads it."""

    provider: str
    description: str
    content: Mapping[str, Any]
    states: tuple[State, ...]


Consume = Callable[[bytes], None]
"""Handles one event as the consumer does; raises where it cannot."""


def consume(book: PactBook, example: EventExample, handle: Consume) -> None:
    """Runs the consumer on the example, and puts it into the book."""
    pact = new_pact(book.consumer, example.provider)
    interaction = pact.upon_receiving(example.description, "Async")
    for state in example.states:
        interaction = interaction.given(state.name, dict(state.parameters))
    interaction.with_body(expectation(example.content), JSON)

    def handled(contents: str | bytes | None, metadata: Mapping[str, Any]) -> None:
        if contents is None:
            raise AssertionError("Pact gives no content")
        handle(contents.encode() if isinstance(contents, str) else contents)

    pact.verify(handled, kind="Async")
    [made] = interactions_of(pact)
    book.add(example.provider, made)
    check_needs(made, handle)


def check_needs(made: Interaction, handle: Consume) -> None:
    """Raises where the consumer does as well without a field that the interaction states."""
    content = made["contents"]["content"]
    for path in paths(content):
        without = copy.deepcopy(content)
        remove(without, path)
        try:
            handle(json.dumps(without).encode())
        except Exception:  # whatever it raises, it needs the field
            continue
        raise AssertionError(f"{made['description']}: the consumer does not need {'.'.join(map(str, path))}")


def paths(content: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every field, those of the first element of a list included."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield (*path, name)
            yield from paths(value, (*path, name))
    elif isinstance(content, Sequence) and not isinstance(content, str) and content:
        yield from paths(content[0], (*path, 0))


def remove(content: Any, path: tuple[str | int, ...]) -> None:
    for name in path[:-1]:
        content = content[name]
    del content[path[-1]]
