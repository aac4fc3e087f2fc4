"""Each service runs from `contracts/`, `chassis/`, `gateway/` and its own folder alone: that makes it deployable alone.

What a provider that is not ours offers stands beside its simulator, and belongs to the slice as contracts do.

The slice is imported by a fresh interpreter in an empty folder. The editable installation also leads to the
repository, so the test makes sure that nothing was imported from there.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mercato import topology
from mercato.testing.waiting import BOUND_SECONDS

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "mercato"
SERVICES = list(topology.SERVICES)

IMPORT_APP = """
import sys
folder, service = sys.argv[1:]
sys.path.insert(0, folder)
__import__(f"{service}.app")
import mercato.gateway.app, mercato.gateway.routes
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] == "mercato":
        places = [module.__file__, *getattr(module, "__path__", [])]
        assert all(place.startswith(folder) for place in places if place), name
"""


def cut_slice(service: str, folder: Path) -> None:
    own = topology.migrations(service).parent.relative_to(PACKAGE)
    for part in ("contracts", "chassis", "gateway", own):
        shutil.copytree(PACKAGE / part, folder / "mercato" / part, ignore=shutil.ignore_patterns("__pycache__"))
    offers = [path.relative_to(PACKAGE) for path in PACKAGE.glob("simulators/*/contract.py")]
    markers = {parent / "__init__.py" for path in (*offers, own / "app.py") for parent in path.parents}
    for file in (*offers, *markers):
        (folder / "mercato" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / file, folder / "mercato" / file)


def import_app(service: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # -I: neither the environment nor the working folder adds to the module path.
    command = [sys.executable, "-I", "-B", "-c", IMPORT_APP, str(folder), topology.package(service)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=BOUND_SECONDS)


def test_there_are_services():
    assert {"orders", "products", "users"} <= set(SERVICES)


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_from_its_slice_alone(service: str, tmp_path: Path):
    cut_slice(service, tmp_path)

    done = import_app(service, tmp_path)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["mercato.operations", "mercato.testing", "mercato.services.orders"])
def test_a_slice_does_not_reach_into_the_repository(missing: str, tmp_path: Path):
    cut_slice("users", tmp_path)
    with (tmp_path / "mercato/services/users/app.py").open("a") as app:
        app.write(f"\nimport {missing}\n")

    done = import_app("users", tmp_path)

    assert f"No module named '{missing}'" in done.stderr
