"""The owner's side of the processes of `mercato up --split`: it starts, watches, restarts and stops them.

Each runs `mercato serve` (`instance.py`). One that ends by itself is restarted, at once the first time and with a
growing pause after that. All gateways accept from one listening socket, which they inherit: while one of them is down,
the others answer; while all are, connections wait. Any of them may answer a request, so they share their metrics. The
owner writes the logs of all processes as one log, each line with the name of its process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, Self

import msgspec

from mercato import topology
from mercato.chassis.hosting import variables
from mercato.chassis.hosting.host import GATEWAY
from mercato.chassis.observability.telemetry import MULTIPROCESS_VARIABLE
from mercato.cli.grpc_port import GrpcPort
from mercato.cli.logs import OWNER, log_file
from mercato.cli.options import Carrier
from mercato.cli.shared_metrics import MetricsFolder
from mercato.cli.starting import Auth, CannotStart
from mercato.cli.worker import ask_to_stop
from mercato.embedded_postgres import processes
from mercato.embedded_postgres.folder import write_atomically
from mercato.placements import Placement, ProcessPlan

FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 5.0
STEADY_SECONDS: Final = 10.0
"""A process that has run for so long gets the first pause again."""
STOP_SECONDS: Final = 9.0
"""How long a process may take to stop; then it is killed."""
GATEWAY_STOP_SECONDS: Final = 4.0
LINE_BYTES: Final = 1024 * 1024
RECORD: Final = "processes.json"
MOST_REPLICAS: Final = 16
LOOPBACK: Final = "127.0.0.1"
ADMINISTRATORS: Final = ("MERCATO_POSTGRES_DSN", "MERCATO_SECRET")
"""Variables of the owner that no other process may inherit."""
PORTS: Final = range(20_000, 32_768)
"""For addresses that stay when a process is restarted: below the system's range of ephemeral ports."""


class Shared(NamedTuple):
    """What all gateways inherit: two file descriptors, and the folder of metrics if there are several of them."""

    listener: int
    counts: int
    metrics: MetricsFolder | None

    @property
    def descriptors(self) -> tuple[int, int]:
        return self.listener, self.counts


class InstanceAssignment(msgspec.Struct, frozen=True):
    """What the owner sends to a process: what it serves, and with which settings."""

    hosts: tuple[str, ...]
    """Services, and `gateway`."""
    host: str
    auth: Auth
    environment: Mapping[str, str]
    listener: int | None = None
    """The file descriptor of a listening socket for clients; None: a free port on `host`."""
    counts: int | None = None
    """That of the file in which the gateways count the requests of each caller together."""
    grpc: GrpcPort | None = None


class RunningProcesses(msgspec.Struct, frozen=True):
    """The addresses of the processes of the shop in a data folder, for commands that inspect them."""

    owner: processes.ServerProcess
    """The process that starts them. If it has ended, the shop was killed, and the record is obsolete."""
    nats_url: str = ""
    services: str = ""
    """The value of MERCATO_SERVICES, if they call each other over HTTP or gRPC."""
    urls: Mapping[str, str] = {}
    """The URL at which each ready process serves clients, health and metrics, by its name; the owner only metrics."""
    diagnostics: Mapping[str, str] = {}
    """The address at which each ready process answers the operator, by its name."""
    transport: Carrier | Literal[""] = ""
    """How they call each other; empty for a shop that is not split."""


class ProcessFailed(Exception):
    """A sentence about a process that could not start."""


def with_replicas(placement: Placement, wanted: str) -> Placement:
    """The placement with the replicas of `--replicas`: `orders=2,gateway=2`. Raises `CannotStart`."""
    processes = dict(placement.processes)
    for entry in filter(None, map(str.strip, wanted.split(","))):
        name, _, number = entry.partition("=")
        if name not in processes:
            raise CannotStart(f"--replicas names {name!r}, and there are {', '.join(processes)}")
        if not number.isascii() or not number.isdigit() or not 1 <= int(number) <= MOST_REPLICAS:
            raise CannotStart(f"--replicas has {entry!r}: write it as {name}=2, with a number up to {MOST_REPLICAS}")
        processes[name] = msgspec.structs.replace(processes[name], replicas=int(number))
    return msgspec.structs.replace(placement, processes=processes)


