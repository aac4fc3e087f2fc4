"""`mercato backup` and `mercato restore` as an operator uses them."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import resource
import shutil
import signal
import threading
import zipfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, cast

import asyncpg
import pytest

from cli.test_audit import change, make_shop, serving
from mercato.operations.audit.invariants import SHOP
from mercato.testing.command import ROOT, Command, clean_environment
from mercato.testing.process import Process, data_folder, remove
from mercato.testing.waiting import BOUND_SECONDS, wait_until

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def shop() -> Generator[Path]:
    """The data folder of a shop in which everything is right. Nothing runs on it."""
    with data_folder() as data:
        asyncio.run(make_shop(data))
        yield data


@pytest.fixture
def place() -> Generator[Path]:
    """A folder for backups and for what is restored, `new`."""
    with data_folder() as data:
        data.mkdir()
        yield data
        if (data / "new").exists():
            remove(data / "new")
        shutil.rmtree(data)


def start(
    command: str, *options: str | Path, file_bytes: int | None = None, environment: Mapping[str, str] | None = None
) -> Command:
    limit = None
    if file_bytes is not None:
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    return Command([command, *options], environment={**clean_environment(), **(environment or {})}, first=limit)


def finished(running: Command) -> tuple[int, str, str]:
    """Its exit code and what it has said."""
    output, errors = running.communicate()
    return running.wait(), output, errors


def done(command: str, *options: str | Path, environment: Mapping[str, str] | None = None) -> Mapping[str, Any]:
    """The document of a command that has done its work."""
    code, output, errors = finished(start(command, *options, "--json", environment=environment))
    assert (code, errors) == (0, ""), (output, errors)
    return json.loads(output)


def refused(command: str, *options: str | Path, file_bytes: int | None = None) -> str:
    """The one sentence of a command that has done nothing."""
    code, _, errors = finished(start(command, *options, "--json", file_bytes=file_bytes))
    assert code == 2, errors
    [sentence] = errors.splitlines()
    assert sentence.startswith("mercato: ")
    return sentence


def test_a_shop_that_was_backed_up_while_it_sold_goes_on_in_a_new_folder(place: Path):
    with data_folder() as data, Process(data) as running:
        running.ready()
        credentials = {"email": "alice@example.com", "password": "demo-password"}
        early = running.caller().post("/login", credentials).json
        orders: list[dict[str, Any]] = []
        is_backed_up = threading.Event()

        def sell() -> None:
            caller = running.caller()
            while not is_backed_up.is_set():
                orders.append(caller.post("/orders", {"user_id": 1, "product_id": 100, "amount": 99.99}).json)

        seller = threading.Thread(target=sell)
        seller.start()
        try:
            running.caller().post("/orders", {"user_id": 1, "product_id": 101, "amount": 49.5})
            document = done("backup", place / "shop", "--data", data)
        finally:
            is_backed_up.set()
            seller.join()
        running.stop()

    assert document["holds"]
    assert document["file"] == str(place / "shop")
    assert document["pause_seconds"] > 0
    assert (place / "shop").stat().st_mode & 0o777 == 0o600

    restored = done("restore", place / "shop", "--data", place / "new")

    assert restored["holds"]
    assert restored["rows"] == document["rows"]
    assert (place / "new" / "secret").stat().st_mode & 0o777 == 0o600
    # She has as many open orders as the shop took until the backup was done.
    unbounded = {"MERCATO_ORDERS_CUSTOMER_OPEN_ORDERS": "0", "MERCATO_ORDERS_CUSTOMER_HELD_UNITS": "0"}
    with Process(place / "new", "--auth", "required", environment=unbounded) as running:
        running.ready()
        old, caller = running.caller(early["access_token"]), running.caller()
        assert old.get("/users/1").status == 401
        assert caller.post("/token/refresh", {"refresh_token": early["refresh_token"]}).status == 401
        caller = running.caller(caller.post("/login", credentials).json["access_token"])
        kept = [order for order in orders if caller.get(f"/orders/{order['id']}").status == 200]
        assert kept, "nothing of what was sold before the backup is there"
        assert kept == orders[: len(kept)], "an order is there, and an earlier one is not"
        new = caller.post("/orders", {"user_id": 1, "product_id": 100, "amount": 99.99}).json
        assert new["id"] > kept[-1]["id"]
        running.stop()


def test_a_restored_shop_gives_no_id_again_and_opens_nothing_to_tokens_of_the_lost_time(place: Path):
    account = {"email": "lost@example.com", "name": "Lost", "password": "demo-password"}
    secret = {"MERCATO_SECRET": "one secret before the backup and after it"}  # the worst case: old signatures are good
    with data_folder() as data, Process(data, "--auth", "required", environment=secret) as running:
        running.ready()
        document = done("backup", place / "shop", "--data", data, environment=secret)
        lost = used(running, account)
        running.stop()

    restored = done("restore", place / "shop", "--data", place / "new", environment=secret)

    assert restored["rows"] == document["rows"]
    assert restored["skipped_ids"] >= 1_000_000
    with Process(place / "new", "--auth", "required", environment=secret) as running:
        running.ready()
        new = used(running, {**account, "email": "new@example.com"})
        for kind in ("user", "order", "guest_order", "payment"):
            assert new[kind] > lost[kind], kind
        old = running.caller(lost["access_token"])
        assert running.caller().post("/token/refresh", {"refresh_token": lost["refresh_token"]}).status == 401
        for path in (f"/users/{new['user']}", f"/orders/{new['order']}", f"/orders/{new['guest_order']}"):
            assert old.get(path).status == 404, path
            assert running.caller().get(f"{path}?access_token={lost['guest_token']}").status != 200, path
        assert running.caller().get(f"/orders/{new['guest_order']}?access_token={new['guest_token']}").status == 200
        assert old.post("/orders", {"user_id": new["user"], "product_id": 100}).status == 404
        assert [order["id"] for order in running.caller(new["access_token"]).get("/orders").json] == [new["order"]]
        running.stop()


def used(running: Process, account: Mapping[str, str]) -> dict[str, Any]:
    """A new customer's account, tokens and paid order, and the order of a guest, with their ids."""
    caller = running.caller()
    user = caller.post("/register", account)
    assert user.status == 201, user.text
    tokens = caller.sign_in(account["email"], account["password"]).json
    bought = {"product_id": 100, "payment_method": "sandbox:ok", "amount": 99.99}
    placed = caller.post("/orders", {**bought, "user_id": user.json["id"]})
    assert placed.status == 201, placed.text
    guest = running.caller().post("/orders", {"product_id": 100, "email": "guest@example.com"})
    assert guest.status == 201, guest.text
    wait_until(lambda: bool(caller.get("/payments").json), BOUND_SECONDS, lambda: caller.get("/orders").text)
    [payment] = caller.get("/payments").json
    return {
        "user": user.json["id"],
        "order": placed.json["id"],
        "guest_order": guest.json["id"],
        "guest_token": guest.json["access_token"],
        "payment": payment["id"],
        "access_token": tokens["access_token"],
        "refresh_token": tokens["refresh_token"],
    }


