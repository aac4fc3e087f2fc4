"""The file of a backup: complete or not there, and refused when a byte of it is not what was written."""

from __future__ import annotations

import asyncio
import datetime
import os
import stat
import zipfile
from pathlib import Path

import pytest

from mercato.operations.backup.archive import (
    FORMAT,
    MANIFEST,
    DatabaseEntry,
    Manifest,
    Sequence,
    TableEntry,
    TableWriter,
    draft,
    opened,
    writer,
)
from mercato.operations.copying import CopyError

ROWS = b"".join(b"%d\tname of %d\n" % (n, n * n) for n in range(2_000))


def make(target: Path, *, format_: int = FORMAT) -> None:
    with draft(target) as file:
        with writer(file) as archive:
            with archive.table("users", "users") as rows:
                asyncio.run(write(rows))
            tables = {"users": TableEntry(("id", "name"), 2_000, rows.sha256)}
            entry = DatabaseEntry({"0001": "0" * 64}, tables, {"users_id_seq": Sequence(2_000, True)})
            now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
            archive.finish(Manifest(format_, "1", now, 0.1, True, (), {"users": entry}))
        file.publish(target)


async def write(rows: TableWriter) -> None:
    for start in range(0, len(ROWS), 1_000):
        await rows.write(ROWS[start : start + 1_000])


def refusal(path: Path) -> str:
    with pytest.raises(CopyError) as raised, opened(path):
        pass
    return str(raised.value)


def test_what_was_written_comes_back(tmp_path: Path):
    make(tmp_path / "shop")

    with opened(tmp_path / "shop") as archive:
        assert b"".join(archive.rows("users", "users")) == ROWS
        assert archive.manifest.databases["users"].sequences == {"users_id_seq": Sequence(2_000, True)}
    assert stat.S_IMODE((tmp_path / "shop").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["shop"]


def test_a_file_that_is_cut_is_refused(tmp_path: Path):
    make(tmp_path / "shop")
    whole = (tmp_path / "shop").read_bytes()

    for length in (0, 1, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        assert "damaged, cut short or no backup" in refusal(tmp_path / "cut")


def test_a_file_with_a_changed_byte_is_refused_or_says_the_same(tmp_path: Path):
    make(tmp_path / "shop")
    whole = (tmp_path / "shop").read_bytes()
    refused = 0

    for position in range(0, len(whole), 37):
        changed = bytearray(whole)
        changed[position] ^= 0xFF
        (tmp_path / "changed").write_bytes(changed)
        try:
            with opened(tmp_path / "changed") as archive:
                assert b"".join(archive.rows("users", "users")) == ROWS
        except CopyError:
            refused += 1
    assert refused > 0.9 * len(range(0, len(whole), 37))


def test_rows_that_are_not_those_of_the_manifest_are_refused(tmp_path: Path):
    """An archive that was packed anew has the right checksums of zip, and not those of the manifest."""
    make(tmp_path / "shop")
    with zipfile.ZipFile(tmp_path / "shop") as old, zipfile.ZipFile(tmp_path / "new", "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("users/users.copy", ROWS.replace(b"name of 4\n", b"name of 5\n"))
        new.writestr(MANIFEST, old.read(MANIFEST))

    assert "damaged" in refusal(tmp_path / "new")


def test_an_archive_of_another_format_is_refused(tmp_path: Path):
    make(tmp_path / "shop", format_=FORMAT + 1)

    assert "another format" in refusal(tmp_path / "shop")


def test_a_file_that_is_there_stays(tmp_path: Path):
    (tmp_path / "shop").write_text("mine")

    with pytest.raises(CopyError, match="never overwrites"):
        make(tmp_path / "shop")
    assert (tmp_path / "shop").read_text() == "mine"
    assert os.listdir(tmp_path) == ["shop"]


def test_a_file_that_comes_in_between_stays(tmp_path: Path):
    with draft(tmp_path / "shop") as file:
        (tmp_path / "shop").write_text("mine")
        with pytest.raises(CopyError, match="never overwrites"):
            file.publish(tmp_path / "shop")
    assert (tmp_path / "shop").read_text() == "mine"
    assert os.listdir(tmp_path) == ["shop"]


def test_nothing_is_left_of_a_file_that_did_not_get_done(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), draft(tmp_path / "shop") as file, writer(file):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