def planned(
    placement: Placement, transport: Carrier, listener: socket.socket, counts: int, metrics: MetricsFolder | None
) -> list[SupervisedProcess]:
    """All processes of a placement, before their assignments. Gateways will listen on `listener`.

    `counts`: the file in which gateways count together; `metrics`: the folder of their metrics, if there are several.
    """
    shared = Shared(listener.fileno(), counts, metrics)
    return [
        SupervisedProcess(name, plan, number, transport, shared if GATEWAY in plan.hosts else None)
        for name, plan in placement.processes.items()
        for number in range(plan.replicas)
    ]


def has_several_gateways(placement: Placement) -> bool:
    """Whether several processes answer clients on one port."""
    return sum(plan.replicas for plan in placement.processes.values() if GATEWAY in plan.hosts) > 1


def assign(
    made: Sequence[SupervisedProcess],
    placement: Placement,
    given: Mapping[str, Mapping[str, str]],
    *,
    data: Path,
    host: str,
    auth: Auth,
    nats_url: str | None,
    grpc: GrpcPort | None = None,
) -> None:
    """Assigns to each process of a placement what it serves. `given` are the variables of each service and the gateway.

    Each has a file of its log in the data folder. Gateways listen on `host`, the others on loopback. With `nats_url`
    None, they call each other by their addresses. Gateways answer clients at `grpc`.
    """
    where: Mapping[str, Sequence[str]] = _addresses(placement) if nats_url is None else {}
    common = {"NATS_URL": nats_url or "", "MERCATO_SERVICES": _listed(placement, where)}
    for instance in made:
        variables = dict(common)
        for hosted in instance.plan.hosts:
            variables.update(given[hosted])
        variables["MERCATO_DIAGNOSTICS_ADDRESS"] = f"{LOOPBACK}:0"
        variables["MERCATO_LOG_FILE"] = str(log_file(data, instance.name))
        variables["MERCATO_RPC_TRANSPORT"] = instance.transport
        if instance.process in where:
            variables["MERCATO_RPC_ADDRESS"] = where[instance.process][instance.number]
        instance.assign(
            InstanceAssignment(
                hosts=instance.plan.hosts,
                host=host if instance.is_gateway else LOOPBACK,
                auth=auth,
                environment=variables,
                listener=instance.shared and instance.shared.listener,
                counts=instance.shared and instance.shared.counts,
                grpc=grpc if instance.is_gateway else None,
            )
        )


def write_record(
    file: Path,
    nats_url: str = "",
    services: str = "",
    transport: Carrier | Literal[""] = "",
    **found: Mapping[str, str],
) -> None:
    """Writes the record of the processes that this one starts, itself included; see `RunningProcesses`."""
    owner = processes.process_at(os.getpid())
    assert owner is not None
    record = RunningProcesses(owner, nats_url, services, transport=transport, **found)
    write_atomically(file, msgspec.json.encode(record))


@contextlib.contextmanager
def recorded(data: Path, diagnostics: Mapping[str, str]) -> Generator[None]:
    """Records the processes of a shop that is not split, for the time of the block."""
    file = data / RECORD
    write_record(file, diagnostics=diagnostics)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


class ProcessFile:
    """The file with the addresses of the processes, for the time of a `with` block; each `write` updates it."""

    def __init__(self, data: Path, made: Sequence[SupervisedProcess], metrics: str) -> None:
        """`metrics`: the URL of those of this process, which is the owner."""
        self._file = data / RECORD
        self._made = made
        self._metrics = metrics

    def write(self) -> None:
        assignment = self._made[0].assignment
        assert assignment is not None
        environment = assignment.environment
        urls = {OWNER: self._metrics, **{instance.name: instance.url for instance in self._made if instance.url}}
        diagnostics = {instance.name: instance.diagnostics for instance in self._made if instance.diagnostics}
        write_record(
            self._file,
            environment["NATS_URL"],
            environment["MERCATO_SERVICES"],
            self._made[0].transport,
            urls=urls,
            diagnostics=diagnostics,
        )

    def __enter__(self) -> Self:
        self.write()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.unlink(missing_ok=True)


