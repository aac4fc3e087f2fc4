"""PostgreSQL as operators run it on several machines: Patroni on two nodes, with etcd and synchronous replication.

Each node is a Patroni and the PostgreSQL that it runs, with ports of its own on loopback. Clients name both nodes in
one DSN, which leads to the primary. Patroni and PostgreSQL run under the guard of the embedded server, so that no
process of them is left when a test run is killed.

    PatroniCluster ──► etcd
         ├── pipes ──► guard.py ──► patroni ──► postgres      node "one"
         └── pipes ──► guard.py ──► patroni ──► postgres      node "two"

A node that dies is all of its processes at once, by SIGKILL, as when its machine loses power. Its disk stays: `start`
is the machine that comes back.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from mercato.embedded_postgres import place, processes
from mercato.embedded_postgres.guarded import GUARD
from mercato.testing.waiting import wait_until
from registries.etcd import PROGRAM as ETCD, Etcd

VARIABLE: Final = "MERCATO_TEST_PATRONI"
"""Names the program `patroni`, where it is not on the PATH."""
SCOPE: Final = "mercato"
ADMIN: Final = "operator"
PASSWORD: Final = "a-password"  # of servers that only this run can reach
TTL_SECONDS: Final = 20
"""The least that Patroni takes: how long a primary that has died is waited for."""
LOOP_SECONDS: Final = 5
PORTS: Final = range(20_000, 32_000)
"""Below those that the kernel gives to clients: a node that comes back finds its ports free."""
ANSWER_SECONDS: Final = 5.0
STOP_SECONDS: Final = 60.0


def program() -> str | None:
    """The path of `patroni`; None where it is not installed."""
    return shutil.which(os.environ.get(VARIABLE) or "patroni")


def why_not() -> str:
    """Why no Patroni can be started here, with what installs it; empty if it can."""
    if not sys.platform.startswith("linux"):
        return "fail-over was not tried: it looks into /proc"
    if shutil.which(ETCD) is None:
        return "fail-over was not tried: install etcd: apt-get install etcd-server"
    install = (
        "/usr/bin/python3 -m venv /opt/patroni && "
        "/opt/patroni/bin/pip install 'patroni[etcd3]==4.1.5' 'psycopg[binary]', "
        f"and set {VARIABLE}=/opt/patroni/bin/patroni"
    )
    if (path := program()) is None:
        return f"fail-over was not tried: install Patroni in an environment of its own: {install}"
    if not _runs(path):
        return f"fail-over was not tried: the account of PostgreSQL cannot run {path}: {install}"
    return ""


def _account() -> place.Account | None:
    """The account that PostgreSQL runs as; None: this one."""
    return place.chosen_account() if os.geteuid() == 0 else None


def _runs(path: str) -> bool:
    account = _account()
    own: dict[str, Any] = {} if account is None else {"user": account.uid, "group": account.gid, "extra_groups": []}
    try:
        done = subprocess.run([path, "--version"], capture_output=True, cwd="/", env={}, check=False, **own)
    except OSError:
        return False
    return done.returncode == 0


def _free_port() -> int:
    """A port on loopback that was free a moment ago."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


