"""The settings of etcd and Consul: what is wrong is named, and no password or token is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mercato.chassis.hosting.settings import ServeSettings, SettingsError
from mercato.chassis.rpc.discovery.leased import LeasedRegistry
from mercato.cli import environment
from mercato.testing.certificates import certificate

HERE = "http://127.0.0.1:2379"


def settings(**given: Any) -> ServeSettings:
    return ServeSettings.model_validate({"registry": "etcd", "registry_url": HERE, "public_keys": "of a shop", **given})


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"registry_url": "http://127.0.0.1:2379, http://localhost:2380/ https://[::1]:2381"},
        {"registry_url": "https://10.0.0.5:2379"},
        {"registry_url": "http://10.0.0.5:2379", "plaintext": "everywhere"},
        {"registry_user": "shop", "registry_password": "hunter2", "rpc_address": "10.0.0.5:9083"},
        {"registry": "consul", "registry_url": "http://127.0.0.1:8500"},
        {"registry": "consul", "registry_url": "http://127.0.0.1:8500", "registry_token": "hunter2"},
    ],
)
def test_a_process_registers_itself_in_the_registry_where_it_finds_others(given: dict[str, Any]):
    registry, registrar = environment.registry(settings(**given))
    assert isinstance(registry, LeasedRegistry)
    assert registrar is registry


def test_certificates_of_a_registry(tmp_path: Path):
    cert, key = certificate(tmp_path)
    remote = {"registry_url": "https://10.0.0.5:2379"}
    environment.registry(settings(**remote, tls_ca=cert, tls_cert=cert, tls_key=key))
    environment.registry(settings(**remote, registry_ca=cert))
    with pytest.raises(SettingsError, match="MERCATO_REGISTRY_CA or MERCATO_TLS_CA, _CERT and _KEY cannot be used"):
        environment.registry(settings(**remote, registry_ca=tmp_path / "none.pem"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"registry_url": ""}, "The setting MERCATO_REGISTRY_URL is missing: with MERCATO_REGISTRY=etcd it is where"),
        ({"registry_url": ", "}, "The setting MERCATO_REGISTRY_URL is missing"),
        ({"registry_url": "127.0.0.1:2379"}, "'127.0.0.1:2379' is not a URL with a port, as in https://10.0.0.5:2379"),
        ({"registry_url": "http://127.0.0.1"}, "'http://127.0.0.1' is not a URL with a port"),
        ({"registry_url": "http://127.0.0.1:99999"}, "is not a URL with a port"),
        ({"registry_url": "http://[::1:2379"}, "is not a URL with a port"),
        ({"registry_url": f"{HERE}/v3"}, "is not a URL with a port"),
        ({"registry_url": f"{HERE},nats://127.0.0.1:4222"}, "'nats://127.0.0.1:4222' is not a URL with a port"),
        ({"registry_url": "http://shop:hunter2@127.0.0.1:2379"}, "write these in MERCATO_REGISTRY_USER and"),
        ({"registry_url": "http://10.0.0.5:2379"}, "MERCATO_REGISTRY_URL names 10.0.0.5 without encryption: write htt"),
        ({"registry_user": "shop"}, "The setting MERCATO_REGISTRY_PASSWORD is missing"),
        ({"registry_password": "hunter2"}, "The setting MERCATO_REGISTRY_USER is missing"),
        ({"registry": "consul", "registry_token": "hunter2\n"}, "The setting MERCATO_REGISTRY_TOKEN is not valid"),
        ({"registry": "consul", "registry_url": ""}, "as in http://127.0.0.1:8500."),
        ({"rpc_address": "0.0.0.0:9083"}, "MERCATO_RPC_ADDRESS has 0.0.0.0; with MERCATO_REGISTRY=etcd it is the one"),
        ({"public_keys": ""}, "MERCATO_PUBLIC_KEYS is missing"),
    ],
)
def test_a_wrong_setting_is_named_and_no_secret_is_shown(given: dict[str, Any], words: str):
    with pytest.raises(SettingsError) as error:
        environment.registry(settings(**given))
    assert words in str(error.value)
    assert "hunter2" not in str(error.value)


def test_each_shop_has_a_place_of_its_own():
    """What one registers is not looked for by the other."""
    assert environment._shop(settings()) != environment._shop(settings(public_keys="of another"))
