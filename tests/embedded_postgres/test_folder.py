"""The data folder: one owner, a secret that stays, and a sentence for everything that can be wrong with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mercato.embedded_postgres import DataFolder, DataFolderBusy, SupervisorError

ROOT = Path(__file__).parents[2]
URL = "http://127.0.0.1:8000"
AS_ROOT = os.geteuid() == 0
OWNER = """
import sys, time
from pathlib import Path
from mercato.embedded_postgres import DataFolder
folder = DataFolder.open(Path(sys.argv[1]), sys.argv[2])
print("open", flush=True)
time.sleep(60)
"""
OPEN_UNWRITABLE = """
import os, sys
from pathlib import Path
from mercato.embedded_postgres.folder import DataFolder, SupervisorError
uid = int(sys.argv[2])
if uid >= 0:
    os.setgroups([]); os.setgid(uid); os.setuid(uid)
try:
    DataFolder.open(Path(sys.argv[1]), "url")
except SupervisorError as error:
    print(error)
"""


@pytest.fixture
def parent() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="mercato-test-"))
    yield path
    shutil.rmtree(path)


def test_a_new_folder_is_private_and_says_who_owns_it(parent: Path):
    with DataFolder.open(parent / "data", URL) as folder:
        owner = json.loads((folder.path / "lock").read_text())

    assert stat.S_IMODE((parent / "data").stat().st_mode) == 0o700
    assert owner["pid"] == os.getpid()
    assert owner["url"] == URL


def test_a_second_owner_gets_an_error_that_names_the_first(parent: Path):
    with DataFolder.open(parent, URL), pytest.raises(DataFolderBusy) as refused:
        DataFolder.open(parent, "http://127.0.0.1:8001")

    assert (refused.value.pid, refused.value.url) == (os.getpid(), URL)
    assert str(os.getpid()) in str(refused.value)
    assert URL in str(refused.value)


def test_a_closed_folder_can_be_opened_again(parent: Path):
    DataFolder.open(parent, URL).close()

    DataFolder.open(parent, URL).close()


def test_a_killed_owner_leaves_no_lock(parent: Path):
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(parent), URL], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "open\n"
        with pytest.raises(DataFolderBusy, match=f"pid {owner.pid} at {URL}"):
            DataFolder.open(parent, URL)
        owner.send_signal(signal.SIGKILL)

    DataFolder.open(parent, URL).close()


def test_a_child_process_does_not_keep_the_folder(parent: Path):
    folder = DataFolder.open(parent, URL)
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        folder.close()
        try:
            DataFolder.open(parent, URL).close()
        finally:
            child.kill()


def test_the_secret_stays_the_same_and_is_private(parent: Path):
    with DataFolder.open(parent, URL) as folder:
        secret = folder.secret()
    with DataFolder.open(parent, URL) as folder:
        again = folder.secret()

    assert secret == again
    assert len(secret) == 32
    assert stat.S_IMODE((parent / "secret").stat().st_mode) == 0o600
    assert sorted(path.name for path in parent.iterdir()) == ["lock", "secret"]


def test_a_secret_half_written_by_a_crash_is_none(parent: Path):
    (parent / "secret.new").write_bytes(b"half")

    with DataFolder.open(parent, URL) as folder:
        assert len(folder.secret()) == 32


def test_a_damaged_secret_is_not_replaced_in_silence(parent: Path):
    (parent / "secret").write_bytes(b"short")

    with DataFolder.open(parent, URL) as folder, pytest.raises(SupervisorError, match=r"secret holds 5 bytes"):
        folder.secret()


def test_a_file_in_the_place_of_the_folder_is_named(parent: Path):
    (parent / "data").write_text("not a folder")

    with pytest.raises(SupervisorError, match=rf"{parent}/data is not what it must be"):
        DataFolder.open(parent / "data", URL)


def test_a_missing_parent_is_named(parent: Path):
    with pytest.raises(SupervisorError, match=rf"{parent}/a does not exist: create that"):
        DataFolder.open(parent / "a" / "data", URL)


def test_an_unwritable_folder_is_named(parent: Path):
    parent.chmod(0o555)
    uid = "65534" if AS_ROOT else "-1"

    answer = subprocess.run(
        [sys.executable, "-c", OPEN_UNWRITABLE, str(parent), uid], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert answer.stdout.startswith(f"{parent} may not be written by this user")
    assert answer.stdout.count("\n") == 1


def test_a_full_disk_is_named(parent: Path):
    if not AS_ROOT:
        pytest.skip("mounting a small disk needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(parent)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        with DataFolder.open(parent, URL) as folder:
            with pytest.raises(OSError, match="No space"):
                (parent / "filler").write_bytes(bytes(128 * 1024))
            with pytest.raises(SupervisorError, match=rf"disk that holds {parent} is full"):
                folder.secret()
    finally:
        subprocess.run(["umount", str(parent)], check=True)
