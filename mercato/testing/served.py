"""`mercato serve` as a process, what `mercato migrate` wrote for it, and a NATS server, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Self

from mercato.embedded_nats.server import program

from .caller import Caller
from .command import COMMAND, Command, clean_environment
from .waiting import BOUND_SECONDS, wait_until


def variables(file: Path) -> dict[str, str]:
    """The environment variables that `mercato migrate` wrote for one service."""
    return dict(line.split("=", 1) for line in file.read_text().splitlines())


def free_address() -> str:
    """An address on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def nats_server(folder: Path, users: Path) -> Generator[str]:
    """The address of a NATS server of the wheel, with the users that `mercato migrate` wrote. Its files: `folder`."""
    address = free_address()
    configuration = folder / "server.conf"
    configuration.write_text(f'listen: "{address}"\ninclude "{os.path.relpath(users, folder)}"\n')
    process = subprocess.Popen([str(program()), "-c", str(configuration)], stderr=subprocess.DEVNULL)
    try:
        yield address
    finally:
        process.terminate()
        process.wait(BOUND_SECONDS)


def _imported_from(package: Path | None) -> Mapping[str, str]:
    """What makes an interpreter import `mercato` from a folder: `-m` also looks into the current one."""
    return {} if package is None else {"PYTHONPATH": str(package)}


class Served:
    """A run of `mercato serve`. Use it as a context manager."""

    def __init__(
        self,
        *names: str,
        environment: Mapping[str, str],
        options: tuple[str, ...] = (),
        host: str = "127.0.0.1",
        inside: tuple[str, ...] = (),
        package: Path | None = None,
    ) -> None:
        """`inside`: the prefix of a command that runs on another host.

        `package`: the folder of the `mercato` that runs, where it is not that of this checkout.
        """
        self.url: str = ""
        self.grpc: str = ""
        """The address of its gRPC port, if it has one."""
        self._callers: list[Caller] = []
        self.lines: list[str] = []
        self.errors: list[str] = []
        arguments = ["serve", *names, "--host", host, "--port", "0", "--json", *options]
        self.environment: Mapping[str, str] = {**clean_environment(), **environment, **_imported_from(package)}
        self._process = (
            subprocess.Popen(
                [*inside, *COMMAND, *arguments],
                env=self.environment,
                cwd=package,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            if inside or package
            else Command(arguments, environment=self.environment)
        )
        self.pid = self._process.pid
        self._readers = [
            threading.Thread(target=self._read, args=(self._process.stdout, self.lines), daemon=True),
            threading.Thread(target=self._read, args=(self._process.stderr, self.errors), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any, into: list[str]) -> None:
        for line in stream:
            into.append(line.rstrip("\n"))
            event: dict[str, Any] = json.loads(line) if into is self.lines else {}
            if event.get("event") == "ready":
                self.grpc = str(event.get("grpc", ""))
                self.url = str(event["url"])

    def ready(self) -> Self:
        wait_until(lambda: self.url or self._process.poll() is not None, BOUND_SECONDS)
        assert self.url, self.errors
        return self

    def caller(self, token: str | None = None) -> Caller:
        """A client of this process, whose connection is closed at the end of this run at the latest."""
        self._callers.append(Caller(self.url, token))
        return self._callers[-1]

    def ask_to_stop(self) -> None:
        """SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """`kill -9`."""
        self._process.kill()

    def exit_code(self) -> int:
        """Waits for the end."""
        code = self._process.wait(BOUND_SECONDS)
        for reader in self._readers:
            reader.join(BOUND_SECONDS)
        return code

    def refusal(self) -> str:
        """The one sentence of a refused start."""
        assert self.exit_code() == 1, self.errors
        complaints = [line for line in self.errors if not line.startswith("{")]
        assert len(complaints) == 1, self.errors
        return complaints[0].removeprefix("mercato: ")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for caller in self._callers:
            caller.connection.close()
        for reader in self._readers:
            reader.join(BOUND_SECONDS)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
