"""Each service runs from `contracts/`, `chassis/` and its own folder alone: that is what makes it deployable alone.

The slice is imported by a fresh interpreter in an empty folder. The editable installation also leads to the
repository, so the test makes sure that nothing was imported from there.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "mercato"
SERVICES = sorted(folder.name for folder in (PACKAGE / "services").iterdir() if (folder / "app.py").exists())
IMPORT_SECONDS = 60

IMPORT_APP = """
import sys
folder, service = sys.argv[1:]
sys.path.insert(0, folder)
__import__(f"mercato.services.{service}.app")
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] == "mercato":
        places = [module.__file__, *getattr(module, "__path__", [])]
        assert all(place.startswith(folder) for place in places if place), name
"""


def cut_slice(service: str, folder: Path) -> None:
    for part in ("contracts", "chassis", f"services/{service}"):
        shutil.copytree(PACKAGE / part, folder / "mercato" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for marker in ("__init__.py", "services/__init__.py"):
        shutil.copy(PACKAGE / marker, folder / "mercato" / marker)


def import_app(service: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # -I: neither the environment nor the working folder adds to the module path.
    command = [sys.executable, "-I", "-B", "-c", IMPORT_APP, str(folder), service]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=IMPORT_SECONDS)


def test_there_are_services():
    assert {"orders", "products", "users"} <= set(SERVICES)


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_from_its_slice_alone(service: str, tmp_path: Path):
    cut_slice(service, tmp_path)

    done = import_app(service, tmp_path)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["mercato.gateway", "mercato.services.orders"])
def test_a_slice_does_not_reach_into_the_repository(missing: str, tmp_path: Path):
    cut_slice("users", tmp_path)
    with (tmp_path / "mercato/services/users/app.py").open("a") as app:
        app.write(f"\nimport {missing}\n")

    done = import_app("users", tmp_path)

    assert f"No module named '{missing}'" in done.stderr
