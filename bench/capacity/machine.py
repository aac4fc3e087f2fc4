"""The parts of a simulated machine: cores, event loops, the log of PostgreSQL, databases. Times are microseconds.

The model is one of processes that wait for each other, which is what SimPy is for. Nothing here knows of orders.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Generator
from typing import Any, Final

import simpy

Flow = Generator[simpy.Event, Any, None]
"""What a process of the simulation does: it yields what it waits for."""

SLICE_US: Final = 1_000.0
"""How long a process keeps a core that another one waits for. An assumption: slices of Linux are of this order."""
JITTER: Final = 0.1
"""Each piece of work takes up to so much more or less, at random: without it all batches would go in step."""


class Cores:
    """Cores that processes share, in slices and in turns. `count` None: each process has a core of its own."""

    def __init__(self, env: simpy.Environment, count: int | None, seed: int) -> None:
        self._env = env
        self._cores = simpy.Resource(env, count) if count else None
        self._waiting = 0
        """Processes that wait for a core."""
        self._random = random.Random(seed)
        self.spent_us: defaultdict[str, float] = defaultdict(float)
        """CPU by the name of a process or database."""

    def run(self, name: str, us: float) -> Flow:
        """Keeps a core busy for about `us`, as soon as there is one."""
        left = us * self._random.uniform(1 - JITTER, 1 + JITTER)
        self.spent_us[name] += left
        if self._cores is None:
            yield self._env.timeout(left)
            return
        while left > 0:
            core = self._cores.request()
            self._waiting += 1
            yield core
            self._waiting -= 1
            while left > 0:
                ran = min(left, SLICE_US)
                yield self._env.timeout(ran)
                left -= ran
                if self._waiting:
                    break
            self._cores.release(core)


class Loop:
    """The event loop of a process: one piece of work after another, in the order in which they became ready."""

    def __init__(self, env: simpy.Environment, cores: Cores, name: str) -> None:
        self.name = name
        self._env = env
        self._cores = cores
        self._ready: deque[tuple[Callable[[], float], simpy.Event]] = deque()
        self._idle: simpy.Event | None = None
        env.process(self._work())

    def run(self, us: float) -> simpy.Event:
        """Adds work; the event happens when it is done."""
        return self.run_later(lambda: us)

    def run_later(self, cost: Callable[[], float]) -> simpy.Event:
        """The same for work whose amount is known when it begins."""
        done = self._env.event()
        self._ready.append((cost, done))
        if self._idle is not None:
            self._idle.succeed()
            self._idle = None
        return done

    def _work(self) -> Flow:
        while True:
            if not self._ready:
                self._idle = self._env.event()
                yield self._idle
            cost, done = self._ready.popleft()
            yield from self._cores.run(self.name, cost())
            done.succeed()


class Wal:
    """The write-ahead log of a server. Commits that come before a flush begins share it; one flush follows another.

    `delay_us`: how long a flush waits for further commits (PostgreSQL's `commit_delay`).
    """

    def __init__(self, env: simpy.Environment, flush_us: float, delay_us: float = 0.0) -> None:
        self._env = env
        self._flush_us = flush_us
        self._delay_us = delay_us
        self._waiting: list[simpy.Event] = []
        self._idle: simpy.Event | None = None
        self.commits = 0
        self.flushes = 0
        env.process(self._work())

    def commit(self) -> simpy.Event:
        """The event happens when the log is flushed up to here."""
        self.commits += 1
        flushed = self._env.event()
        self._waiting.append(flushed)
        if self._idle is not None:
            self._idle.succeed()
            self._idle = None
        return flushed

    def _work(self) -> Flow:
        while True:
            if not self._waiting:
                self._idle = self._env.event()
                yield self._idle
            if self._delay_us:
                yield self._env.timeout(self._delay_us)
            flushed, self._waiting = self._waiting, []
            yield self._env.timeout(self._flush_us)
            self.flushes += 1
            for event in flushed:
                event.succeed()


class Database:
    """A database, with the locks by which its transactions wait for each other."""

    def __init__(self, env: simpy.Environment, name: str, wal: Wal) -> None:
        self.name = name
        self.cpu_name = f"database {name}"
        self.wal = wal
        self.outbox = simpy.Resource(env)
        """Held from the row with the events to the end of the commit (`OUTBOX_LOCK` in `connections.py`)."""
        self.rows = simpy.Resource(env)
        """Held from the first statement to the end of the commit by transactions that change the same rows."""
