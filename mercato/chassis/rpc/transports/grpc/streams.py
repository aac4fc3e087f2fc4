"""A stream of batches to one service of an instance, and of their outcomes back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc.aio
from google.protobuf.message import DecodeError

from mercato.chassis.grpc import NOTHING
from mercato.chassis.rpc.transports.direct.client import ConnectionBroke, NotConnected

from .wire import LARGE_BYTES, Batch, Outcomes, batches, read_answers

IDLE_SECONDS: Final = 30.0
"""A stream without batches ends after one to two times this, so that its connection can end."""


class Stream:
    """A stream that the instance has accepted. `on_end` is called when it carries nothing any more.

    Batches are written by a task of the stream: gRPC ends a stream whose writer is cancelled, and a caller may leave at
    any time. `is_leaving`: it takes no more batches, and ends when those that it has are answered.
    """

    def __init__(self, call: Any, on_leave: Callable[[Stream], None], on_end: Callable[[Stream], None]) -> None:
        self.is_leaving = False
        self._call = call
        self._on_leave = on_leave
        self._on_end = on_end
        self._last_id = 0
        self._waiting: dict[int, asyncio.Future[Outcomes]] = {}
        self._unsent = deque[Batch]()
        self._to_write = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._last_id_seen = 0
        self._idle = self._loop.call_later(IDLE_SECONDS, self._look_whether_idle)
        self._writer = asyncio.create_task(self._write())
        self._reader = asyncio.create_task(self._read())

    async def exchange(self, batch: Batch) -> Outcomes:
        """Sends a batch under an id of the stream; gives what became of it.

        Raises `NotConnected` if it was not sent, and `ConnectionBroke` if that is unknown.
        """
        if self.is_leaving:
            raise NotConnected("the stream ends")
        self._last_id = batch.id = self._last_id + 1
        answer = self._waiting[batch.id] = self._loop.create_future()
        self._unsent.append(batch)
        self._to_write.set()
        try:
            return await answer
        finally:
            self._waiting.pop(batch.id, None)

    def leave(self) -> None:
        """Ends the stream when its batches are answered."""
        if not self.is_leaving:
            self.is_leaving = True
            self._idle.cancel()
            self._on_leave(self)
            self._to_write.set()

    def _look_whether_idle(self) -> None:
        if not self._waiting and self._last_id == self._last_id_seen:
            self.leave()
            return
        self._last_id_seen = self._last_id
        self._idle = self._loop.call_later(IDLE_SECONDS, self._look_whether_idle)

    async def _write(self) -> None:
        try:
            await self._write_all()
        finally:
            if not self.is_leaving:  # a stream without a writer is none
                self._call.cancel()

    async def _write_all(self) -> None:
        while self._unsent or not self.is_leaving:
            if not self._unsent:
                self._to_write.clear()
                await self._to_write.wait()
                continue
            some = self._next()
            try:
                if some:
                    await self._call.write(batches(some))
            except asyncio.InvalidStateError:  # the call had ended before; the reader knows why
                self._unsent.extendleft(reversed(some))
                return
            except grpc.aio.AioRpcError:  # it ends now
                return
        await self._call.done_writing()

    def _next(self) -> Sequence[Batch]:
        """Those whose callers still wait, as many as one message carries."""
        some, size = list[Batch](), 0
        while self._unsent and (size == 0 or size + len(self._unsent[0].requests) <= LARGE_BYTES):
            batch = self._unsent.popleft()
            if batch.id in self._waiting:
                some.append(batch)
                size += len(batch.requests)
        return some

    async def _read(self) -> None:
        reason = "the stream ended"
        try:
            while (message := await self._call.read()) is not NOTHING:
                for outcomes in read_answers(message):
                    self._answered(outcomes)
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except DecodeError as error:
            reason = f"not an answer: {error}"
        finally:
            self._ended(reason)

    def _answered(self, outcomes: Outcomes) -> None:
        if not outcomes.id:
            self.leave()
            return
        answer = self._waiting.get(outcomes.id)
        if answer is not None and not answer.done():
            answer.set_result(outcomes)

    def _ended(self, reason: str) -> None:
        unsent = {batch.id for batch in self._unsent}
        self._unsent.clear()
        self.leave()
        self._writer.cancel()
        self._call.cancel()
        for number, answer in self._waiting.items():
            if not answer.done():
                answer.set_exception(NotConnected(reason) if number in unsent else ConnectionBroke(reason))
        self._on_end(self)