def test_a_backup_in_which_something_does_not_hold_says_so(shop: Path, place: Path):
    asyncio.run(change(shop, "UPDATE levels SET on_hand = on_hand + 1"))
    try:
        code, output, _ = finished(start("backup", place / "shop", "--data", shop))
    finally:
        asyncio.run(change(shop, "UPDATE levels SET on_hand = on_hand - 1"))

    assert code == 1
    assert "S2" in output
    assert os.listdir(place) == ["shop.violated"]
    code, output, _ = finished(start("restore", place / "shop.violated", "--data", place / "new"))
    assert code == 1
    assert "S2" in output


def test_people_see_what_is_done_and_how_long_writes_waited(shop: Path, place: Path):
    code, output, errors = finished(start("backup", place / "shop", "--data", shop))

    assert (code, errors) == (0, "")
    assert "writing orders" in output
    assert "Writes waited for 0." in output
    assert f"all {len(SHOP)} invariants" in output


def test_nothing_is_written_over(shop: Path, place: Path):
    (place / "shop").write_text("mine")

    assert "never overwrites" in refused("backup", place / "shop", "--data", shop)
    assert (place / "shop").read_text() == "mine"
    done("backup", place / "other", "--data", shop)
    assert "is there already" in refused("restore", place / "other", "--data", shop)
    (place / "new").mkdir()
    assert "is there already" in refused("restore", place / "other", "--data", place / "new")
    (place / "new").rmdir()
    assert sorted(os.listdir(place)) == ["other", "shop"]


