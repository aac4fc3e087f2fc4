"""Who may do what in a shop that was started with `mercato up`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mercato.cli.preparing import STAFF_EMAIL
from mercato.testing.process import Process, data_folder

METRICS_TOKEN = "a-token-of-the-collector-of-metrics-0123456789"


def test_a_guarded_shop_prints_its_staff_password_once_and_requires_tokens():
    with data_folder() as data:
        with Process(data, "--auth", "required", as_json=False) as shop, shop.ready().caller() as caller:
            printed = re.search(r"^Staff account +(\S+) +password +(\S+) ", shop.output, re.MULTILINE)
            assert printed is not None
            assert "POST /login" in shop.output
            email, password = printed.groups()

            for path in ("/orders", "/users?id=1"):
                assert caller.get(path).status == 401
            assert caller.order().status == 401

            caller.sign_in(email, password)
            assert caller.get("/users?id=1").status == 200
            shop.stop()
        with Process(data, "--host", "0.0.0.0", environment={"MERCATO_METRICS_TOKEN": METRICS_TOKEN}) as shop:
            shop.ready()
            shop.url = shop.url.replace("0.0.0.0", "127.0.0.1")
            with shop.caller() as caller:
                assert password not in shop.output
                assert [event["event"] for event in shop.events if event["event"] == "staff"] == []
                assert caller.get("/orders").status == 401
                assert caller.get("/metrics", Host="shop.example").status == 401
                collected = caller.get("/metrics", Host="shop.example", Authorization=f"Bearer {METRICS_TOKEN}")
                assert collected.status == 200
                caller.sign_in(email, password)
                assert caller.get("/orders").status == 200
            shop.stop()


@pytest.mark.long
def test_programs_get_the_staff_password_as_an_event(data: Path):
    with Process(data, "--auth", "required") as shop, shop.ready().caller() as caller:
        staff = next(event for event in shop.events if event["event"] == "staff")

        assert caller.sign_in(staff["email"], staff["password"]).json["user"]["role"] == "staff"
        assert shop.events[-1]["event"] == "ready"
        shop.stop()


def test_an_open_shop_takes_an_anonymous_caller_for_staff(data: Path):
    with Process(data, "--host", "localhost") as shop, shop.ready().caller() as caller:
        assert caller.get("/orders").status == 200
        assert caller.order().status == 201
        shop.stop()


@pytest.mark.long
def test_a_customer_with_the_address_of_staff_is_not_taken_for_staff():
    with data_folder() as data:
        with Process(data) as shop, shop.ready().caller() as caller:
            account = {"email": STAFF_EMAIL, "name": "Mallory", "password": "a long enough password"}
            user_id = caller.post("/register", account).json["id"]
            shop.stop()
        with Process(data, "--auth", "required") as shop:
            assert STAFF_EMAIL in shop.refusal()
        with Process(data) as shop, shop.ready().caller() as caller:
            assert caller.call("PUT", f"/users/{user_id}/role", {"role": "staff"}).status == 200
            shop.stop()
        with Process(data, "--auth", "required") as shop:
            shop.ready().stop()
