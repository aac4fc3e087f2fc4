"""Mercato in containers: its images, those of others, Compose, and containers that are replaced one after the other.

The images of others come from a registry, or are stand-ins built from packages (`tests/deploy/stand_ins`).
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from mercato import topology
from mercato.chassis.hosting.host import GATEWAY
from mercato.testing.caller import Caller
from mercato.testing.command import ROOT
from mercato.testing.served import free_address
from mercato.testing.waiting import wait_until

DOCKERFILE: Final = ROOT / "deploy/image/Dockerfile"
COMPOSE: Final = ROOT / "deploy/compose.yaml"
STAND_INS: Final = Path(__file__).parent / "stand_ins"
SERVING: Final = (GATEWAY, *topology.SERVICES)
TAG: Final = "test"
ACCOUNT: Final = "10001:10001"
CONTEXT: Final = ("LICENSE", "deploy/image", "mercato", "requirements")
"""What the images are built from, as `.dockerignore` says."""
BUILD_SECONDS: Final = 1_200.0
COMMAND_SECONDS: Final = 300.0
PASSWORD: Final = re.compile(r"password (\S+)")


def docker(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs Docker's command to its end, which must be a success."""
    command = ["docker", *arguments]
    options = {"capture_output": True, "text": True, "timeout": COMMAND_SECONDS, **options}
    done: subprocess.CompletedProcess[str] = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


def _has(*arguments: str) -> bool:
    return subprocess.run(["docker", *arguments], capture_output=True, check=False).returncode == 0


@functools.cache
def base_image() -> str:
    """The image with Python that all are built on."""
    found = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert found is not None
    return os.environ.get("MERCATO_TEST_PYTHON_IMAGE") or found[1]


@functools.cache
def missing() -> str:
    """Why containers cannot be tried here, with the commands that change it; empty where they can."""
    if shutil.which("docker") is None or not _has("info"):
        return "containers were not tried: no Docker engine answers: apt-get install docker.io, and start dockerd"
    if not _has("compose", "version"):
        return (
            "containers were not tried: docker has no `compose`: install the plugin, or build it: go mod init tools && "
            "go get -tool github.com/docker/compose/v2/cmd@v2.39.4 && "
            "go build -o ~/.docker/cli-plugins/docker-compose github.com/docker/compose/v2/cmd"
        )
    if not _has("image", "inspect", base_image()):
        return (
            f"containers were not tried: docker pull {base_image()}, or where no registry is reached: "
            "apt-get install debootstrap && sh tests/deploy/stand_ins/base.sh, and name it: "
            "MERCATO_TEST_PYTHON_IMAGE=python-stand-in"
        )
    return ""


