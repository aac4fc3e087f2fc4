"""`mercato up` on a PostgreSQL that is run elsewhere, named by MERCATO_POSTGRES_DSN."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from mercato.chassis.hosting.keys import key_deriver
from mercato.chassis.postgres.provisioning import service_dsn
from mercato.testing.cluster import Cluster
from mercato.testing.process import Process

SECRET = "a secret of at least thirty-two characters"


@pytest.fixture
def environment(cluster: Cluster) -> Mapping[str, str]:
    return {"MERCATO_POSTGRES_DSN": cluster.server.admin_dsn, "MERCATO_SECRET": SECRET}


def test_two_shops_on_one_server_are_one_shop(tmp_path: Path, environment: Mapping[str, str]):
    with (
        Process(tmp_path / "a", environment=environment) as first,
        Process(tmp_path / "b", "--workers", "2", environment=environment) as second,
        first.ready().caller() as here,
        second.ready().caller() as there,
    ):
        order = here.order("one-key-two-machines")
        assert order.status == 201

        assert there.get(f"/orders/{order.json['id']}").json == order.json
        assert there.order("one-key-two-machines").json == order.json
        assert first.tree().guard is None

        first.stop()
        assert there.order().status == 201
        second.stop()


def test_a_token_of_one_machine_is_good_on_the_other(tmp_path: Path, environment: Mapping[str, str]):
    with (
        Process(tmp_path / "a", "--auth", "required", environment=environment) as first,
        Process(tmp_path / "b", "--auth", "required", environment=environment) as second,
        first.ready().caller() as here,
        second.ready().caller() as there,
    ):
        here.sign_in("alice@example.com", "demo-password")
        there.token = here.token

        assert there.order().status == 201


def test_a_wrong_password_is_named(tmp_path: Path, environment: Mapping[str, str]):
    dsn = environment["MERCATO_POSTGRES_DSN"].replace("test-password", "hunter2")
    with Process(tmp_path / "data", environment={**environment, "MERCATO_POSTGRES_DSN": dsn}) as shop:
        sentence = shop.refusal()

    assert "password authentication failed" in sentence
    assert "hunter2" not in sentence


def test_where_everything_is_made_a_role_that_may_make_nothing_is_enough(
    tmp_path: Path, environment: Mapping[str, str]
):
    with Process(tmp_path / "a", environment=environment) as shop:
        shop.ready().stop()
    dsn = plain_dsn(environment["MERCATO_POSTGRES_DSN"])

    with Process(tmp_path / "b", environment={**environment, "MERCATO_POSTGRES_DSN": dsn}) as shop:
        shop.ready().stop()


def plain_dsn(admin_dsn: str) -> str:
    """Of the role of a service, which may connect to its own database only."""
    password = key_deriver(SECRET.encode())("postgres/mercato_users").hex()
    return service_dsn(admin_dsn, "mercato_users", password)
