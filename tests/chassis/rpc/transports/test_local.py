"""The transport inside one process."""

from __future__ import annotations

from collections.abc import Mapping

from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.server import LocalTransport, Server
from mercato.chassis.rpc.transports import Transport

from .conformance import CUSTOMER, Ask, Conformance, Said, Stage
from .false_promise import COUNT, counting


class TestLocal(Conformance):
    def transport(self, servers: Mapping[str, Server], clock: Clock) -> Transport:
        return LocalTransport(servers)

    async def test_a_message_is_handed_over_without_a_copy(self, stage: Stage):
        request = Ask(number=1)
        with stage.acting(CUSTOMER):
            answer = await stage.things.change(request)
        assert isinstance(answer, Said)
        assert answer.echo is request

    async def test_a_read_with_a_side_effect_runs_once_and_is_not_found(self, stage: Stage):
        """The counterpart of the test of the wire: what only that one finds."""
        assert await counting(stage) == COUNT
