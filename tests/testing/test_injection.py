"""Faults that tests inject."""

from __future__ import annotations

import asyncio

from mercato.chassis.observability import faults
from mercato.services.events.service import BEFORE_COMMIT
from mercato.testing.injection import Pause, injecting


async def test_what_waits_at_a_pause_goes_on_when_the_faults_are_removed() -> None:
    pause = Pause()
    with injecting() as inject:
        inject(BEFORE_COMMIT, pause)
        waiting = asyncio.ensure_future(faults.point(BEFORE_COMMIT))
        await pause.reached.wait()
        assert not waiting.done()
    await waiting
    await faults.point(BEFORE_COMMIT)  # nothing is injected any more
