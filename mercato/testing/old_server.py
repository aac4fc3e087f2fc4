"""A server that implements as much of PostgreSQL's protocol as it needs to report an old version."""

from __future__ import annotations

import socket
import struct
import threading
from typing import BinaryIO, Self

SSL_REQUEST = 80877103
TEXT_OID = 25


class OldServer:
    """Answers every query with its version: as a number where the query asks for that. Use it as a context manager."""

    def __init__(self, version: str = "15.4", number: str = "150004") -> None:
        self._version, self._number = version, number
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = f"postgresql://admin:secret@127.0.0.1:{self._listener.getsockname()[1]}/postgres"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, client.makefile("rb") as incoming:
                self._converse(client, incoming)

    def _converse(self, client: socket.socket, incoming: BinaryIO) -> None:
        code = 0
        while code != 3 << 16:
            length, code = struct.unpack("!ii", incoming.read(8))
            incoming.read(length - 8)
            if code == SSL_REQUEST:
                client.sendall(b"N")
        client.sendall(
            _message(b"R", struct.pack("!i", 0))
            + _message(b"S", _text("server_version") + _text(self._version))
            + _message(b"S", _text("client_encoding") + _text("UTF8"))
            + _message(b"K", struct.pack("!ii", 1, 1))
            + _message(b"Z", b"I")
        )
        value = b""
        while kind := incoming.read(1):
            body = incoming.read(struct.unpack("!i", incoming.read(4))[0] - 4)
            if kind == b"X":
                return
            if kind == b"P":
                value = (self._number if b"server_version_num" in body else self._version).encode()
            client.sendall(self._answer(kind, value))

    def _answer(self, kind: bytes, value: bytes) -> bytes:
        match kind:
            case b"P":
                return _message(b"1", b"")
            case b"D":
                column = _text("value") + struct.pack("!ihihih", 0, 0, TEXT_OID, -1, -1, 0)
                return _message(b"t", struct.pack("!h", 0)) + _message(b"T", struct.pack("!h", 1) + column)
            case b"B":
                return _message(b"2", b"")
            case b"E":
                return _message(b"D", struct.pack("!hi", 1, len(value)) + value) + _message(b"C", _text("SELECT 1"))
            case b"C":
                return _message(b"3", b"")
            case b"S" | b"H":
                return _message(b"Z", b"I") if kind == b"S" else b""
            case _:
                return b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


def _text(words: str) -> bytes:
    return words.encode() + b"\0"