class Node:
    """One machine: a Patroni, and the PostgreSQL that it runs."""

    def __init__(self, name: str, folder: Path, configuration: Mapping[str, Any]) -> None:
        self.name = name
        self.cluster = folder / "cluster"
        self.port, self.rest_port = _free_port(), _free_port()
        self.memory: set[int] = set()
        """The shared memory that PostgreSQL has had: one that is killed leaves it."""
        self._account = _account()
        self._folder = folder
        self._guard: subprocess.Popen[bytes] | None = None
        self._patroni: processes.ServerProcess | None = None
        folder.mkdir(mode=0o700)
        self.file = folder / "patroni.json"
        self.file.write_text(json.dumps(self._configured(configuration)))
        if self._account is not None:
            for path in (folder, self.file):
                os.chown(path, self._account.uid, self._account.gid)

    def _configured(self, shared: Mapping[str, Any]) -> Mapping[str, Any]:
        account = {"username": ADMIN, "password": PASSWORD}
        return {
            **shared,
            "name": self.name,
            "restapi": {"listen": f"127.0.0.1:{self.rest_port}", "connect_address": f"127.0.0.1:{self.rest_port}"},
            "postgresql": {
                "listen": f"127.0.0.1:{self.port}",
                "connect_address": f"127.0.0.1:{self.port}",
                "data_dir": str(self.cluster),
                "bin_dir": str(place.find_binaries()),
                "pgpass": str(self._folder / "pgpass"),
                "authentication": {
                    "superuser": account,
                    "replication": {"username": "replicator", "password": PASSWORD},
                    "rewind": {"username": "rewinder", "password": PASSWORD},
                },
                "parameters": {"unix_socket_directories": "", "dynamic_shared_memory_type": "mmap"},
                "pg_hba": [
                    "host replication replicator 127.0.0.1/32 scram-sha-256",
                    "host all all 127.0.0.1/32 scram-sha-256",
                ],
            },
        }  # fmt: skip

    # -------------------------------------------------------------------------------------------------------- processes

    def start(self) -> None:
        """Starts Patroni, which starts PostgreSQL."""
        ids = ("-", "-") if self._account is None else (str(self._account.uid), str(self._account.gid))
        path = program()
        assert path is not None
        with (self._folder / "log").open("ab") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARD), *ids, path, str(self.file)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd="/",
                env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}, start_new_session=True,
            )  # fmt: skip
        assert self._guard.stdout is not None
        self._patroni = processes.process_at(int(self._guard.stdout.readline().split()[1]))

    @property
    def is_running(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    def postmaster(self) -> processes.ServerProcess | None:
        """None while no PostgreSQL runs."""
        pid = processes.postmaster_pid(self.cluster)
        return None if pid is None else processes.process_at(pid)

    def postgres(self) -> Sequence[processes.ServerProcess]:
        """All processes of PostgreSQL."""
        return processes.serving(self.cluster)

    def kill(self) -> None:
        """The machine dies: all processes at once."""
        postmaster = self.postmaster()
        self.note_memory()
        for process in filter(None, (postmaster, self._patroni, *self.postgres())):
            processes.send(process, signal.SIGKILL)
        self._reap()

    def kill_postgres(self) -> None:
        """`kill -9` of the postmaster; its children end by themselves."""
        postmaster = self.postmaster()
        assert postmaster is not None
        self.note_memory()
        processes.send(postmaster, signal.SIGKILL)

    def signal_patroni(self, number: signal.Signals) -> None:
        """To Patroni alone."""
        assert self._patroni is not None
        processes.send(self._patroni, number)

    def signal_postgres(self, number: signal.Signals) -> None:
        """To all processes of PostgreSQL: a SIGSTOP is a machine that stands still."""
        for process in self.postgres():
            processes.send(process, number)

    def ask_to_stop(self) -> None:
        """Ends the input of the guard, which stops Patroni, and what that leaves running."""
        self.note_memory()
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()

    def stopped(self) -> None:
        """Waits for the end of all processes."""
        self._reap()
        wait_until(lambda: not self.postgres(), STOP_SECONDS)

    def _reap(self) -> None:
        if self._guard is None:
            return
        for stream in (self._guard.stdin, self._guard.stdout):
            if stream is not None:
                stream.close()
        try:
            self._guard.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:  # only after a failure of the guard
            self._guard.kill()
            self._guard.wait()
        self._guard = None

    def note_memory(self) -> None:
        """Notes the shared memory of the server that runs: the last number of a line of its pid file is the id."""
        try:
            line = (self.cluster / "postmaster.pid").read_text().splitlines()[6]
            self.memory.add(int(line.split()[1]))
        except (OSError, IndexError, ValueError):
            pass

    # ----------------------------------------------------------------------------------------------------- its REST API

    def answers(self, path: str) -> bool:
        """Whether a request is answered with 200, as a load balancer asks."""
        try:
            return self._get(path)[0] == 200
        except OSError:
            return False

    def members(self) -> Mapping[str, Mapping[str, Any]]:
        """The nodes as this one sees them, by name; none while it does not answer."""
        try:
            _, body = self._get("/cluster")
        except OSError:
            return {}
        return {member["name"]: member for member in json.loads(body)["members"]}

    def patch(self, path: str, body: Mapping[str, Any]) -> None:
        """As the administrator."""
        url = f"http://127.0.0.1:{self.rest_port}{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), method="PATCH")
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            assert answer.status == 200

    def _get(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.rest_port}{path}", timeout=ANSWER_SECONDS) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")


