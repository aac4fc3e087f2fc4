"""`mercato call orders.get '{"id": 1001}'`: one operation of a running shop, in the role of staff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from mercato import topology
from mercato.chassis.contract import Actor, Operation, ServiceError, current
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.client import Connector, acting
from mercato.cli import databases
from mercato.cli.operator import operating
from mercato.cli.progress import fail, show
from mercato.cli.starting import CannotStart
from mercato.contracts.roles import STAFF


def call(name: str, request: str, data: Path, *, as_json: bool) -> int:
    """Calls an operation and prints its answer as JSON; gives 1 for an error of the operation."""
    return databases.run(lambda: _call(name, request, data, as_json=as_json))


async def _call(name: str, request: str, data: Path, *, as_json: bool) -> int:
    operation = _operation(name)
    try:
        asked = msgspec.json.decode(request, type=operation.request)
    except (msgspec.MsgspecError, ValueError) as error:
        raise CannotStart(
            f"the request of {name} is not valid: {str(error).rstrip('.')}; {_shape(operation)}"
        ) from error
    clock = SystemClock()
    async with operating(data) as operator:
        connector = Connector(clock, Telemetry())
        client = connector.client(topology.SERVICES[operation.service], operator.remote.transport(topology.OPERATOR))
        token = current.set(acting(Actor(STAFF), clock=clock, seconds=operation.deadline_ms / 1_000))
        try:
            answer = await getattr(client, operation.name)(asked)
        except ServiceError as error:
            if as_json:
                show(json.dumps({"error": {"code": error.code, "message": str(error)}}))
            else:
                fail(f"{error.code}: {error}")
            return 1
        finally:
            current.reset(token)
            await connector.close()
    show(msgspec.json.format(msgspec.json.encode(answer), indent=0 if as_json else 2).decode())
    return 0


def _operation(name: str) -> Operation[Any, Any]:
    service, _, operation = name.partition(".")
    if service not in topology.SERVICES:
        raise CannotStart(f"there is no service {service!r}: choose of {', '.join(topology.SERVICES)}")
    operations = topology.SERVICES[service].operations
    if operation not in operations:
        raise CannotStart(f"{service} has no operation {operation!r}: choose of {', '.join(sorted(operations))}")
    return operations[operation]


def _shape(operation: Operation[Any, Any]) -> str:
    fields = msgspec.structs.fields(operation.request)
    needed = [field.encode_name for field in fields if field.required]
    others = [field.encode_name for field in fields if not field.required]
    parts = [f"it needs {', '.join(needed)}"] if needed else []
    parts += [f"it may have {', '.join(others)}"] if others else []
    return " and ".join(parts) or "it has no fields"
