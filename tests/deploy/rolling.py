"""A shop of two containers for each process behind HAProxy, in which each container can be replaced by another version.

The load balancer asks `/health/ready`, opens a connection for each request, and sends a request whose connection was
refused to the other gateway: what ingress controllers and service meshes do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from deploy.containers import PASSWORD, SERVING, docker, images_of_others, signed_in, wait_until_healthy
from mercato.chassis.hosting.host import GATEWAY
from mercato.testing.caller import Caller
from mercato.testing.served import free_address
from mercato.testing.waiting import wait_until

REPLICAS: Final = (1, 2)
HAPROXY: Final = """\
global
    maxconn 1000
defaults
    mode http
    timeout connect 2s
    timeout client 60s
    timeout server 60s
    timeout check 5s
    option http-server-close
    option redispatch
    retries 3
    retry-on conn-failure
frontend shop
    bind {address}
    default_backend gateways
backend gateways
    option httpchk GET /health/ready
    default-server check inter 100ms fall 1 rise 2
    server first {first}
    server second {second}
"""


class RollingShop:
    """Use it as a context manager: it starts PostgreSQL, NATS and two containers of each process at a version."""

    def __init__(self, version: str) -> None:
        self._id = f"mercato-rolling-{os.getpid()}"
        self._version = version
        self._folder = Path(tempfile.mkdtemp(prefix="mercato-test-"))
        self._gateways = {number: free_address() for number in REPLICAS}
        self._address = free_address()
        self._started: list[str] = []
        self._balancer: subprocess.Popen[bytes] | None = None
        self._secrets = {name: os.urandom(24).hex() for name in ("POSTGRES_PASSWORD", "MERCATO_SECRET")}
        self._token = ""

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._balancer is not None:
            self._balancer.kill()
            self._balancer.wait()
        for name in reversed(self._started):
            docker("rm", "--force", "--volumes", name)
        subprocess.run(["docker", "network", "rm", self._id], capture_output=True, check=False)
        shutil.rmtree(self._folder)

    def _start(self) -> None:
        others = images_of_others()
        docker("network", "create", self._id)
        password = f"POSTGRES_PASSWORD={self._secrets['POSTGRES_PASSWORD']}"
        command = ("postgres", "-c", "max_connections=300")
        postgres = self._run("postgres", others["POSTGRES_IMAGE"], *command, options=("--env", password))
        wait_until(lambda: self._answers(postgres))
        found = PASSWORD.search(self.migrate(self._version))
        assert found is not None
        (self._folder / "nats.conf").write_text('port: 4222\njetstream {store_dir: "/data"}\ninclude ./users.conf\n')
        mounts = [
            f"--volume={self._folder}/nats.conf:/etc/nats/nats.conf:ro",
            f"--volume={self._folder}/data/environment/nats.conf:/etc/nats/users.conf:ro",
        ]
        self._run("nats", others["NATS_IMAGE"], "--config", "/etc/nats/nats.conf", options=mounts)
        names = [self._serve(name, number, self._version) for name in SERVING for number in REPLICAS]
        wait_until_healthy(names)
        self._balance()
        with Caller(f"http://{self._address}") as caller:
            wait_until(lambda: self._is_ready(caller))
            self._token = signed_in(caller, found[1])

    def _answers(self, postgres: str) -> bool:
        command = ["docker", "exec", postgres, "pg_isready", "--host=127.0.0.1", "--username=postgres"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _is_ready(self, caller: Caller) -> bool:
        assert self._balancer is not None
        assert self._balancer.poll() is None, "HAProxy has ended"
        with contextlib.suppress(OSError):
            return caller.get("/health/ready").status == 200
        return False

    def _balance(self) -> None:
        file = self._folder / "haproxy.cfg"
        first, second = (self._gateways[number] for number in REPLICAS)
        file.write_text(HAPROXY.format(address=self._address, first=first, second=second))
        self._balancer = subprocess.Popen(["haproxy", "-db", "-f", str(file)], stdout=subprocess.DEVNULL)

    def caller(self) -> Caller:
        """A client of the shop in the role of staff, through the load balancer."""
        return Caller(f"http://{self._address}", self._token)

    def migrate(self, version: str) -> str:
        """Runs `mercato migrate` of a version; gives what it prints."""
        data = self._folder / "data"
        data.mkdir(mode=0o777, exist_ok=True)
        data.chmod(0o777)  # for the user of the container
        return self._administrator(version, "migrate", "--data", "/data", "--demo")

    def audit(self, version: str) -> str:
        """What the audit of a shop at rest prints. Fails if something does not hold."""
        return self._administrator(version, "audit", "--data", "/tmp/data", "--settled", "0")

    def _administrator(self, version: str, *command: str) -> str:
        dsn = f"postgresql://postgres:{self._secrets['POSTGRES_PASSWORD']}@postgres/postgres"
        variables = (f"MERCATO_POSTGRES_DSN={dsn}", f"MERCATO_SECRET={self._secrets['MERCATO_SECRET']}")
        return docker(
            "run", "--rm", "--network", self._id, "--tmpfs", "/tmp", f"--volume={self._folder}/data:/data",
            *(f"--env={variable}" for variable in variables), f"mercato/migrate:{version}", *command,
        ).stdout  # fmt: skip

    def replace(self, name: str, number: int, version: str) -> None:
        """Stops a container, as an orchestrator does, and waits until one of a version is ready in its place."""
        docker("stop", "--time", "15", self._name(f"{name}-{number}"))
        docker("rm", self._name(f"{name}-{number}"))
        self._started.remove(self._name(f"{name}-{number}"))
        wait_until_healthy([self._serve(name, number, version)])

    def versions(self) -> Sequence[str]:
        """The version of each container that serves."""
        images = [docker("inspect", "--format", "{{.Config.Image}}", name).stdout.strip() for name in self._started]
        return [image.partition(":")[2] for image in images if image.startswith("mercato/")]

    def _name(self, name: str) -> str:
        return f"{self._id}-{name}"

    def _serve(self, name: str, number: int, version: str) -> str:
        options = [
            f"--env-file={self._folder}/data/environment/{name}.env",
            "--env=NATS_URL=nats://nats:4222",
            "--env=MERCATO_PLAINTEXT=everywhere",
            "--env=MERCATO_POOL_SIZE=4",
            "--read-only",
            "--tmpfs=/tmp",
            "--cap-drop=ALL",
        ]
        if name == GATEWAY:
            options.append(f"--publish={self._gateways[number]}:8080")
        return self._run(f"{name}-{number}", f"mercato/{name}:{version}", options=options)

    def _run(self, name: str, image: str, *command: str, options: Sequence[str]) -> str:
        full = self._name(name)
        self._started.append(full)
        docker(
            "run", "--detach", "--name", full, "--network", self._id, "--network-alias", name, *options, image, *command
        )  # fmt: skip
        return full
