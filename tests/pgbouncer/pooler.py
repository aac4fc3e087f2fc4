"""A real PgBouncer in transaction mode before the PostgreSQL of the tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

from mercato.chassis.postgres.dsn import with_server
from mercato.testing.served import free_address
from mercato.testing.waiting import BOUND_SECONDS, wait_until

PROGRAM: Final = "pgbouncer"
KEEPS_STATEMENTS: Final = (1, 21)
USER: Final = "nobody"
"""PgBouncer does not run as root."""
SESSIONS: Final = 3
"""Of each database: fewer than its clients, so that these meet changing ones."""


def version() -> tuple[int, ...]:
    """Of the program on the PATH; (0,) without one."""
    if shutil.which(PROGRAM) is None:
        return (0,)
    said = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.match(r"PgBouncer (\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else (0,)


needs_pgbouncer = pytest.mark.skipif(
    version() == (0,), reason="PgBouncer was not tried: install it: apt-get install pgbouncer"
)
needs_new_pgbouncer = pytest.mark.skipif(
    version() < KEEPS_STATEMENTS,
    reason="PgBouncer in transaction mode was not tried: install 1.21 or newer: apt-get install pgbouncer (Debian 13)",
)


class Pooler:
    """Runs PgBouncer for the roles of `dsns`. Use it as a context manager."""

    def __init__(self, *dsns: str, max_prepared_statements: int = 200) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="mercato-pooler-"))
        self._folder.chmod(0o755)
        self.host, _, port = free_address().rpartition(":")
        self.port = int(port)
        roles = {unquote(urlsplit(dsn).username or ""): unquote(urlsplit(dsn).password or "") for dsn in dsns}
        users = self._folder / "users.txt"
        users.write_text("".join(f'"{role}" "{password}"\n' for role, password in roles.items()))
        at = dict(parse_qsl(urlsplit(dsns[0]).query))
        file = self._folder / "pgbouncer.ini"
        keeps = f"max_prepared_statements = {max_prepared_statements}\n" if version() >= KEEPS_STATEMENTS else ""
        as_root = f"user = {USER}\n" if os.geteuid() == 0 else ""
        file.write_text(
            f"[databases]\n* = host={at['host']} port={at['port']}\n"
            f"[pgbouncer]\nlisten_addr = {self.host}\nlisten_port = {self.port}\nunix_socket_dir =\n"
            f"auth_type = scram-sha-256\nauth_file = {users}\npool_mode = transaction\n"
            f"default_pool_size = {SESSIONS}\nmax_client_conn = 200\n{keeps}{as_root}"
        )
        self._process = subprocess.Popen(
            [PROGRAM, str(file)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def dsn(self, dsn: str) -> str:
        """The same role and database, through this pooler."""
        return with_server(dsn, self.host, self.port)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def __enter__(self) -> Self:
        import socket

        def listens() -> bool:
            assert self._process.poll() is None, self._process.communicate()[0]
            with socket.socket() as probe:
                return probe.connect_ex((self.host, self.port)) == 0

        wait_until(listens, BOUND_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self._folder)