def build(targets: Collection[str], tag: str = TAG, commit: str | None = None) -> None:
    """Builds images `mercato/TARGET:TAG` of this checkout, or of a commit.

    What a commit does not have yet of the files that build an image is that of this checkout.
    """
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as made:
        archived = {} if commit is None else _archived(commit)

        def left(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
            return None if entry.name in archived else _without_caches(entry)

        for name in CONTEXT:
            if name != "mercato" or commit is None:
                made.add(ROOT / name, name, filter=left)
        for name, content in archived.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            made.addfile(entry, io.BytesIO(content))
    for target in targets:
        context.seek(0)
        _build(
            context.getvalue(),
            "--file",
            "deploy/image/Dockerfile",
            "--target",
            target,
            "--tag",
            f"mercato/{target}:{tag}",
        )


def stand_in(name: str, image: str) -> str:
    """`image` where it is here, else the stand-in that is built for it."""
    return _stand_in(name, image, "Dockerfile", {"requirements/runtime.txt": ROOT / "requirements/runtime.txt"})


def _stand_in(name: str, image: str, file: str, copied: Mapping[str, Path]) -> str:
    if _has("image", "inspect", image):
        return image
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as made:
        made.add(STAND_INS, "tests/deploy/stand_ins", filter=_without_caches)
        for to, path in copied.items():
            made.add(path, to, filter=_without_caches)
    file = f"tests/deploy/stand_ins/{file}"
    _build(context.getvalue(), "--file", file, "--target", name, "--tag", f"{name}-stand-in")
    return f"{name}-stand-in"


def images_of_others() -> Mapping[str, str]:
    """By the variables of `deploy/compose.yaml`."""
    return {
        "POSTGRES_IMAGE": stand_in("postgres", "postgres:18"),
        "NATS_IMAGE": stand_in("nats", "nats:2.12-alpine"),
    }


OBSERVERS: Final[Mapping[str, str]] = {
    "prometheus": "prom/prometheus:v3.5.0",
    "jaeger": "jaegertracing/jaeger:2.13.0",
    "collector": "otel/opentelemetry-collector-contrib:0.150.0",
}
"""The services of the profile `observability` that are tried, and their images. There is no stand-in for Grafana's."""


@functools.cache
def missing_observers() -> str:
    """Why the profile `observability` cannot be tried here, with the commands that change it; empty where it can."""
    absent = [image for image in OBSERVERS.values() if not _has("image", "inspect", image)]
    if not absent or shutil.which("jaeger"):
        return ""
    return (
        f"the profile `observability` was not tried: docker pull {' '.join(absent)}, or where no registry is reached, "
        "build Jaeger, and put it on the PATH: go mod init tools && "
        "go get -tool github.com/jaegertracing/jaeger/cmd/jaeger@v1.76.0 && "
        "CGO_ENABLED=0 go build -o jaeger github.com/jaegertracing/jaeger/cmd/jaeger"
    )


def images_of_observers() -> Mapping[str, str]:
    """By the variables of `deploy/compose.yaml`."""
    found = shutil.which("jaeger")
    program = {} if found is None else {"jaeger": Path(found)}
    return {
        f"{name.upper()}_IMAGE": _stand_in(name, image, "observability.Dockerfile", program)
        for name, image in OBSERVERS.items()
    }


def _build(context: bytes, *arguments: str) -> None:
    base = f"PYTHON_IMAGE={base_image()}"
    docker(
        "build", "--quiet", "--build-arg", base, *arguments, "-", input=context, text=False, timeout=BUILD_SECONDS
    )  # fmt: skip


def _without_caches(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    entry.uid = entry.gid = entry.mtime = 0  # so that a layer is found again, on every machine
    entry.uname = entry.gname = ""
    return None if "__pycache__" in entry.name else entry


def _archived(commit: str) -> Mapping[str, bytes]:
    """The files of a commit that are among `CONTEXT`, by path."""
    command = ["git", "archive", commit, *CONTEXT]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        for entry in packed.getmembers():
            if (file := packed.extractfile(entry)) is not None:
                found[entry.name] = file.read()
    return found


def content(image: str) -> Mapping[str, bytes | None]:
    """The files of an image by path without the first slash; None for a folder or link."""
    name = docker("create", image, "x").stdout.strip()
    try:
        archive = subprocess.run(["docker", "export", name], capture_output=True, check=True).stdout
    finally:
        docker("rm", name)
    found: dict[str, bytes | None] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        for entry in packed.getmembers():
            reader = packed.extractfile(entry) if entry.isreg() else None
            found[entry.name] = reader.read() if reader else None
    return found


def inspected(name: str) -> Mapping[str, Any]:
    """What Docker knows about an image or a container."""
    return json.loads(docker("inspect", name).stdout)[0]


class Composed:
    """The shop of `deploy/compose.yaml` as a project of its own, on free ports. Use it as a context manager."""

    def __init__(self) -> None:
        self.project = f"mercato-test-{os.getpid()}"
        published = (GATEWAY, "users", "products", "orders", *OBSERVERS)
        self.ports = {name: int(free_address().rpartition(":")[2]) for name in published}
        self._folder = tempfile.TemporaryDirectory(prefix="mercato-test-")
        environment = {
            **images_of_others(),
            "MERCATO_VERSION": TAG,
            "MERCATO_DEMO": "true",
            **{f"{name.upper()}_PORT": str(port) for name, port in self.ports.items()},
            **{name: os.urandom(24).hex() for name in ("POSTGRES_PASSWORD", "MERCATO_SECRET", "MERCATO_METRICS_TOKEN")},
            "GRAFANA_PASSWORD": "unused",
        }
        if not missing_observers():
            endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "MERCATO_TRACE_SHARE": "1"}
            environment |= {**images_of_observers(), **endpoint}
        self._file = Path(self._folder.name) / "compose.env"
        self._file.write_text("".join(f"{name}={value}\n" for name, value in environment.items()))
        self.metrics_token = environment["MERCATO_METRICS_TOKEN"]

    def compose(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs `docker compose` for this shop."""
        return docker(
            "compose", "--project-name", self.project, "--file", str(COMPOSE), "--env-file", str(self._file), *arguments
        )  # fmt: skip

    def __enter__(self) -> Self:
        try:
            self.compose("up", "--detach", "--wait")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.compose("--profile", "*", "down", "--volumes", "--timeout", "15")
        self._folder.cleanup()

    def observe(self) -> None:
        """Starts what of the profile `observability` is tried."""
        self.compose("up", "--detach", *OBSERVERS)

    def url(self, service: str = GATEWAY) -> str:
        return f"http://127.0.0.1:{self.ports[service]}"

    def container(self, service: str) -> str:
        return f"{self.project}-{service}-1"

    @functools.cached_property
    def staff_password(self) -> str:
        found = PASSWORD.search(self.compose("logs", "migrate").stdout)
        assert found is not None
        return found[1]

    @functools.cached_property
    def staff_token(self) -> str:
        """The first access token of staff: for a quarter of an hour."""
        return self.token()

    def token(self) -> str:
        """A new access token of staff."""
        with Caller(self.url()) as caller:
            return signed_in(caller, self.staff_password)


def signed_in(caller: Caller, password: str) -> str:
    """An access token of the first staff account."""
    answer = caller.post("/login", {"email": "staff@mercato.local", "password": password})
    assert answer.status == 200, answer.text
    return answer.json["access_token"]


def wait_until_healthy(names: Sequence[str]) -> None:
    """Waits until the health checks of containers pass."""

    def healthy() -> bool:
        states = [inspected(name)["State"] for name in names]
        assert all(state["Running"] for state in states), [docker("logs", name).stderr[-2_000:] for name in names]
        return all(state["Health"]["Status"] == "healthy" for state in states)

    wait_until(healthy, COMMAND_SECONDS)