class PatroniCluster:
    """Two nodes and an etcd in `folder`, which the account of PostgreSQL can enter. Use it as a context manager.

    `settings` are added to those that all nodes share (`bootstrap.dcs`), `parameters` to those of PostgreSQL.
    """

    def __init__(
        self, folder: Path, *, settings: Mapping[str, Any] | None = None, parameters: Mapping[str, str] | None = None
    ) -> None:
        self._folder = folder / "patroni"
        self._etcd = Etcd()
        self._settings = settings or {}
        self._parameters = parameters or {}
        self.nodes: Mapping[str, Node] = {}

    @property
    def dsn(self) -> str:
        """The administrator's: it names both nodes, and leads to the one that takes writes."""
        return self.dsn_at(",".join(f"127.0.0.1:{node.port}" for node in self.nodes.values()))

    def dsn_at(self, hosts: str) -> str:
        return f"postgresql://{ADMIN}:{PASSWORD}@{hosts}/postgres?target_session_attrs=read-write"

    def dsn_of(self, node: Node) -> str:
        """The administrator's at this node, whatever it is."""
        return f"postgresql://{ADMIN}:{PASSWORD}@127.0.0.1:{node.port}/postgres"

    def primary(self) -> Node:
        """Waits until one node says that it is, and gives it."""
        found: list[Node] = []

        def is_found() -> bool:
            found[:] = [node for node in self.nodes.values() if node.is_running and node.answers("/primary")]
            return len(found) == 1

        wait_until(is_found, explain=self.log)
        return found[0]

    def other(self, node: Node) -> Node:
        [other] = [each for each in self.nodes.values() if each is not node]
        return other

    def is_synchronous(self) -> bool:
        """Whether a commit is on both nodes before it is acknowledged."""
        for node in self.nodes.values():
            roles = {m["role"]: m["state"] for m in node.members().values()} if node.is_running else {}
            if roles.get("sync_standby") == "streaming" and roles.get("leader") == "running":
                return True
        return False

    def wait_until_synchronous(self) -> None:
        wait_until(self.is_synchronous, explain=self.log)

    def restore(self) -> None:
        """Starts the nodes that do not run, and waits until both have each commit."""
        for node in self.nodes.values():
            if not node.is_running:
                node.start()
        self.wait_until_synchronous()

    def switch_over(self, leader: Node) -> None:
        """`patronictl switchover`: the other node becomes the primary."""
        path = program()
        assert path is not None
        control = Path(path).with_name("patronictl")
        arguments = ["-c", leader.file, "switchover", SCOPE, "--force"]
        chosen = ["--primary", leader.name, "--candidate", self.other(leader).name]
        done = subprocess.run([control, *arguments, *chosen], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def configure(self, **settings: Any) -> None:
        """Changes settings that all nodes share; None: the default of Patroni. Waits until each node has read them."""
        node = self.primary()
        node.patch("/config", settings)
        time.sleep(LOOP_SECONDS + 1)

    def log(self) -> str:
        """The last lines of each node."""
        return "\n".join(f"--- {node.name}\n{node.log()[-4_000:]}" for node in self.nodes.values())

    def _configuration(self) -> Mapping[str, Any]:
        return {
            "scope": SCOPE,
            "namespace": "/mercato-test/",
            "etcd3": {"hosts": [url.removeprefix("http://") for url in self._etcd.urls]},
            "bootstrap": {
                "dcs": {
                    "ttl": TTL_SECONDS,
                    "loop_wait": LOOP_SECONDS,
                    "retry_timeout": LOOP_SECONDS,
                    "synchronous_mode": True,
                    **self._settings,
                    "postgresql": {
                        "use_pg_rewind": True,
                        "use_slots": True,
                        "parameters": {
                            "max_connections": "100",
                            "shared_buffers": "32MB",
                            "wal_sender_timeout": "10s",
                            **self._parameters,
                        },
                    },
                },
                "initdb": [{"encoding": "UTF8"}, "no-locale", "data-checksums", "no-sync"],
            },
        }  # fmt: skip

    def __enter__(self) -> Self:
        self._etcd.__enter__()
        try:
            self._folder.mkdir(mode=0o755)
            shared = self._configuration()
            self.nodes = {name: Node(name, self._folder / name, shared) for name in ("one", "two")}
            for node in self.nodes.values():
                node.start()
            self.wait_until_synchronous()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for node in self.nodes.values():
                node.ask_to_stop()
            for node in self.nodes.values():
                node.stopped()
                _remove_memory(node.memory)
        finally:
            self._etcd.__exit__()
            shutil.rmtree(self._folder, ignore_errors=True)


def _remove_memory(ids: set[int]) -> None:
    """Removes shared memory that killed servers have left: no process uses it."""
    for number in ids:
        subprocess.run(["ipcrm", "--shmem-id", str(number)], capture_output=True, check=False)
