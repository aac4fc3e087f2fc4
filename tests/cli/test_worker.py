"""The end of the pipe from the owner: a process that is asked to stop leaves its folder, an orphan removes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from mercato.cli.worker import STOP

BOUND_SECONDS: Final = 60.0

BEGINS: Final = """
import shutil, sys
from mercato.cli.worker import OwnerWatch

watch = OwnerWatch(metrics=sys.argv[1])
print("begun", flush=True)
assignment = watch.assignment()
if not assignment:
    watch.clean_up()
    sys.exit(1)
print(assignment.decode().strip(), flush=True)
"""
IMPORTS: Final = f"""{BEGINS}
import threading
watch.follow()
threading.Event().wait()
"""
SERVES: Final = f"""{BEGINS}
import threading
ended = threading.Event()
watch.on_end(ended.set)
watch.follow()
ended.wait()
watch.clean_up()
"""
ONE_MAKES_A_FILE: Final = """
import shutil, pathlib, sys
remove, made = shutil.rmtree, []

def rmtree(path, ignore_errors):
    if len(made) < 3:
        made.append(pathlib.Path(path, f"counter_{len(made)}.db"))
        made[-1].touch()
        return
    remove(path, ignore_errors=ignore_errors)

shutil.rmtree = rmtree
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "metrics"
    folder.mkdir()
    (folder / "counter_1.db").touch()
    return folder


def run(script: str, folder: Path, sent: bytes) -> None:
    """Runs a process whose owner, this one, sends something, closes the pipe, and goes on to be its parent."""
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], input=sent, capture_output=True, timeout=BOUND_SECONDS, check=False
    )
    assert done.stderr == b""
    assert done.stdout.startswith(b"begun")


@pytest.mark.parametrize(
    ("script", "sent"), [(BEGINS, b""), (IMPORTS, b"an assignment\n"), (SERVES, b"an assignment\n")]
)
def test_a_process_whose_owner_has_died_removes_the_folder(script: str, sent: bytes, folder: Path):
    run(script, folder, sent)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("script", "sent"), [(BEGINS, STOP), (IMPORTS, b"an assignment\n" + STOP), (SERVES, b"an assignment\n" + STOP)]
)
def test_a_process_that_is_asked_to_stop_leaves_the_folder_to_its_owner(script: str, sent: bytes, folder: Path):
    run(script, folder, sent)
    assert folder.exists()


def test_a_file_that_is_made_meanwhile_does_not_keep_the_folder(folder: Path):
    run(ONE_MAKES_A_FILE + SERVES, folder, b"an assignment\n")
    assert not folder.exists()
