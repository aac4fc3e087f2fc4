"""A PostgreSQL server as of an operator: with another version, encoding and defaults than the embedded one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlencode

from mercato.embedded_postgres import place, processes
from mercato.embedded_postgres.guarded import GUARD

from .waiting import wait_until

FOLDERS: Final = {16: "pginstall", 18: "pginstall18"}
"""The folder of each major version in the wheel."""
ADMIN: Final = "operator"
PASSWORD: Final = "a-password"  # of a server that only this run can reach


class ForeignServer:
    """One server, started by `with`; `admin_dsn` is its superuser's. `settings` are those of its command line.

    Its template has the encoding SQL_ASCII. A guard ends it with this process.
    """

    def __init__(self, settings: Mapping[str, str], version: int = 16) -> None:
        self._binaries = place.find_binaries().parents[1] / FOLDERS[version] / "bin"
        self._account = place.chosen_account() if os.geteuid() == 0 else None
        self._settings = settings
        self._folder = Path()
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def admin_dsn(self) -> str:
        where = urlencode({"host": str(self._folder), "port": 5432})
        return f"postgresql://{ADMIN}:{PASSWORD}@/postgres?{where}"

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="mercato-test-"))
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        cluster, password = self._folder / "cluster", self._folder / "password"
        password.write_text(PASSWORD)
        if self._account is not None:
            for path in (self._folder, password):
                os.chown(path, self._account.uid, self._account.gid)
        subprocess.run(
            [
                self._binaries / "initdb", f"--pgdata={cluster}", f"--username={ADMIN}", f"--pwfile={password}",
                "--auth=scram-sha-256", "--no-locale", "--encoding=SQL_ASCII", "--no-sync",
            ],
            check=True, capture_output=True, cwd="/", env={"LC_ALL": "C"},
            user=self._account and self._account.uid, group=self._account and self._account.gid,
            extra_groups=None if self._account is None else [],
        )  # fmt: skip
        ids = ("-", "-") if self._account is None else (str(self._account.uid), str(self._account.gid))
        options = {"listen_addresses": "", "port": "5432", "unix_socket_directories": str(self._folder)}
        command = [str(self._binaries / "postgres"), "-D", str(cluster)]
        for name, value in {**options, **self._settings}.items():
            command += ["-c", f"{name}={value}"]
        with (self._folder / "log").open("wb") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARD), *ids, *command],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd="/", env={"LC_ALL": "C", "TZ": "UTC"},
            )  # fmt: skip
        assert self._guard.stdout is not None
        pid = int(self._guard.stdout.readline().split()[1])
        wait_until(lambda: processes.takes_connections(cluster, pid))

    def __exit__(self, *_: object) -> None:
        if self._guard is not None:
            self._guard.communicate()  # closes its input, which ends the server
        shutil.rmtree(self._folder, ignore_errors=True)
