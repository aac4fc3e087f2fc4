"""Builds the sandbox."""

from __future__ import annotations

from mercato.chassis.hosting.periodic import PeriodicTask
from mercato.chassis.hosting.service import Env, Service
from mercato.chassis.rpc.server import Server
from mercato.simulators.bank.contract import Sandbox

from .service import FINISH_EVERY_SECONDS, FINISHED_AT_ONCE, Options, SandboxService


def build(env: Env) -> Service:
    """The bank. `MERCATO_SANDBOX_FAILURE_RATE` and `_STATEMENT_DELAY_SECONDS` set its `Options`."""
    service = SandboxService(env.database, env.options(Options), env.randomness)
    finish = PeriodicTask("finish", service.finish_due, FINISH_EVERY_SECONDS, limit=FINISHED_AT_ONCE)
    server = Server(Sandbox, env.clock)
    server.register(Sandbox.authorize, service.authorize)
    server.register(Sandbox.charge, service.charge)
    server.register(Sandbox.capture, service.capture)
    server.register(Sandbox.void, service.void)
    server.register(Sandbox.refund, service.refund)
    server.register(Sandbox.look_up, service.look_up)
    server.register(Sandbox.statement, service.statement)
    return Service(server.complete(), env.database, tasks=(finish,))
