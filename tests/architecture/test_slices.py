"""Each service runs from `contracts/`, `chassis/`, `gateway/` and its own folder alone: that makes it deployable alone.

What a provider that is not ours offers stands beside its simulator, and belongs to the slice as contracts do.
`deploy/image/cut.py` copies a slice; with the files of `mercato serve` it is the content of an image.

The slice is imported by a fresh interpreter in an empty folder. The editable installation also leads to the
repository, so the test makes sure that nothing was imported from there.
"""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mercato import topology
from mercato.chassis.hosting.host import GATEWAY
from mercato.testing.waiting import BOUND_SECONDS

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "mercato"
SERVICES = list(topology.SERVICES)
SERVING = [
    "mercato.cli.commands",
    "mercato.cli.serve",
    "mercato.cli.nats",
    "mercato.cli.over_grpc",
    "mercato.chassis.rpc.transports.nats",
    "mercato.chassis.rpc.transports.http.remote",
    "mercato.chassis.rpc.transports.grpc.remote",
    "mercato.gateway.grpc.serving",
    "mercato.chassis.rpc.discovery.consul",
    "mercato.chassis.rpc.discovery.etcd",
    "mercato.chassis.rpc.discovery.mdns",
    "mercato.chassis.observability.otlp",
]
"""What `mercato serve` imports, here or when a setting asks for it."""

IMPORT_APP = """
import sys
folder, app, *modules = sys.argv[1:]
sys.path.insert(0, folder)
__import__(app)
import mercato.gateway.app, mercato.gateway.routes
for command in modules:
    __import__(command)
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] == "mercato":
        places = [module.__file__, *getattr(module, "__path__", [])]
        assert all(place.startswith(folder) for place in places if place), name
"""


def _cut() -> Any:
    spec = importlib.util.spec_from_file_location("cut", REPOSITORY / "deploy/image/cut.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cut = _cut()


def cut_slice(service: str, folder: Path) -> None:
    cut.cut(service, folder, serves=False)


def import_app(app: str, folder: Path, *modules: str) -> subprocess.CompletedProcess[str]:
    # -I: neither the environment nor the working folder adds to the module path.
    command = [sys.executable, "-I", "-B", "-c", IMPORT_APP, str(folder), app, *modules]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=BOUND_SECONDS)


def test_there_are_services():
    assert {"orders", "products", "users"} <= set(SERVICES)


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_from_its_slice_alone(service: str, tmp_path: Path):
    cut_slice(service, tmp_path)

    done = import_app(f"{topology.package(service)}.app", tmp_path)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("image", [*SERVICES, GATEWAY])
def test_an_image_has_what_mercato_serve_imports_and_no_other_service(image: str, tmp_path: Path):
    """All of it, also what is imported only where a setting asks for it."""
    cut.cut(image, tmp_path)
    app = "mercato.gateway.app" if image == GATEWAY else f"{topology.package(image)}.app"

    done = import_app(app, tmp_path, *SERVING)

    assert done.returncode == 0, done.stderr
    found = {path.parent.name for path in (tmp_path / "mercato").glob("services/*/*.py")}
    assert found <= {image}
    assert len(list((tmp_path / "mercato").glob("simulators/*/app.py"))) == (image in topology.SIMULATORS)


COMMANDS = ("mercato/cli/commands.py", "mercato/cli/observing.py")
"""They import each command where it runs, and an image has `mercato serve` alone."""


def not_in(folder: Path) -> set[str]:
    """Modules of the package that the code in a folder imports, at whatever depth, and that the folder has not."""
    wanted = set[str]()
    for path in folder.rglob("*.py"):
        if path.relative_to(folder).as_posix() in COMMANDS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                wanted |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in wanted if has(REPOSITORY, name) and not has(folder, name)}


def has(folder: Path, module: str) -> bool:
    place = folder / module.replace(".", "/")
    return module.startswith("mercato.") and (place.with_suffix(".py").is_file() or (place / "__init__.py").is_file())


@pytest.mark.parametrize("image", ["orders", GATEWAY])
def test_an_image_has_every_module_that_its_code_imports_also_where_a_setting_asks_for_it(image: str, tmp_path: Path):
    cut.cut(image, tmp_path)

    assert not_in(tmp_path) == set()


@pytest.mark.parametrize("image", ["migrate", "all"])
def test_an_image_with_all_services_has_no_test_code(image: str, tmp_path: Path):
    cut.cut(image, tmp_path)

    assert {path.name for path in (tmp_path / "mercato/services").iterdir() if path.is_dir()} < {*SERVICES}
    assert not (tmp_path / "mercato/testing").exists()


def test_an_image_that_there_is_not_is_refused(tmp_path: Path):
    command = [sys.executable, str(REPOSITORY / "deploy/image/cut.py"), "order", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_SECONDS, check=False)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("cut: there is no image 'order': name a service, gateway, ")


@pytest.mark.parametrize("missing", ["mercato.operations", "mercato.testing", "mercato.services.orders"])
def test_a_slice_does_not_reach_into_the_repository(missing: str, tmp_path: Path):
    cut_slice("users", tmp_path)
    with (tmp_path / "mercato/services/users/app.py").open("a") as app:
        app.write(f"\nimport {missing}\n")

    done = import_app("mercato.services.users.app", tmp_path)

    assert f"No module named '{missing}'" in done.stderr
