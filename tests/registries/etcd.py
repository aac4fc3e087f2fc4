"""A real etcd: a cluster on loopback, whose members a test kills and starts again."""

from __future__ import annotations

import base64
import json
import shutil
import signal
import ssl
import subprocess
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from mercato.testing.served import free_address
from mercato.testing.waiting import BOUND_SECONDS, wait_until

PROGRAM: Final = "etcd"

needs_etcd = pytest.mark.skipif(
    shutil.which(PROGRAM) is None, reason="etcd was not tried: install it: apt-get install etcd-server"
)


class Etcd:
    """Runs so many members. `tls` are a certificate and its key, for clients. Use it as a context manager."""

    def __init__(self, members: int = 1, *, tls: tuple[Path, Path] | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="mercato-etcd-"))
        self._scheme = "https" if tls else "http"
        self._tls = tls
        self._clients = [free_address() for _ in range(members)]
        self._peers = [f"http://{free_address()}" for _ in range(members)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._token = ""

    @property
    def urls(self) -> Sequence[str]:
        return [f"{self._scheme}://{address}" for address in self._clients]

    def start(self, member: int = 0) -> None:
        cluster = ",".join(f"m{index}={peer}" for index, peer in enumerate(self._peers))
        encrypted = ["--cert-file", str(self._tls[0]), "--key-file", str(self._tls[1])] if self._tls else []
        log = (self._folder / f"{member}.log").open("ab")
        with log:
            self._processes[member] = subprocess.Popen(
                [
                    PROGRAM, "--name", f"m{member}", "--data-dir", str(self._folder / str(member)),
                    "--listen-client-urls", self.urls[member], "--advertise-client-urls", self.urls[member],
                    "--listen-peer-urls", self._peers[member], "--initial-advertise-peer-urls", self._peers[member],
                    "--initial-cluster", cluster, "--logger", "zap", "--bcrypt-cost", "4", *encrypted,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def kill(self, member: int = 0) -> None:
        """`kill -9`."""
        process = self._processes.pop(member)
        process.kill()
        process.wait()

    def pause(self, member: int = 0) -> None:
        """It answers nothing, and closes no connection."""
        self._processes[member].send_signal(signal.SIGSTOP)

    def resume(self, member: int = 0) -> None:
        self._processes[member].send_signal(signal.SIGCONT)

    def forget(self, member: int = 0) -> None:
        """All that a member that was killed has kept."""
        shutil.rmtree(self._folder / str(member))
        self._token = ""

    def answers(self, member: int = 0) -> bool:
        assert self._processes[member].poll() is None, (self._folder / f"{member}.log").read_text()[-2_000:]
        try:
            self.call("/v3/maintenance/status", {}, member)
            self.call("/v3/kv/range", {"key": _encoded("/")}, member)
        except OSError:
            return False
        return True

    def call(self, path: str, body: Mapping[str, Any], member: int = 0) -> dict[str, Any]:
        """As the administrator."""
        headers = {"Authorization": self._token} if self._token else {}
        context = ssl.create_default_context(cafile=self._tls[0]) if self._tls else None
        request = urllib.request.Request(self.urls[member] + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=5, context=context) as answer:
            return json.load(answer)

    def put(self, key: str, value: str) -> None:
        self.call("/v3/kv/put", {"key": _encoded(key), "value": _encoded(value)})

    def delete_below(self, prefix: str) -> None:
        self.call("/v3/kv/deleterange", self._below(prefix))

    def keys_below(self, prefix: str) -> Sequence[tuple[str, int]]:
        """The keys, and how often each was written."""
        found = self.call("/v3/kv/range", self._below(prefix)).get("kvs", [])
        return [(base64.b64decode(pair["key"]).decode(), int(pair["version"])) for pair in found]

    @staticmethod
    def _below(prefix: str) -> Mapping[str, str]:
        return {"key": _encoded(prefix), "range_end": _encoded(prefix[:-1] + chr(ord(prefix[-1]) + 1))}

    def require_passwords(self, user: str, password: str, prefix: str) -> None:
        """From now on it asks for one; `user` may read and write below `prefix`."""
        for name, own in (("root", "of the administrator"), (user, password)):
            self.call("/v3/auth/user/add", {"name": name, "password": own})
            self.call("/v3/auth/role/add", {"name": name})
        allowed = {"permType": 2, **self._below(prefix)}
        self.call("/v3/auth/role/grant", {"name": user, "perm": allowed})
        for name in ("root", user):
            self.call("/v3/auth/user/grant", {"user": name, "role": name})
        self.call("/v3/auth/enable", {})
        self._token = self.call("/v3/auth/authenticate", {"name": "root", "password": "of the administrator"})["token"]

    def __enter__(self) -> Etcd:
        try:
            for member in range(len(self._clients)):
                self.start(member)
            wait_until(lambda: all(self.answers(member) for member in self._processes), BOUND_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for member in list(self._processes):
            self.kill(member)
        shutil.rmtree(self._folder)


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