def read_record(data: Path) -> RunningProcesses | None:
    """The addresses of the processes of a shop; None if it does not run, or runs in one process."""
    try:
        record = msgspec.json.decode((data / RECORD).read_bytes(), type=RunningProcesses)
    except (OSError, msgspec.MsgspecError):
        return None
    return record if processes.process_at(record.owner.pid) == record.owner else None


def _addresses(placement: Placement) -> Mapping[str, Sequence[str]]:
    """The address at which each replica accepts calls, by the name of the process."""
    used: set[str] = set()
    return {
        name: [_address(used) for _ in range(plan.replicas)]
        for name, plan in placement.processes.items()
        if plan.hosts != (GATEWAY,)
    }


def _address(used: set[str]) -> str:
    """A free address on loopback, outside of the ephemeral ports: it stays free while its process is down."""
    while True:
        port = random.choice(PORTS)
        chosen = f"{LOOPBACK}:{port}"
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((LOOPBACK, port))
            if chosen not in used:
                used.add(chosen)
                return chosen


def _listed(placement: Placement, where: Mapping[str, Sequence[str]]) -> str:
    """The addresses of all services, in the form of MERCATO_SERVICES."""
    found: dict[str, list[str]] = {}
    for name, plan in placement.processes.items():
        for service in topology.SERVICES.keys() & set(plan.hosts):
            found.setdefault(service, []).extend(where.get(name, ()))
    return "; ".join(f"{service}={','.join(places)}" for service, places in found.items() if places)


