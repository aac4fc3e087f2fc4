"""Crashes at fault points of a shop whose services are processes of their own.

One process dies at the point; the others and PostgreSQL live on, and its owner starts it again. A client may get an
answer all the same, after a retry between the processes, or a 503 or 504, upon which it does the same again with the
same keys. Then the shop must come to rest; everything has happened once, and an audit of all databases finds nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from mercato.testing.command import COMMAND
from mercato.testing.process import Process
from mercato.testing.waiting import wait_until
from system.crash.crashing import (
    ATTEMPTS,
    CONVERGED_SECONDS,
    NO_ANSWER,
    NO_SETTINGS,
    POLL_SECONDS,
    REACHED_SECONDS,
    SEED,
    Crash,
    Shop,
)

SITE: Final = Path(__file__).with_name("site")
PART: Final = 5
"""One point of so many, others by each seed."""
EVERY: Final = os.environ.get("CRASH_POINTS") == "all"
LATER: Final = re.compile(r'^(429|50[34]) |"status":(429|50[34])')
"""How a scenario complains of an answer after which a client tries again."""

T = TypeVar("T")
_numbers = itertools.count(1)


class SplitShop(Shop):
    """As `Shop`, with a process for each service."""

    def __init__(self, data: Path, transport: str, environment: Mapping[str, str] = NO_SETTINGS) -> None:
        super().__init__(data, environment)
        self._transport = transport
        self._faults = data.parent / "faults"
        self._faults.mkdir()

    def start(self, point: str | None = None, own: Mapping[str, str] = NO_SETTINGS) -> bool:
        assert point is None, "a fault is armed while the shop is at rest"
        self.stop()
        self._own = own
        test_variables = {"PYTHONPATH": str(SITE), "MERCATO_TEST_FAULTS": str(self._faults)}
        options = ("--split", "--transport", self._transport)
        environment = {**self._environment, **own, **test_variables}
        self._process = Process(self.data, *options, environment=environment, command=COMMAND)
        self._process.ready()
        return True

    def arm(self, point: str) -> None:
        """From now on the first process that comes to the point dies there: it may be at once, before it confirms."""
        for file in self._faults.iterdir():
            file.unlink()
        made = self._faults / "made"
        made.write_text(point)
        made.rename(self._faults / "armed")
        processes = self.process.tree().instances.values()
        seen = [self._faults / f"seen-{process.pid}" for process in processes]
        wait_until(lambda: (self._faults / "killed").exists() or all(file.exists() for file in seen))

    def has_killed(self, seconds: float) -> bool:
        """Whether a process has died at the point by then. If not, none will."""
        end = time.monotonic() + seconds
        while not (self._faults / "killed").exists():
            if time.monotonic() > end:
                with contextlib.suppress(FileNotFoundError):
                    (self._faults / "armed").unlink()
                    return False
            time.sleep(POLL_SECONDS)
        return True


def part(crashes: Sequence[Crash], transport: str, seed: str = SEED) -> Sequence[Crash]:
    """The points that are crashed at over a transport."""
    if EVERY:
        return crashes
    chosen = random.Random(f"{seed} {transport}").sample(range(len(crashes)), len(crashes) // PART)
    return [crashes[number] for number in sorted(chosen)]


def crash_one_and_recover(shop: SplitShop, crash: Crash, settings: Mapping[str, str]) -> None:
    """See the top of this file. `settings` are those of the table of the point."""
    sys.stdout.write(f"CRASH_SEED={SEED}\n")
    runs: list[Any] = []
    shop.ensure({**settings, **crash.environment})
    for _ in range(ATTEMPTS):
        runs.append(_served(lambda: crash.prepare(shop, f"{crash.point}-{next(_numbers)}")))
        shop.arm(crash.point)
        with contextlib.suppress(_Later), shop.caller() as caller:
            _once(lambda caller=caller: crash.act(caller, runs[-1]))
        if shop.has_killed(REACHED_SECONDS):
            break
    else:
        raise AssertionError(f"{crash.point} was not reached")
    assert shop.comes_to_rest()
    scenario = crash.recover or crash.act
    for prepared in runs:
        with shop.caller() as caller:
            _served(lambda caller=caller, prepared=prepared: scenario(caller, prepared))
    assert shop.comes_to_rest()
    shop.assert_correct()


class _Later(Exception):
    """The answer asks the client to try again, or gets no answer."""


def _once(scenario: Callable[[], T]) -> T:
    """Raises `_Later` where that is what the client got."""
    try:
        return scenario()
    except NO_ANSWER as error:
        raise _Later from error
    except AssertionError as error:
        if LATER.search(str(error)):
            raise _Later from error
        raise


def _served(scenario: Callable[[], T]) -> T:
    """What a client gets that begins again whenever an answer asks it to."""
    end = time.monotonic() + CONVERGED_SECONDS
    while True:
        try:
            return _once(scenario)
        except _Later:
            assert time.monotonic() < end, "the shop does not recover"
            time.sleep(POLL_SECONDS)
