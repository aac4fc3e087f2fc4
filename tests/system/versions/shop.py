"""A shop of processes in which each process may be of another version, or of two at once."""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from mercato import topology
from mercato.chassis.hosting.host import GATEWAY
from mercato.cli.preparing import STAFF_EMAIL
from mercato.testing.caller import Caller
from mercato.testing.command import run_command
from mercato.testing.responses import Response
from mercato.testing.served import Served, free_address, nats_server, variables
from mercato.testing.waiting import wait_until
from system.versions.code import SERVING, THIS, Code, refused_by

SECRET: Final = "a secret of at least thirty-two characters"
METRICS_TOKEN: Final = "a token of at least thirty-two characters"
SETTINGS: Final = {
    "MERCATO_METRICS_TOKEN": METRICS_TOKEN,
    "MERCATO_POOL_SIZE": "4",
    # Two customers place all orders.
    "MERCATO_ORDERS_CUSTOMER_OPEN_ORDERS": "0",
    "MERCATO_ORDERS_CUSTOMER_HELD_UNITS": "0",
    "MERCATO_ORDERS_CUSTOMER_HELD_PERCENT": "0",
    "MERCATO_ORDERS_STAFF_OPEN_ORDERS": "0",
}
SERVED: Final = re.compile(r'^mercato_requests_total\{rpc_method="(\w+)\.\w+"\} (\S+)$', re.MULTILINE)
PASSWORD: Final = re.compile(r"password (\S+)")
VERSION: Final = re.compile(r'^mercato_build_info\{.*version="([^"]+)"', re.MULTILINE)

State = Mapping[str, Collection[Code]]
"""By the name of a process: the versions that serve it."""


class Gateways:
    """The addresses that clients take in turns, as those of a load balancer: a gateway leaves before it is stopped."""

    def __init__(self) -> None:
        self._urls: dict[Code, str] = {}
        self._turn = itertools.count()
        self._lock = threading.Lock()

    def join(self, code: Code, url: str) -> None:
        with self._lock:
            self._urls[code] = url

    def leave(self, code: Code) -> None:
        with self._lock:
            del self._urls[code]

    def url(self) -> str:
        with self._lock:
            return list(self._urls.values())[next(self._turn) % len(self._urls)]


class ShopCaller(Caller):
    """A client that sends each request on a connection of its own, to one of the gateways."""

    def __init__(self, gateways: Gateways, token: str | None) -> None:
        super().__init__(gateways.url(), token)
        self._gateways = gateways

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Response:
        with Caller(self._gateways.url(), self.token) as once:
            return once.call(method, path, body, **headers)


