"""Builds the orders service: the only place that constructs its objects."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mercato.chassis.hosting.periodic import PeriodicTask
from mercato.chassis.hosting.service import Env, Service
from mercato.chassis.hosting.table_scan import TableScan
from mercato.chassis.rpc.server import Server
from mercato.chassis.sagas.runner import LANES, SWEPT_AT_ONCE, Runner
from mercato.contracts.inventory import Inventory
from mercato.contracts.orders import Orders
from mercato.contracts.payments import Payments
from mercato.contracts.products import Products
from mercato.contracts.users import Users

from .checkout import CheckoutSteps
from .claiming import Claiming
from .guests import KEY_PURPOSE, Guests
from .lost_orders import LostOrders
from .paying import Paying
from .payment_methods import PaymentMethods
from .placing import NONCES_PURPOSE, Placing
from .reconciling import HoldReconciling, Reconciling
from .refund_listing import RefundListing
from .refunding import Refunding
from .rules import BuyerLimits, Limits
from .service import OrdersService
from .timeline import TimelineReader

LIMIT_MAX: Final = 1_000_000


class Options(msgspec.Struct, frozen=True):
    """What an operator may set: `MERCATO_ORDERS_LEASE_SECONDS` and so on."""

    lease_seconds: Annotated[float, Meta(ge=0.5, le=600)] = 5.0
    """How long after the death of a process another one continues its orders."""
    sweep_seconds: Annotated[float, Meta(ge=0.05, le=60)] = 0.5
    """The pause between two searches for such orders."""
    payment_seconds: Annotated[float, Meta(ge=1, le=30 * 86_400)] = 900.0
    """How long after its placing an order can be paid. Before the first payment, inventory's hold decides."""
    reconcile_seconds: Annotated[float, Meta(ge=0.01, le=3_600)] = 60.0
    """The pause between two scans for orders that no process continues, and for stock that is held for none."""
    customer_open_orders: Annotated[int, Meta(ge=0, le=LIMIT_MAX)] = 50
    """Open orders that a customer may have: pending, neither paid nor over. 0: any number."""
    customer_held_units: Annotated[int, Meta(ge=0, le=LIMIT_MAX)] = 10
    """Pieces of a product that the open orders of a customer may hold: these or `customer_held_percent`, the larger."""
    customer_held_percent: Annotated[int, Meta(ge=0, le=100)] = 20
    """Of the pieces on hand. With 0 here and in `customer_held_units`, orders may hold any number."""
    staff_open_orders: Annotated[int, Meta(ge=0, le=LIMIT_MAX)] = 0
    """The same for orders that staff, and programs with their role, place for a customer."""
    staff_held_units: Annotated[int, Meta(ge=0, le=LIMIT_MAX)] = 0
    """As `customer_held_units`, for such orders."""
    staff_held_percent: Annotated[int, Meta(ge=0, le=100)] = 0
    """As `customer_held_percent`, for such orders."""
    quiet_seconds: Annotated[float, Meta(ge=0, le=86_400)] = 600.0
    """How long nothing must have happened to an order, or to a hold, before the reconciliation checks it."""


def build(env: Env) -> Service:
    options = env.options(Options)
    database, users = env.database, env.client(Users)
    inventory, payments = env.client(Inventory), env.client(Payments)
    runner = Runner(database, clock=env.clock, telemetry=env.telemetry, lease_seconds=options.lease_seconds)
    limits = _limits(options)
    CheckoutSteps(  # registers its steps with the runner
        database, runner, inventory=inventory, payments=payments, window_s=options.payment_seconds, limits=limits
    )
    guests = Guests(database, env.derive_key(KEY_PURPOSE))
    methods = PaymentMethods(payments, env.clock)
    placing = Placing(
        database,
        runner,
        users=users,
        products=env.client(Products),
        methods=methods,
        randomness=env.randomness,
        nonce_key=env.derive_key(NONCES_PURPOSE),
        lost=LostOrders(database, inventory=inventory, payments=payments),
        guests=guests,
        limits=limits,
    )
    paying = Paying(database, runner, payments, methods, guests)
    refunding = Refunding(database, runner, inventory=inventory, payments=payments)
    claiming = Claiming(database, runner, users=users, payments=payments, paying=paying, guests=guests)
    service = OrdersService(database, runner, paying=paying, refunding=refunding, guests=guests)
    timeline = TimelineReader(database, guests, inventory=inventory, payments=payments)
    listing = RefundListing(database, payments)
    server = Server(Orders, env.clock)
    server.register(Orders.place, placing.run)
    server.register(Orders.get, service.get)
    server.register(Orders.list, service.list)
    server.register(Orders.move, service.move)
    server.register(Orders.cancel, paying.cancel)
    server.register(Orders.history, service.history)
    server.register(Orders.settled, service.settled)
    server.register(Orders.timeline, timeline.timeline)
    server.register(Orders.pay, paying.pay)
    server.register(Orders.capture, paying.capture)
    server.register(Orders.capture_part, paying.capture_part)
    server.register(Orders.void, paying.void)
    server.register(Orders.refund, refunding.refund)
    server.register(Orders.claim, claiming.claim)
    server.register(Orders.take_back, refunding.take_back)
    server.register(Orders.refunds, listing.of_order)
    server.register(Orders.payment_refunds, listing.of_payment)
    server.register(Orders.one_refund, listing.one)
    server.register(Orders.guest_payment, paying.guest_payment)
    return Service(
        server=server.complete(),
        database=database,
        tasks=_tasks(env, runner, inventory, options),
        has_outbox=True,
        drain=runner.drain,
    )


def _limits(options: Options) -> Limits:
    return Limits(
        BuyerLimits(options.customer_open_orders, options.customer_held_units, options.customer_held_percent),
        BuyerLimits(options.staff_open_orders, options.staff_held_units, options.staff_held_percent),
    )


def _tasks(env: Env, runner: Runner, inventory: Inventory, options: Options) -> tuple[PeriodicTask, ...]:
    sagas = Reconciling(env.database, env.telemetry, quiet_seconds=options.quiet_seconds)
    holds = HoldReconciling(env.database, inventory, env.telemetry, quiet_seconds=options.quiet_seconds)
    return (
        TableScan(sagas.resume_page).task("resume sagas", options.reconcile_seconds),
        TableScan(holds.release_page).task("release holds", options.reconcile_seconds),
        PeriodicTask("sweep sagas", runner.sweep, options.sweep_seconds, limit=SWEPT_AT_ONCE),
        *(PeriodicTask("drive sagas", runner.drive_next, 0.0, limit=0) for _ in range(LANES)),
    )
