"""`mercato events`: read the feed, list dead events (dead letters), replay them.

The commands use the databases directly, so that they work whether the shop runs or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from mercato import topology
from mercato.chassis.contract import Unavailable
from mercato.chassis.hosting import settings as config
from mercato.chassis.hosting.host import Host
from mercato.chassis.hosting.options import OptionError
from mercato.chassis.messaging import consumers as chassis_consumers, parking
from mercato.chassis.messaging.consumers import ReplayFailed
from mercato.chassis.messaging.events import Subscription
from mercato.chassis.messaging.parking import DeadLetter
from mercato.chassis.observability.telemetry import Telemetry, configure_logging
from mercato.chassis.postgres.database import Database
from mercato.cli import databases
from mercato.cli.databases import Databases, Unreachable
from mercato.cli.progress import fail, note, say, show
from mercato.contracts.events import (
    PAGE_LIMIT,
    TYPES_LIMIT,
    CursorAhead,
    CursorTooOld,
    EventType,
    FeedEntry,
    ListEvents,
)
from mercato.services.events.service import EventsService

FOLLOW_SECONDS: Final = 0.5
LAST: Final = 20
"""How many entries are shown without --after."""


class ShopLocation(msgspec.Struct, frozen=True):
    """Which shop: its data folder, or its servers as in `servers.py`."""

    data: Path
    dsns: tuple[str, ...]


class DeadLetterConsumer(msgspec.Struct, frozen=True):
    """A consumer whose dead letters can be read and replayed."""

    database: Database
    subscription: Subscription

    @property
    def name(self) -> str:
        return self.subscription.consumer


# ------------------------------------------------------------------------------------------------------------ tail


def tail(place: ShopLocation, *, after: int | None, types: str, follow: bool, as_json: bool) -> int:
    """Prints entries of the feed, the oldest first; gives the exit code."""
    return databases.run(lambda: _tail(place, after, types, follow=follow, as_json=as_json))


async def _tail(place: ShopLocation, after: int | None, types: str, *, follow: bool, as_json: bool) -> int:
    wanted = _types(types)
    async with _reached(place, must_run=follow) as found, _opened(found, "events") as database:
        position = await EventsService(database).before_last(LAST, wanted) if after is None else after
        try:
            async for entry in _entries(database, position, wanted, follow=follow):
                show(_json(entry) if as_json else _line(entry))
        except CursorTooOld as error:
            raise Unreachable(
                f"of what came after position {error.after}, the oldest is not in the feed any more: "
                f"go on with --after {error.oldest}"
            ) from error
        except CursorAhead as error:
            raise Unreachable(str(error)) from error
        except asyncio.CancelledError:
            if not follow:
                raise
            # Ctrl-C is how following ends.
    return 0


async def _entries(database: Database, after: int, types: tuple[str, ...], *, follow: bool) -> AsyncIterator[FeedEntry]:
    feed = EventsService(database)
    while True:
        page = await feed.list(ListEvents(after=after, limit=PAGE_LIMIT, types=types))
        for entry in page.entries:
            yield entry
        after = page.next_after
        if page.is_full:
            continue
        if not follow:
            return
        await asyncio.sleep(FOLLOW_SECONDS)


def _types(text: str) -> tuple[EventType, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if len(names) > TYPES_LIMIT:
        raise Unreachable(f"--types takes at most {TYPES_LIMIT} types")
    try:
        return msgspec.convert(names, tuple[EventType, ...])
    except msgspec.ValidationError:
        raise Unreachable(f"{text!r} are not types of events: give names such as order.paid, with commas") from None


def _json(shown: Any) -> str:
    return msgspec.json.encode(shown).decode()


def _line(entry: FeedEntry) -> str:
    when = entry.at.strftime("%Y-%m-%d %H:%M:%S")
    data = json.dumps(entry.data, ensure_ascii=False)
    return f"{entry.position:>8}  {when}  {entry.type:<24}  {entry.subject} v{entry.version}  {data}"


# ------------------------------------------------------------------------------------------------------------ dead


def dead(place: ShopLocation, *, as_json: bool) -> int:
    """Prints the dead letters of all consumers; gives the exit code."""
    return databases.run(lambda: _dead(place, as_json=as_json))


async def _dead(place: ShopLocation, *, as_json: bool) -> int:
    count = 0
    async with _reached(place) as found, _consumers(found) as consumers:
        for consumer in consumers:
            async for letter in _letters(consumer):
                count += 1
                show(_json_letter(letter) if as_json else _letter_line(letter))
    if not count and not as_json:
        show("there are no dead letters")
    return 0


async def _letters(consumer: DeadLetterConsumer) -> AsyncIterator[DeadLetter]:
    after = ("", 0)
    while True:
        async with consumer.database.read() as tx:
            letters = await parking.dead_letters(tx, consumer.name, after)
        for letter in letters:
            yield letter
        if len(letters) < parking.LISTED:
            return
        after = (letters[-1].source, letters[-1].event_id)


def _id(letter: DeadLetter) -> str:
    return f"{letter.source}:{letter.event_id}"


def _json_letter(letter: DeadLetter) -> str:
    return _json({"id": _id(letter), **msgspec.structs.asdict(letter)})


def _letter_line(letter: DeadLetter) -> str:
    what = f"{letter.type}  {letter.subject} {letter.subject_id} v{letter.version}"
    when = letter.at.strftime("%Y-%m-%d %H:%M:%S")
    error = " ".join(letter.error.split())
    return f"{_id(letter)}  {letter.consumer}  {what}  given up {when} after {letter.tries} tries: {error}"


# ---------------------------------------------------------------------------------------------------------- replay


def replay(place: ShopLocation, ids: Sequence[str], *, all_: bool) -> int:
    """Replays dead letters; gives 1 if one failed again, or does not exist."""
    return databases.run(lambda: _replay(place, ids, all_=all_))


async def _replay(place: ShopLocation, ids: Sequence[str], *, all_: bool) -> int:
    if all_ == bool(ids):
        raise Unreachable("name the events to replay, as `mercato events dead` shows them; or give --all")
    wanted = set(ids)
    missing = set(ids)
    results = {"taken": 0, "failed": 0, "gone": 0}
    async with _reached(place) as found, _consumers(found) as consumers:
        for consumer in consumers:
            # One after the other, by id, so that the events of a subject are replayed in order.
            async for letter in _letters(consumer):
                if not all_ and _id(letter) not in wanted:
                    continue
                missing.discard(_id(letter))
                results[await _replayed(consumer, letter)] += 1
    for id_ in sorted(missing):
        fail(f"there is no dead letter {id_}: `mercato events dead` lists them")
    say(f"{results['taken']} taken, {results['failed']} failed again")
    return 1 if results["failed"] or missing else 0


async def _replayed(consumer: DeadLetterConsumer, letter: DeadLetter) -> Literal["taken", "failed", "gone"]:
    try:
        if not await chassis_consumers.replay(consumer.database, consumer.subscription, letter.source, letter.event_id):
            say(f"{_id(letter)}  {consumer.name}  another process replayed it meanwhile")
            return "gone"
    except ReplayFailed as error:
        fail(f"{consumer.name} still cannot take {_id(letter)}: {error}")
        return "failed"
    say(f"{_id(letter)}  {consumer.name}  taken")
    return "taken"


# ------------------------------------------------------------------------------------------------------- databases


@contextlib.asynccontextmanager
async def _reached(place: ShopLocation, *, must_run: bool = False) -> AsyncGenerator[Databases]:
    """The databases; raises `Unreachable` if one becomes unavailable meanwhile."""
    configure_logging("error")
    try:
        async with databases.reached(place.data, place.dsns, note, must_run=must_run) as found:
            yield found
    except Unavailable as error:
        raise Unreachable(f"{error} Has the shop been stopped? Try again.") from error


@contextlib.asynccontextmanager
async def _opened(found: Databases, service: str) -> AsyncGenerator[Database]:
    database = Database(found.dsns[service], service, Telemetry(), size=1)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


@contextlib.asynccontextmanager
async def _consumers(found: Databases) -> AsyncGenerator[list[DeadLetterConsumer]]:
    """Every consumer of the shop, with its handler. The services are built, but not started."""
    try:
        host = Host(
            topology.builds(),
            found.dsns,
            secrets=dict.fromkeys(topology.SERVICES, b""),  # a handler has no use for them
            pool_size=1,
            options=config.service_options(topology.SERVICES),
            may_call=topology.may_call,
        )
    except OptionError as error:
        raise Unreachable(str(error)) from error
    try:
        consumers = [
            DeadLetterConsumer(s.database, wanted) for s in host.services.values() for wanted in s.subscriptions
        ]
        for database in {consumer.database.service: consumer.database for consumer in consumers}.values():
            await database.open()
        yield consumers
    finally:
        await host.close()
