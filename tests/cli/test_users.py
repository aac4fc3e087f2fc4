"""`mercato users`: accounts seen and changed from the command line, beside a running shop and in a folder at rest."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mercato.testing.command import run_command
from mercato.testing.process import Process, data_folder

EMAIL, PASSWORD, NEW_PASSWORD = "alice@example.com", "demo-password", "a wholly new password"


@pytest.fixture(scope="module")
def shop() -> Iterator[Process]:
    with data_folder() as folder, Process(folder, "--auth", "required") as process:
        yield process.ready()
        process.stop()


def users(data: Path, *arguments: str, entered: str = "") -> subprocess.CompletedProcess[str]:
    return run_command("users", *arguments, "--data", data, entered=entered)


def listed(data: Path, *options: str) -> list[dict[str, Any]]:
    done = users(data, "list", "--json", *options)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)["users"]


def test_accounts_are_listed(shop: Process):
    assert {user["email"] for user in listed(shop.data)} > {EMAIL, "bob@example.com"}
    assert {user["role"] for user in listed(shop.data, "--role", "staff")} == {"staff"}
    lines = users(shop.data, "list").stdout.splitlines()
    assert lines[0].split() == ["id", "e-mail", "proven", "role", "since", "name"]
    assert lines[1].split()[:4] == ["1", EMAIL, "no", "customer"]


def test_a_password_is_set_and_sessions_end(shop: Process):
    with shop.caller() as caller:
        tokens = caller.sign_in(EMAIL, PASSWORD).json
        done = users(shop.data, "set-password", "Alice@Example.com", entered=NEW_PASSWORD + "\n")
        assert (done.returncode, done.stderr) == (0, "")
        assert "has another password; its sessions have ended" in done.stdout
        assert NEW_PASSWORD not in done.stdout
        assert caller.post("/token/refresh", {"refresh_token": tokens["refresh_token"]}).status == 401
        assert caller.post("/login", {"email": EMAIL, "password": PASSWORD}).status == 401
        caller.sign_in(EMAIL, NEW_PASSWORD)
    back = users(shop.data, "set-password", "1", entered=PASSWORD + "\n")
    assert back.returncode == 0, back.stderr


def test_a_role_is_set(shop: Process):
    done = users(shop.data, "set-role", "bob@example.com", "staff")
    assert (done.returncode, done.stdout) == (0, "bob@example.com (user 2) is staff; it was customer\n"), done.stderr
    assert users(shop.data, "set-role", "2", "customer", "--json").returncode == 0
    assert [user["role"] for user in listed(shop.data) if user["id"] == 2] == ["customer"]


def test_the_security_log_is_read(shop: Process):
    with shop.caller() as caller:
        assert caller.post("/login", {"email": EMAIL, "password": "a wrong password"}).status == 401
        caller.sign_in(EMAIL, PASSWORD)
    read = json.loads(users(shop.data, "log", EMAIL, "--limit", "2", "--json").stdout)["entries"]
    assert [(entry["kind"], entry["account_id"], entry["address"]) for entry in read] == [
        ("signed_in", 1, "127.0.0.1"),
        ("sign_in_failed", 1, "127.0.0.1"),
    ]
    lines = users(shop.data, "log", "1", "--limit", "1").stdout.splitlines()
    assert lines[0].split() == ["time", "what", "account", "by", "from", "about"]
    assert lines[1].split()[1:] == ["signed_in", "1", "customer", "1", "127.0.0.1"]


def test_an_account_is_erased_and_by_its_id_again(shop: Process):
    with shop.caller() as caller:
        body = {"email": "erased@example.com", "name": "Erased", "password": NEW_PASSWORD}
        user_id = caller.post("/register", body).json["id"]
        sentence = f"user {user_id} is erased; orders and payments stay, without the person\n"
        for who in ("Erased@example.com", str(user_id)):
            done = users(shop.data, "erase", who)
            assert (done.returncode, done.stdout, done.stderr) == (0, sentence, "")
        assert caller.post("/login", {"email": body["email"], "password": NEW_PASSWORD}).status == 401
    assert user_id not in {user["id"] for user in listed(shop.data)}


@pytest.mark.parametrize(
    ("arguments", "entered", "words"),
    [
        (["set-role", "dave@example.com", "staff"], "", "there is no account dave@example.com"),
        (["set-role", "9999", "staff"], "", "there is no account 9999"),
        (["erase", "dave@example.com"], "", "there is no account dave@example.com"),
        (["erase", "9999"], "", "There is no user 9999"),
        (["set-password", "1"], "short\n", "at least 10 characters"),
        (["set-password", "1"], "", "at least 10 characters"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(shop: Process, arguments: list[str], entered: str, words: str):
    done = users(shop.data, *arguments, entered=entered)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("mercato: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_where_there_is_no_shop_that_is_said(tmp_path: Path):
    done = users(tmp_path / "none", "list")
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no shop in" in done.stderr


@pytest.mark.long
def test_the_accounts_of_a_shop_that_is_stopped_are_changed_too():
    with data_folder() as folder:
        with Process(folder) as process:
            process.ready()
            process.stop()
        done = users(folder, "set-role", EMAIL, "staff")
        assert done.returncode == 0, done.stderr
        assert [user["email"] for user in listed(folder, "--role", "staff")] == [EMAIL]