def test_a_full_disk_leaves_no_file(shop: Path, place: Path):
    async def sentence() -> str:
        async with serving(shop):  # by a process without the limit
            return await asyncio.to_thread(refused, "backup", place / "shop", "--data", shop, file_bytes=4_096)

    assert str(place / "shop") in asyncio.run(sentence())
    assert os.listdir(place) == []


def test_ctrl_c_leaves_no_file_and_lets_writers_go_on(shop: Path, place: Path):
    async def interrupted() -> tuple[int, str, str]:
        async with serving(shop) as server:
            dsn = server.admin_dsn.replace("/postgres?", "/mercato_orders?")
            connection = await cast(Any, asyncpg).connect(dsn)
            await connection.execute("BEGIN; LOCK TABLE orders IN ROW EXCLUSIVE MODE")
            command = start("backup", place / "shop", "--data", shop)
            while "trying again" not in (line := await asyncio.to_thread(command.stdout.readline)):
                assert line, "it ended before it had to wait"
            command.send_signal(signal.SIGINT)
            ended = await asyncio.to_thread(finished, command)
            await connection.execute("UPDATE orders SET version = version; ROLLBACK")
            await connection.close()
            return ended

    code, _, errors = asyncio.run(interrupted())
    assert code == 130, errors
    assert os.listdir(place) == []


def test_a_damaged_backup_and_one_of_other_revisions_make_nothing(shop: Path, place: Path):
    done("backup", place / "shop", "--data", shop)
    whole = (place / "shop").read_bytes()
    (place / "cut").write_bytes(whole[:-100])
    with zipfile.ZipFile(place / "shop") as old, zipfile.ZipFile(place / "later", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "manifest.json":
                manifest = json.loads(content)
                manifest["databases"]["orders"]["revisions"]["9999"] = "0" * 64
                content = json.dumps(manifest).encode()
            new.writestr(name, content)

    assert "damaged" in refused("restore", place / "cut", "--data", place / "new")
    assert "orders at revision 9999" in refused("restore", place / "later", "--data", place / "new")
    assert sorted(os.listdir(place)) == ["cut", "later", "shop"]


def test_the_commands_of_the_documentation_work_as_they_stand(shop: Path, place: Path):
    section = (ROOT / "docs/operations.md").read_text().partition("## Backups")[2].partition("\n## ")[0]
    lines = [line.partition("#")[0].split() for line in section.splitlines() if line.startswith("    mercato ")]
    places = {"/backups/shop-2026-11-29": str(place / "shop"), "/srv/mercato-new": str(place / "new")}
    backing_up, restoring, starting = [[places.get(word, word) for word in line[1:]] for line in lines]

    assert finished(start(*backing_up, "--data", shop))[0] == 0
    assert finished(start(*restoring))[0] == 0
    assert starting[:2] == ["up", "--data"]
    with Process(Path(starting[2])) as running:
        assert running.ready().caller().get("/products").status == 200
        running.stop()