class SupervisedProcess:
    """One process, over all its restarts. `name` is for people: `orders.2`.

    It begins to import at once, which is the longest part of its start, and waits for `assign`.
    """

    def __init__(self, process: str, plan: ProcessPlan, number: int, transport: Carrier, shared: Shared | None) -> None:
        self.name = f"{process}.{number + 1}" if plan.replicas > 1 else process
        self.process = process
        self.plan = plan
        self.transport: Carrier = transport
        self.number = number
        """Among the replicas, from 0."""
        self.shared = shared
        self.assignment: InstanceAssignment | None = None
        self.url = ""
        """The URL at which it serves clients, once it is ready."""
        self.diagnostics = ""
        """The address at which it answers the operator, once it is ready."""
        self.pid: int | None = None
        self.starts = 0
        self._assigned = asyncio.Event()
        self._ready = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._is_stopping = False

    @property
    def is_gateway(self) -> bool:
        return GATEWAY in self.plan.hosts

    def assign(self, assignment: InstanceAssignment) -> None:
        """Sets the assignment, which the process gets at each start."""
        self.assignment = assignment
        self._assigned.set()

    async def ready(self) -> None:
        """Returns when it is ready for the first time."""
        await self._ready.wait()

    async def run(self, changed: Callable[[SupervisedProcess], None]) -> None:
        """Keeps the process running until `stop`. Raises `ProcessFailed` if it ends before it was ever ready."""
        pause = FIRST_PAUSE_SECONDS
        while not self._is_stopping:
            began = time.monotonic()
            last_words = await self._live(changed)
            self.pid, self.url, self.diagnostics = None, "", ""
            if self._is_stopping:
                return
            if not self._ready.is_set():
                raise ProcessFailed(last_words.removeprefix("mercato: ") or f"{self.name} ended before it was ready")
            if time.monotonic() - began > STEADY_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            _log(self.name, event="process_ended", how=self._ending(), again_after_seconds=pause, level="warning")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _live(self, changed: Callable[[SupervisedProcess], None]) -> str:
        """Starts the process and waits for its end; gives the last line that it wrote."""
        metrics = self.shared.metrics if self.shared else None
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "mercato.cli.instance", self.transport, ",".join(self.plan.hosts),
            self.name,
            env=variables.for_child(ADMINISTRATORS, **({MULTIPROCESS_VARIABLE: metrics.path} if metrics else {})),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            pass_fds=self.shared.descriptors if self.shared else (), start_new_session=True, limit=LINE_BYTES,
        )  # fmt: skip
        self._process = process
        self.pid = process.pid
        self.starts += 1
        try:
            _, _, last, _ = await asyncio.gather(
                self._send_assignment(process), self._follow(process, changed), self._relay(process), process.wait()
            )
        finally:
            if process.returncode is None:
                process.kill()
            elif metrics:
                metrics.note_end(process.pid)
        return last

    async def _send_assignment(self, process: asyncio.subprocess.Process) -> None:
        """Sends the assignment, unless the process ends before there is one."""
        assert process.stdin is not None
        assigned, ended = asyncio.create_task(self._assigned.wait()), asyncio.create_task(process.wait())
        await asyncio.wait({assigned, ended}, return_when=asyncio.FIRST_COMPLETED)
        assigned.cancel()
        ended.cancel()
        if self._is_stopping or self.assignment is None:
            ask_to_stop(process)
        else:
            process.stdin.write(msgspec.json.encode(self.assignment) + b"\n")

    async def _follow(self, process: asyncio.subprocess.Process, changed: Callable[[SupervisedProcess], None]) -> None:
        """Reads the output of `serve --json`."""
        assert process.stdout is not None
        async for line in process.stdout:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event["event"] == "ready":
                    self.url, self.diagnostics = event["url"], event["diagnostics"]
                    self._ready.set()
                    changed(self)

    async def _relay(self, process: asyncio.subprocess.Process) -> str:
        assert process.stderr is not None
        last = ""
        async for line in process.stderr:
            last = line.decode(errors="replace").rstrip()
            if self._ready.is_set():
                _relay(self.name, last)
        return last

    async def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Asks the process to stop, and kills it when it takes longer than so many seconds."""
        self._is_stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        ask_to_stop(process)
        if self.assignment is None:
            process.kill()  # it has no work yet that it could finish
        try:
            async with asyncio.timeout(seconds):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    def _ending(self) -> str:
        code = self._process.returncode if self._process else None
        assert code is not None
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


class Split:
    """All processes of a shop. `start` them, `assign` each its work, and `stop` them."""

    def __init__(self, instances: Sequence[SupervisedProcess]) -> None:
        self.instances = instances
        self._lives: list[asyncio.Task[None]] = []

    def start(self, changed: Callable[[SupervisedProcess], None], on_failure: Callable[[str], None]) -> None:
        """Keeps them running from now on.

        `changed` is called with each that becomes ready; `on_failure` gets a sentence about one that cannot start.
        """
        for instance in self.instances:
            self._lives.append(asyncio.create_task(self._keep(instance, changed, on_failure)))

    async def ready(self) -> None:
        """Returns when all are ready."""
        await asyncio.gather(*(instance.ready() for instance in self.instances))

    async def stop(self) -> None:
        """Ends all of them. A second call does nothing."""
        # The gateways first, so that the others can still finish running requests.
        gateways = [instance for instance in self.instances if instance.is_gateway]
        await asyncio.gather(*(instance.stop(GATEWAY_STOP_SECONDS) for instance in gateways))
        await asyncio.gather(*(instance.stop() for instance in self.instances))
        lives, self._lives = self._lives, []
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)

    async def _keep(
        self,
        instance: SupervisedProcess,
        changed: Callable[[SupervisedProcess], None],
        on_failure: Callable[[str], None],
    ) -> None:
        try:
            await instance.run(changed)
        except ProcessFailed as error:
            on_failure(str(error))


def _relay(name: str, line: str) -> None:
    """Writes a line of a process to the common log: a JSON object, with the name of the process."""
    if line.startswith("{"):
        _write(f'{{"process":"{name}",{line.removeprefix("{")}')
    else:
        _log(name, event="said", line=line, level="warning")


def _log(name: str, **values: object) -> None:
    _write(msgspec.json.encode({"process": name, **values}).decode())


def _write(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
