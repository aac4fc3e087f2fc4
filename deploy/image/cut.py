"""Copies the part of the package that a process of Mercato needs: the content of its image.

    python deploy/image/cut.py orders /out         a service, which `mercato serve orders` serves
    python deploy/image/cut.py gateway /out        the gateway: no service
    python deploy/image/cut.py migrate /out        what prepares the databases: all services
    python deploy/image/cut.py all /out            the whole shop, with the servers that it starts itself

The image of a service has the code of no other service (`tests/architecture/test_slices.py`, `tests/deploy`).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
PACKAGE: Final = REPOSITORY / "mercato"

SLICE: Final = ("contracts", "chassis", "gateway")
"""The folders that every service builds on."""
SERVE: Final = (
    "topology.py",
    *(
        f"cli/{name}.py"
        for name in (
            "__init__", "__main__", "commands", "diagnostics", "environment", "grpc_port", "hosting", "nats",
            "observing", "options", "over_grpc", "progress", "registries", "serve", "settings", "starting",
            "stopping", "streams", "tracing",
        )
    ),
)  # fmt: skip
"""The files that `mercato serve` needs besides."""
TESTS: Final = ("testing",)
GATEWAY: Final = "gateway"
WHOLE: Final = ("migrate", "all")
"""The images that have all services."""


def own_folder(service: str) -> Path:
    """The folder of a service in the package, whether it is a simulator or not. Raises `KeyError`."""
    from mercato import topology

    if service not in topology.SERVICES:
        raise KeyError(service)
    return topology.migrations(service).parent.relative_to(PACKAGE)


def offers() -> list[Path]:
    """What the providers offer that are not ours: contracts, which stand beside their simulators."""
    return [path.relative_to(PACKAGE) for path in PACKAGE.glob("simulators/*/contract.py")]


def cut(image: str, folder: Path, *, serves: bool = True) -> None:
    """Copies the package for an image to `folder/mercato`. Without `serves`, only what a service builds on.

    Raises `KeyError` for an image that there is not.
    """
    to = folder / "mercato"
    if image in WHOLE:
        shutil.copytree(PACKAGE, to, ignore=shutil.ignore_patterns("__pycache__", *TESTS))
        return
    own = [] if image == GATEWAY else [own_folder(image)]
    for part in (*map(Path, SLICE), *own):
        shutil.copytree(PACKAGE / part, to / part, ignore=shutil.ignore_patterns("__pycache__"))
    files = [*offers(), *(map(Path, SERVE) if serves else ())]
    markers = {parent / "__init__.py" for path in (*files, *own) for parent in (path, *path.parents)}
    for file in (*files, *(marker for marker in markers if (PACKAGE / marker).is_file())):
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / file, to / file)


def main() -> None:
    image, folder = sys.argv[1:]
    sys.path.insert(0, str(REPOSITORY))
    try:
        cut(image, Path(folder))
    except KeyError:
        sys.exit(f"cut: there is no image {image!r}: name a service, {GATEWAY}, {' or '.join(WHOLE)}")


if __name__ == "__main__":
    main()