class Shop:
    """Use it as a context manager; `become` starts the processes of a state, and ends all others."""

    def __init__(self, databases: Databases, transport: str, codes: Sequence[Code]) -> None:
        """`codes`: the versions that it may have."""
        self.databases = databases
        self._transport = transport
        self._addresses = {name: {code: free_address() for code in codes} for name in topology.SERVICES}
        self._running: dict[tuple[str, Code], Served] = {}
        self._gateways = Gateways()
        self._stack = contextlib.ExitStack()
        self._broker = ""
        self._token: str | None = None

    def __enter__(self) -> Self:
        if self._transport == "nats":
            users = self.databases.environment / "nats.conf"
            self._broker = self._stack.enter_context(nats_server(self.databases.folder, users))
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            self._end(list(self._running))

    def become(self, state: State) -> None:
        """Returns when all of a state are ready, and the others have ended; none was ended before all were ready."""
        wanted = [(name, code) for name in SERVING for code in state[name]]
        started = [each for each in wanted if each not in self._running]
        for name, code in started:
            self._running[name, code] = self._start(name, code)
        for name, code in started:
            self._wait_until_ready(name, code)
        self._end([each for each in self._running if each not in wanted])
        with ShopCaller(self._gateways, None) as caller:
            caller.sign_in(*self.databases.staff)
            self._token = caller.token

    def address(self, name: str, code: Code) -> str:
        """Where a process of a service is called by others, where there is no broker."""
        return self._addresses[name][code]

    def _start(self, name: str, code: Code) -> Served:
        environment = {**variables(self.databases.environment / f"{name}.env"), **SETTINGS}
        if self._transport == "nats":
            environment["NATS_URL"] = f"nats://{self._broker}"
        else:
            listed = {to: ",".join(where.values()) for to, where in self._addresses.items() if to != name}
            environment["MERCATO_SERVICES"] = "; ".join(f"{to}={where}" for to, where in listed.items())
            if self._transport != "http":  # which 0.2.0 takes without NATS, and has no setting for
                environment["MERCATO_RPC_TRANSPORT"] = self._transport
            environment["MERCATO_RPC_ADDRESS"] = self._addresses.get(name, {}).get(code) or free_address()
        options = ("--auth", "required")
        return Served(name, environment=environment, options=options, package=code.package(name))

    def _wait_until_ready(self, name: str, code: Code) -> None:
        served = self._running[name, code].ready()
        answers: list[str] = [""]

        def is_ready() -> bool:
            with Caller(served.url) as caller:
                answer = caller.get("/health/ready")
            answers[:] = [answer.text]
            return answer.status == 200

        wait_until(is_ready, explain=lambda: f"{name} of {code.name} is not ready: {answers}")
        found = VERSION.search(self._metrics(name, code))
        assert found, f"{name} of {code.name} does not say which version it is"
        assert found[1] == code.version, f"{name} of {code.name} is {found[1]}"
        if name == GATEWAY:
            self._gateways.join(code, served.url)

    def _end(self, processes: Iterable[tuple[str, Code]]) -> None:
        ended = {each: self._running.pop(each) for each in processes}
        for (name, code), served in ended.items():
            if name == GATEWAY:
                with contextlib.suppress(KeyError):  # it has never been ready
                    self._gateways.leave(code)
            served.ask_to_stop()
        with contextlib.ExitStack() as stack:
            for served in ended.values():
                stack.push(served)
            codes = {f"{name} of {code.name}": served.exit_code() for (name, code), served in ended.items()}
        assert set(codes.values()) <= {0}, f"{codes}: {[served.errors[-5:] for served in ended.values()]}"

    # ----------------------------------------------------------------------------------------------------- its clients

    def caller(self) -> Caller:
        """A client in the role of staff."""
        return ShopCaller(self._gateways, self._token)

    def served(self, name: str) -> Counter[Code]:
        """How many requests of other processes each version of a service has answered."""
        codes = [code for name_, code in self._running if name_ == name]
        counted = {code: SERVED.findall(self._metrics(name, code)) for code in codes}
        return Counter({
            code: int(sum(float(count) for service, count in found if service == name))
            for code, found in counted.items()
        })  # fmt: skip

    def _metrics(self, name: str, code: Code) -> str:
        with Caller(self._running[name, code].url) as caller:
            return caller.get("/metrics", Authorization=f"Bearer {METRICS_TOKEN}").text

    def versions(self) -> State:
        """What serves now."""
        return {name: [code for name_, code in self._running if name_ == name] for name in SERVING}


class Databases:
    """The databases of a shop on a server: made by the last release, then migrated by this checkout."""

    def __init__(self, admin_dsn: str, folder: Path, before: Code) -> None:
        self.folder = folder
        self.environment = folder / "data" / "environment"
        self._administrator = {"MERCATO_POSTGRES_DSN": admin_dsn, "MERCATO_SECRET": SECRET}
        made = before.run("migrate", "--demo", "--data", str(folder / "data"), environment=self._administrator)
        THIS.run("migrate", "--data", str(folder / "data"), environment=self._administrator)
        password = PASSWORD.search(made)
        assert password, made
        self.staff = STAFF_EMAIL, password[1]
        self.refused = {name: reason for name in topology.SERVICES if (reason := refused_by(before, name))}
        """The services whose databases `before` refuses, with the reason."""
        self.orders: set[int] = set()
        """Those of all clients: at the end the shop has these orders, and no other one."""

    def audit(self) -> None:
        """Waits until everything has come to rest and holds."""
        said: list[str] = [""]

        def holds() -> bool:
            done = run_command("audit", "--settled", "0", environment=self._administrator)
            said[:] = [done.stdout + done.stderr]
            return done.returncode == 0

        wait_until(holds, explain=lambda: said[0])
