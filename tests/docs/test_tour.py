"""The tour of the README, run as it is written, against a real shop."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mercato.testing.command import ROOT
from mercato.testing.process import Process, data_folder, remove

README = (Path(__file__).parents[2] / "README.md").read_text()
TOUR = README[README.index("## A tour of one minute") : README.index("## The command line")]
BLOCKS = re.findall(r"```sh\n(.*?)```", TOUR, re.DOTALL)

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(shutil.which("curl") is None, reason="the tour is written for curl, which is not installed"),
]


def commands(block: str) -> list[str]:
    """The commands of a block, each with the lines that it goes on in."""
    return [command for command in re.split(r"(?<!\\)\n", block) if command.strip()]


def typed(command: str, folder: Path, port: int) -> str:
    """What a command prints when it is typed in `folder`, with the shop on another port than the README's."""
    line = command.replace("localhost:8080", f"localhost:{port}").replace("curl ", "curl --silent --show-error ")
    line = line.replace(".venv/bin/mercato ", f"{sys.executable} -m mercato.cli ")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def first_message(command: str, port: int) -> str:
    """The data of the first message of a stream, which is then ended, as with Ctrl-C."""
    line = command.replace("localhost:8080", f"localhost:{port}").replace("curl ", "exec curl --silent --show-error ")
    with subprocess.Popen(["bash", "-c", line], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            return next(text.removeprefix("data: ") for text in running.stdout if text.startswith("data: "))
        finally:
            running.terminate()


def test_the_tour_does_what_the_readme_says() -> None:
    with data_folder() as beside:
        folder, data = beside.parent, beside.with_name(".mercato")
        try:
            answers = take_tour(folder, data)
        finally:
            remove(data)
    found, alice, first, again, listed, short, paid, timeline, lost, stock = answers[:10]
    illegal, shipped, entries, followed, after_kill, audited, login = answers[10:]
    assert "Headphones" in [product["name"] for product in found]
    assert [user["name"] for user in alice] == ["Alice"]
    assert first["id"] == 1001
    assert first["total"] == {"amount": "1099.97", "currency": "USD"}
    assert again == first
    assert [order["id"] for order in listed] == [1001]
    assert short["total"]["amount"] == "99.99"
    assert (paid["order_id"], paid["status"]) == (1001, "captured")
    assert {"order", "stock", "money"} == {entry["part"] for entry in timeline}
    assert (lost["status"], lost["payment"]) == ("confirmed", "paid")
    assert (stock["on_hand"], stock["reserved"]) == (1_000_000 - 2, 0)
    assert (illegal["status"], illegal["details"]["legal"]) == (409, ["shipped"])
    assert (shipped["payment"], shipped["fulfilment"]) == ("paid", "shipped")
    assert "order.paid" in {entry["type"] for entry in entries}
    assert followed == after_kill == shipped
    assert "invariants hold" in audited
    assert login["user"]["name"] == "Alice"


def take_tour(folder: Path, data: Path) -> list[Any]:
    """The answers of all its commands, in order; where it pulls the plug, the shop is started again."""
    answers: list[Any] = []
    shop = Process(data, as_json=False)
    try:
        shop.ready()
        port = int(shop.url.rpartition(":")[2])
        for block in BLOCKS:
            for command in commands(block):
                if command.startswith("kill"):
                    shop.tree()
                    typed(command, folder, port)
                    shop.assert_gone()
                    shop.__exit__()
                    shop = Process(data, as_json=False, port=port).ready()
                elif command.startswith("curl -N"):
                    answers.append(json.loads(first_message(command, port)))
                else:
                    said = typed(command, folder, port)
                    answers.append(json.loads(said) if command.startswith("curl") else said)
    finally:
        shop.__exit__()
    return answers


def test_the_readme_has_a_tour() -> None:
    assert sum(len(commands(block)) for block in BLOCKS) == 18
