"""What `make up` and `make setup` say while they install: at a terminal how far they are, elsewhere two lines."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pty
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

ROOT: Final = Path(__file__).parents[2]
SCRIPT: Final = ROOT / "requirements/install.py"

# As pip 23 to 26 write them to a pipe.
OUTPUT: Final = """\
Looking in links: /opt/wheels
Collecting alpha==1.0 (from -r requirements/made.txt (line 1))
  Using cached alpha-1.0-py3-none-any.whl (15 kB)
Requirement already satisfied: beta==2.0 in ./site-packages (from -r requirements/made.txt (line 3))
Ignoring colorama: markers 'sys_platform == "win32"' don't match your environment
Processing /opt/wheels/delta_one-4.0.1-cp311-abi3-manylinux_2_28_x86_64.whl (from -r requirements/made.txt (line 4))
Collecting gamma[extra]==3.0 (from -r requirements/made.txt (line 5))
  Downloading gamma-3.0-cp311-cp311-manylinux_2_28_x86_64.whl (45.1 MB)
Installing collected packages: gamma, delta-one, alpha
Successfully installed alpha-1.0 delta-one-4.0.1 gamma-3.0
"""
PINS: Final = "alpha==1.0\nbeta==2.0\ncolorama==4 ; sys_platform == 'win32'\ndelta-one==4.0.1\ngamma[extra]==3.0\n"


class Ran(msgspec.Struct, frozen=True):
    status: int
    shown: str
    errors: str


def run(script: Path, name: str, *, at_terminal: bool, **more: str) -> Ran:
    """Runs a copy of the script."""
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", **more}
    command = [sys.executable, str(script), name]
    if not at_terminal:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        return Ran(done.returncode, done.stdout, done.stderr)
    terminal, end = pty.openpty()
    with subprocess.Popen(command, stdout=end, stderr=subprocess.PIPE, text=True, env=environment) as process:
        os.close(end)
        shown = b""
        try:
            while read := os.read(terminal, 65_536):
                shown += read
        except OSError:  # Linux: the other end is closed
            pass
        assert process.stderr
        errors = process.stderr.read()
    os.close(terminal)
    return Ran(process.returncode, shown.decode(), errors)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A copy of the script with pins of its own beside it."""
    (tmp_path / "made.txt").write_text(PINS)
    return Path(shutil.copy(SCRIPT, tmp_path))


def pip_that(tmp_path: Path, code: str) -> dict[str, str]:
    """The environment in which `python -m pip` runs `code`."""
    folder = tmp_path / "instead"
    folder.mkdir()
    (folder / "pip.py").write_text(f"import sys\n{code}\n")
    return {"PYTHONPATH": str(folder)}


def test_terminal_sees_how_far_it_is_in_one_line_that_changes(script: Path, tmp_path: Path):
    ran = run(script, "made", at_terminal=True, **pip_that(tmp_path, f"print({OUTPUT!r})"))

    first, *rest = ran.shown.split("\r\n")
    assert (ran.status, ran.errors, first) == (0, "", "installing 5 packages for made (once) ...")
    shown = [re.sub(r" \(\d+ s\)\Z", "", text) for text in "".join(rest).split("\r\033[K")]
    assert list(dict.fromkeys(shown)) == [
        "",
        "  preparing",
        "  fetched 1 of 5: alpha 1.0",
        "  fetched 1 of 5: alpha 1.0, 15 kB",
        "  fetched 2 of 5: beta 2.0",
        "  fetched 3 of 5: colorama",
        "  fetched 4 of 5: delta_one 4.0.1",
        "  fetched 5 of 5: gamma 3.0",
        "  fetched 5 of 5: gamma 3.0, 45.1 MB",
        "  installed 0 of 3",
    ]
    assert shown[-1] == ""  # the line is gone
    assert rest == ["".join(rest)]


@pytest.mark.parametrize("more", [{}, {"TERM": "dumb"}], ids=["no terminal", "dumb terminal"])
def test_elsewhere_nothing_is_said_of_the_way(script: Path, tmp_path: Path, more: dict[str, str]):
    quiet = pip_that(tmp_path, f"print('' if '--quiet' in sys.argv else {OUTPUT!r}, end='')")
    ran = run(script, "made", at_terminal=bool(more), **{**quiet, **more})

    assert (ran.status, ran.errors) == (0, "")
    assert ran.shown.split() == ["installing", "5", "packages", "for", "made", "(once)", "..."]


@pytest.mark.parametrize("at_terminal", [False, True])
def test_what_pip_complains_of_is_shown_and_its_status_is_that_of_the_command(
    script: Path, tmp_path: Path, at_terminal: bool
):
    fails = pip_that(tmp_path, "print('Collecting alpha==1.0')\nprint('ERROR: no wheel', file=sys.stderr)\nsys.exit(7)")
    ran = run(script, "made", at_terminal=at_terminal, **fails)

    assert (ran.status, ran.errors) == (7, "ERROR: no wheel\n")


def test_installed_packages_are_counted_by_their_folders(tmp_path: Path):
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec
    assert spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pip-24.0.dist-info").mkdir()
    progress = module.Progress(4, tmp_path)
    for line in OUTPUT.splitlines():
        progress.read(line)
    (tmp_path / "gamma-3.0.dist-info").mkdir()
    (tmp_path / "gamma").mkdir()

    assert str(progress) == "installed 1 of 3"


def test_output_of_the_pip_that_there_is_is_understood(script: Path, tmp_path: Path):
    wheel, info = tmp_path / "alpha-1.0-py3-none-any.whl", "alpha-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("alpha.py", "")
        packed.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: alpha\nVersion: 1.0\n")
        packed.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        packed.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (tmp_path / "made.txt").write_text(f"alpha==1.0 --hash=sha256:{digest}\n")
    local = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_TARGET": str(tmp_path / "there")}
    ran = run(script, "made", at_terminal=True, **local)

    assert (ran.status, ran.errors) == (0, "")
    assert "fetched 1 of 1: alpha 1.0" in ran.shown
    assert "installed 0 of 1" in ran.shown
    assert (tmp_path / "there/alpha.py").is_file()


@pytest.mark.parametrize(("target", "names"), [("runtime", ["runtime", "."]), ("dev", ["dev"]), ("bench", ["bench"])])
def test_make_installs_by_it(target: str, names: list[str]):
    pins = f"requirements/{target}.txt"
    command = ["make", "--dry-run", "--what-if", pins, f".venv/.{target}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)

    found = re.findall(r"^\S+/python requirements/install\.py (\S+)$", done.stdout, re.MULTILINE)
    assert found[-len(names) :] == names  # before them perhaps what the target needs, where that is older than its pins
