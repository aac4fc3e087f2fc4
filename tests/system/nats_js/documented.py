"""The programs of `docs/events.md`, as they stand there, in processes of their own."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit

from mercato.testing.command import ROOT, clean_environment
from mercato.testing.waiting import BOUND_SECONDS

DOCUMENT: Final = (ROOT / "docs" / "events.md").read_text()
BLOCK: Final = re.compile(r"^\*\*(\S+)\*\*\n\n```(?:python|js)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
PROGRAMS: Final = dict(BLOCK.findall(DOCUMENT))
"""The text of each program, by the name of its file."""
CHUNK_BYTES: Final = 65_536


def write(name: str, folder: Path, packages: Path | None) -> Path:
    """Writes a program into a folder; `packages` are those of JavaScript."""
    if packages is not None:
        (folder / "node_modules").symlink_to(packages)
    file = folder / name
    file.write_text(PROGRAMS[name])
    return file


class Program:
    """A run of a program, in its own folder. Use it as a context manager, whose end is `kill -9`."""

    def __init__(self, file: Path, environment: Mapping[str, str]) -> None:
        self.lines: list[str] = []
        """What it has printed."""
        self._process = subprocess.Popen(
            [sys.executable if file.suffix == ".py" else "node", file.name],
            cwd=file.parent,
            env={**clean_environment(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        self.lines.extend(iter(self._process.stdout.readline, ""))

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def exit_code(self) -> int:
        """Waits for its end."""
        return self._process.wait(BOUND_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join(BOUND_SECONDS)
        if self._process.stdout is not None:
            self._process.stdout.close()


class AcknowledgementsHeld:
    """A proxy in front of NATS. From the first acknowledgement behind `awaited` on, it passes nothing to the server.

    `held` is set then: the client has stored the effect of the message, and the server does not know. Use it as a
    context manager; it serves one connection.
    """

    def __init__(self, url: str, awaited: bytes) -> None:
        parts = urlsplit(url)
        assert parts.port is not None
        self._server = ("127.0.0.1", parts.port)
        self._awaited = awaited
        self._is_awaited = False
        self.held = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = url.replace(f":{parts.port}", f":{self._listener.getsockname()[1]}")
        self._sockets = [self._listener]
        self._threads = [threading.Thread(target=self._serve, daemon=True)]

    def _serve(self) -> None:
        try:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._server)
        except OSError:
            return  # it is closed
        self._sockets += [client, server]
        self._threads.append(threading.Thread(target=self._answer, args=(server, client), daemon=True))
        self._threads[-1].start()
        with contextlib.suppress(OSError):  # one of them is closed
            while data := client.recv(CHUNK_BYTES):
                if self._is_awaited and b"$JS.ACK." in data:
                    self.held.set()
                if not self.held.is_set():
                    server.sendall(data)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(CHUNK_BYTES):
                self._is_awaited = self._is_awaited or self._awaited in data
                client.sendall(data)

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):  # the other end was faster
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(BOUND_SECONDS)
