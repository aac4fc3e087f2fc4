"""Builds the payments service: the only place that constructs its objects."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from mercato.chassis.hosting.options import OptionError
from mercato.chassis.hosting.periodic import PeriodicTask
from mercato.chassis.hosting.service import Env, Service
from mercato.chassis.rpc.server import Server
from mercato.contracts.payments import Payments
from mercato.simulators.bank.contract import Sandbox

from .charging import Charging
from .finishing import SWEPT_AT_ONCE, Finishing
from .provider import Provider, SandboxProvider
from .reconciling import Reconciling
from .service import Options, PaymentsService


def build(env: Env, providers: Mapping[str, Provider] | None = None) -> Service:
    """The payments service. Tests pass `providers` of their own, by the name that methods have before the colon."""
    if providers is None:
        providers = {"sandbox": SandboxProvider(env.client(Sandbox))}
    options = env.options(Options)
    charging = Charging(env.database, providers)
    finishing = Finishing(env.database, charging)
    if wrong := charging.check_method(options.default_method):
        raise OptionError(f"The setting MERCATO_PAYMENTS_DEFAULT_METHOD is not valid: {wrong.errors[0].message}.")
    reconciling = Reconciling(
        env.database,
        providers,
        finishing,
        env.telemetry,
        period_seconds=options.reconcile_seconds,
        lag_seconds=options.statement_lag_seconds,
    )
    sweep = functools.partial(finishing.sweep, options.sweep_seconds)
    return Service(
        server=_server(env, charging, PaymentsService(env.database, charging, options)),
        database=env.database,
        tasks=(
            PeriodicTask("sweep intents", sweep, options.sweep_seconds, limit=SWEPT_AT_ONCE),
            PeriodicTask(
                "reconcile", reconciling.round, options.reconcile_seconds, delay_seconds=options.reconcile_seconds
            ),
        ),
        has_outbox=True,
    )


def _server(env: Env, charging: Charging, reading: PaymentsService) -> Server:
    server = Server(Payments, env.clock)
    server.register(Payments.check_method, reading.check_method)
    server.register(Payments.authorize, charging.authorize)
    server.register(Payments.charge, charging.charge)
    server.register(Payments.capture, charging.capture)
    server.register(Payments.capture_part, charging.capture_part)
    server.register(Payments.void, charging.void)
    server.register(Payments.refund, charging.refund)
    server.register(Payments.get, reading.get)
    server.register(Payments.list, reading.list)
    server.register(Payments.trace, reading.trace)
    server.register(Payments.assign, reading.assign)
    return server.complete()
