"""What `mercato up` says when it cannot start: one sentence that names the cause, no traceback, nothing broken."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from mercato.chassis.hosting.settings import Settings
from mercato.chassis.observability.telemetry import configure_logging
from mercato.cli.starting import announce_test_modes
from mercato.testing.command import run_command
from mercato.testing.old_server import OldServer
from mercato.testing.process import Process
from mercato.testing.waiting import wait_until

UNWRITABLE = "/sys/kernel" if os.geteuid() == 0 else "/etc"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "x"], "--port"),
        (["--port", "65536"], "--port"),
        (["--workers", "0"], "--workers"),
        (["--auth", "maybe"], "--auth"),
        (["--frobnicate"], "--frobnicate"),
        (["elsewhere"], "elsewhere"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, options: list[str], words: str):
    with Process(tmp_path / "data", *options) as process:
        assert process.exit_code(60) == 2

        assert len(process.complaints) == 1, process.output
        assert process.complaints[0].startswith("mercato: ")
        assert words in process.complaints[0]
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MERCATO_POOL_SIZE": "x"}, "MERCATO_POOL_SIZE"),
        ({"MERCATO_TRANSPORT": "pigeon"}, "MERCATO_TRANSPORT"),
        ({"MERCATO_BREAKER_SLOW_SHARE": "2"}, "MERCATO_BREAKER_SLOW_SHARE"),
        ({"MERCATO_BREAKER_OPEN_SECONDS": "9"}, "at most MERCATO_BREAKER_LONGEST_OPEN_SECONDS (4)"),
        ({"MERCATO_SECRET": "short"}, "MERCATO_SECRET"),
        ({"MERCATO_METRICS_TOKEN": "short"}, "MERCATO_METRICS_TOKEN"),
        ({"MERCATO_CORS_ORIGIN": "https://shop.example/"}, "MERCATO_CORS_ORIGIN"),
        ({"MERCATO_FAULTS": "no.such.point=kill"}, "no.such.point"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, environment: Mapping[str, str], words: str):
    with Process(tmp_path / "data", environment=environment) as process:
        assert words in process.refusal()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("command", ["up", "serve"])
@pytest.mark.parametrize("options", [["--auth", "required"], ["--host", "0.0.0.0"]])
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MERCATO_FAULTS": "orders.place.after_commit=kill"}, "MERCATO_FAULTS injects faults"),
        ({"MERCATO_TRANSPORT": "loopback"}, "MERCATO_TRANSPORT=loopback sends every call"),
    ],
)
def test_what_is_for_tests_is_refused_where_tokens_are_required(
    tmp_path: Path, command: str, options: list[str], environment: Mapping[str, str], words: str
):
    of_command = ["up", "--data", str(tmp_path / "data")] if command == "up" else ["serve", "orders"]
    ended = run_command(*of_command, "--port", "0", *options, environment=environment)

    assert ended.returncode == 1
    assert words in ended.stderr.splitlines()[-1]
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("setting", "words"), [("orders.place.after_commit=kill", "faults_injected"), ("", "calls_are_repeated")]
)
def test_what_is_for_tests_is_announced(capfdbinary: pytest.CaptureFixture[bytes], setting: str, words: str):
    configure_logging("warning")
    settings = Settings(faults=setting, transport="local" if setting else "loopback")

    [sentence] = announce_test_modes(settings, is_open=True)

    assert (setting or "loopback") in sentence
    assert words.encode() in capfdbinary.readouterr().err


def test_an_ordinary_start_announces_nothing(capfdbinary: pytest.CaptureFixture[bytes]):
    configure_logging("warning")

    assert announce_test_modes(Settings(), is_open=False) == []
    assert capfdbinary.readouterr().err == b""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0", "--auth", "open"], "loopback"),
        (["--host", "no.such.host.invalid"], "--host"),
        (["--host", "192.0.2.1"], "--host"),
    ],
)
def test_a_wrong_address_is_named(tmp_path: Path, options: list[str], words: str):
    with Process(tmp_path / "data", *options) as process:
        assert words in process.refusal()
    assert not (tmp_path / "data").exists()


def test_a_taken_port_is_named(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with Process(tmp_path / "data", port=port) as process:
            sentence = process.refusal()

    assert f"127.0.0.1:{port} is taken" in sentence
    assert "--port" in sentence
    assert not (tmp_path / "data").exists()


def test_a_data_path_that_is_a_file_is_left_as_it_is(tmp_path: Path):
    (tmp_path / "data").write_text("precious")
    with Process(tmp_path / "data") as process:
        assert str(tmp_path / "data") in process.refusal()

    assert (tmp_path / "data").read_text() == "precious"


@pytest.mark.parametrize("data", [f"{UNWRITABLE}/mercato", "/no/such/folder/data"])
def test_a_data_folder_that_cannot_be_made_is_named(data: str):
    with Process(Path(data)) as process:
        sentence = process.refusal()

    assert data in sentence
    assert "choose another" in sentence


@pytest.mark.parametrize(
    "dsn",
    [
        "garbage",
        "postgresql://admin:hunter2@127.0.0.1:1/postgres",
        "postgresql://admin:hunter2@no.such.host.invalid/postgres",
        "postgresql://admin:hunter2@127.0.0.1:notaport/postgres",
    ],
)
def test_a_wrong_dsn_is_named_without_its_password(tmp_path: Path, dsn: str):
    with Process(tmp_path / "data", environment={"MERCATO_POSTGRES_DSN": dsn}) as process:
        assert "MERCATO_POSTGRES_DSN" in process.refusal()
        assert "hunter2" not in process.output


def test_an_old_postgres_is_refused_by_its_version(tmp_path: Path):
    with OldServer() as server, Process(tmp_path / "data", environment={"MERCATO_POSTGRES_DSN": server.dsn}) as process:
        sentence = process.refusal()

    assert "PostgreSQL 15.4" in sentence
    assert "16 or newer" in sentence


def test_ctrl_c_while_a_server_does_not_answer(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dsn = f"postgresql://admin:secret@127.0.0.1:{silent.getsockname()[1]}/postgres"
        with Process(tmp_path / "data", environment={"MERCATO_POSTGRES_DSN": dsn}) as process:
            silent.settimeout(60)
            connection, _ = silent.accept()
            with connection:
                process.interrupt()

                assert process.exit_code() == 130
                assert process.complaints == ["mercato: stopped before it was ready"]
    wait_until(lambda: not process.left)
