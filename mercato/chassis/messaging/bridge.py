"""The bridge: publishes the feed of events to a JetStream stream, for consumers in any language.

    feed ──► bridge ──► stream MERCATO_EVENTS ──► external consumers, each at its own pace
               ▲                 │
               └─── the end ◄────┘

Each entry is a message on `mercato.events.<type>`, such as `mercato.events.order.paid`: its header `Nats-Msg-Id` is the
position of the entry, its body the entry as `GET /events` shows it; if its trace is recorded, it also has the header
`traceparent`. (`mercato.events.log.read` would be such a subject too; the events service has no event log, and no user
may publish there.)

The bridge has no cursor. It reads the last message of the stream and continues behind its position. So a damaged stream
needs no repair: if it is deleted, alone or with its whole store, the bridge creates it again and publishes all that the
feed keeps; if it has lost its last messages, the bridge publishes them again.

Guaranteed
    - The stream has the entries of the feed in their order, each once, from the first to the last without a gap.
    - That holds while several bridges run, one in each process of the events service. Each batch names the sequence
      number that it follows, and the server accepts all of it or nothing: of two bridges that publish at once,
      one is refused, and reads the end of the stream again. The number also identifies the stream: one that is
      created again begins at a number that no earlier one has reached, for its entries may differ. (A stream that an
      operator creates begins where the operator chooses.)
    - No part of the shop waits for the bridge or relies on the stream: correctness never depends on a broker.

Not guaranteed
    - Entries that the feed deleted before a bridge could publish them are missing. That is logged as an error.
    - A feed that was restored from a backup is behind the stream. The bridge publishes nothing, and logs that, until
      the feed has its next entry, whose position no reader has seen (`mercato restore`, and the start of a shop whose
      feed alone was restored, ensure that), or an operator deletes the stream. Entries after the backup stay in a
      stream that is not deleted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
import structlog

from mercato.chassis.observability.clock import Clock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.transports.nats import NatsConnection

from .consumers import INFRASTRUCTURE, Pace
from .jetstream import (
    BATCH_HEADERS_BYTES,
    DUPLICATE_IN_BATCH,
    INCOMPLETE_BATCH,
    MESSAGE_ID,
    MESSAGE_NOT_FOUND,
    STREAM_EXISTS,
    STREAM_NOT_FOUND,
    WRONG_LAST_SEQUENCE,
    JetStream,
    JetStreamAnswer,
    JetStreamMissing,
    JetStreamRefused,
    Published,
)
from .stream import STREAM, SUBJECT, SUBJECTS, configuration

BATCH: Final = 500
"""Entries at most: the server accepts twice as many at once, and writes each batch with one `fsync`."""
BATCH_BYTES_MAX: Final = 8 * 1_048_576
"""Less than NATS buffers for a connection. A single entry may be larger."""
PACE: Final = Pace(gather_s=0.1, poll_s=0.5, idle_s=2.0)

CONFLICTS: Final = frozenset({WRONG_LAST_SEQUENCE, DUPLICATE_IN_BATCH, INCOMPLETE_BATCH})
"""Another bridge was faster, or the stream was created again while a batch arrived."""

log = structlog.stdlib.get_logger("mercato.bridge")


class FeedMessage(msgspec.Struct, frozen=True):
    """An entry of the feed. `body` is what is published."""

    position: int
    type: str
    body: bytes
    traceparent: str | None = None


class FeedPurged(Exception):
    """Entries behind the requested position were deleted. None is missing behind `oldest`."""

    def __init__(self, oldest: int) -> None:
        super().__init__(oldest)
        self.oldest = oldest


class FeedBehind(Exception):
    """The feed ends at `last`, before the requested position."""

    def __init__(self, last: int) -> None:
        super().__init__(last)
        self.last = last


class BridgeBlocked(Exception):
    """A sentence about what an operator has to fix."""


ReadFeed = Callable[[int], Awaitable[Sequence[FeedMessage]]]
"""The next entries behind a position, `BATCH` at most. Raises `FeedPurged` (not for 0) or `FeedBehind`."""


class End(msgspec.Struct, frozen=True):
    """Where the stream ends: its last sequence number, and the position of its last message; 0 without messages."""

    sequence: int
    position: int


class Bridge:
    """One bridge of one process. `open` once, then `follow` again and again. `wake` ends the pause of `follow`."""

    def __init__(
        self, read: ReadFeed, connection: NatsConnection, clock: Clock, telemetry: Telemetry, *, pace: Pace = PACE
    ) -> None:
        self._read_feed = read
        self._jetstream = JetStream(connection)
        self._clock = clock
        self._pace = pace
        self._pause_s = pace.poll_s
        self._woken = asyncio.Event()
        self._end: End | None = None
        """The end as this process knows it; None: to be read. The server checks it at each publication."""
        self._reported: set[str] = set()
        """Logged failures; each is logged again only after entries were published, or there were none to publish."""
        self._published = telemetry.counter(
            "mercato_bridge_published", "Entries of the feed in batches that the stream has taken."
        )
        about = "Position in the feed of the last entry in the stream."
        self._position = telemetry.gauge("mercato_bridge_position", about, workers="livemax")

    async def open(self) -> None:
        await self._jetstream.open()

    def wake(self) -> None:
        self._woken.set()

    def note_failure(self, error: Exception) -> None:
        """Handles the failure of a round; logs its reason if it is new."""
        if isinstance(error, JetStreamMissing):
            self._report("bridge_waits", reason="the NATS server has no JetStream, or no stream takes the events")
        elif isinstance(error, JetStreamRefused):
            self._report("bridge_refused", code=error.code)
        elif isinstance(error, BridgeBlocked):
            self._report("bridge_stopped", reason=str(error))
        elif isinstance(error, INFRASTRUCTURE):
            self._report("bridge_waits", reason=str(error))
        else:
            log.error("bridge_failed", exc_info=error)

    def _report(self, event: str, **about: object) -> None:
        failure = f"{event} {about}"
        if failure not in self._reported:
            (log.warning if event == "bridge_waits" else log.error)(event, **about)
        self._reported.add(failure)

    # --------------------------------------------------------------------------------------------------------- follow

    async def follow(self) -> int:
        """Publishes the next entries, then pauses; gives how many there were."""
        self._woken.clear()
        # Until all acknowledgements have arrived, the end of the stream is unknown.
        end, self._end = self._end, None
        if end is None:
            end = await self._read_end()
        page = await self._read(end)
        if page is None:
            await self._idle()
            return 0
        if not page:
            self._end = end
            await self._idle()
            return 0
        self._pause_s = self._pace.poll_s
        self._end = await self._publish(end, page)
        if self._end is None:
            # Another bridge publishes: wait for as long as it may run.
            await asyncio.sleep(self._pace.idle_s * random.uniform(0.5, 1.0))
            return 0
        await asyncio.sleep(0 if len(page) >= BATCH else self._pace.gather_s)
        return len(page)

    async def _idle(self) -> None:
        """Waits for a wake-up, with a bound: it may be lost, and the stream may be deleted at any time."""
        try:
            async with asyncio.timeout(self._pause_s):
                await self._woken.wait()
        except TimeoutError:
            self._pause_s = min(2 * self._pause_s, self._pace.idle_s)
            self._end = None

    async def _read_end(self) -> End:
        """The end of the stream, which it creates if it is missing."""
        try:
            answer = await self._jetstream.ask(f"STREAM.INFO.{STREAM}")
        except JetStreamRefused as refused:
            if refused.code != STREAM_NOT_FOUND:
                raise
            answer = await self._make_stream()
        assert answer.state is not None, "the answer about a stream has its state"
        if answer.config is None or not answer.config.allow_atomic:
            raise BridgeBlocked(f"the stream {STREAM} does not take batches (allow_atomic), which NATS has since 2.12")
        sequence = answer.state.last_seq
        position = await self._last_position() if answer.state.messages else 0
        if position is None:
            return await self._read_end()
        self._position.set(position)
        return End(sequence, position)

    async def _make_stream(self) -> JetStreamAnswer:
        try:
            answer = await self._jetstream.ask(f"STREAM.CREATE.{STREAM}", configuration(self._clock.now()))
        except JetStreamRefused as refused:
            if refused.code != STREAM_EXISTS:
                raise
            return await self._jetstream.ask(f"STREAM.INFO.{STREAM}")
        log.info("bridge_stream_made", stream=STREAM)
        return answer

    async def _last_position(self) -> int | None:
        """0 where the stream is empty; None where there is no stream, for it was deleted a moment ago."""
        try:
            answer = await self._jetstream.ask(f"STREAM.MSG.GET.{STREAM}", {"last_by_subj": SUBJECTS})
        except JetStreamRefused as refused:
            if refused.code == STREAM_NOT_FOUND:
                return None
            if refused.code != MESSAGE_NOT_FOUND:
                raise
            return 0
        assert answer.message is not None, "the answer has the message"
        position = answer.message.header(MESSAGE_ID)
        if not position.isascii() or not position.isdigit():
            raise BridgeBlocked("the last message of the stream is not an entry of the feed: delete it")
        return int(position)

    async def _read(self, end: End) -> Sequence[FeedMessage] | None:
        """The next entries; None if the feed was replaced, for instance restored, since it filled the stream."""
        after = end.position
        while True:
            try:
                page = await self._read_feed(after)
            except FeedPurged as purged:
                after = purged.oldest
                self._report("bridge_missed_events", after=end.position, oldest=after)
            except FeedBehind as behind:
                # Until an operator deletes the stream: its consumers have read entries that the feed no longer has.
                self._report("bridge_feed_is_behind", position=end.position, last=behind.last)
                return None
            else:
                if not page and after == end.position:
                    self._reported.clear()
                return page

    # -------------------------------------------------------------------------------------------------------- publish

    async def _publish(self, end: End, page: Sequence[FeedMessage]) -> End | None:
        """The new end; None if it has to be read: another bridge was faster, or the stream was created again."""
        batch = self._batch(page)
        try:
            answer = await self._jetstream.publish(batch, end.sequence)
        except JetStreamRefused as refused:
            if refused.code not in CONFLICTS:
                raise
            return None
        self._published.inc(len(batch))
        self._position.set(page[len(batch) - 1].position)
        self._reported.clear()
        return End(answer.seq, page[len(batch) - 1].position)

    def _batch(self, page: Sequence[FeedMessage]) -> list[Published]:
        """Messages of the first entries of a page, as many as may be sent at once."""
        largest, total = self._jetstream.max_payload, 0
        batch: list[Published] = []
        for entry in page:
            size = BATCH_HEADERS_BYTES + len(entry.body)
            total += size
            if batch and (total > BATCH_BYTES_MAX or size > largest):
                break
            if size > largest:
                raise BridgeBlocked(f"the entry at {entry.position} has {size} bytes, more than max_payload of NATS")
            batch.append(Published(f"{SUBJECT}.{entry.type}", str(entry.position), entry.body, entry.traceparent))
        return batch
