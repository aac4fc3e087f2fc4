"""The registry that is a list in a setting."""

from __future__ import annotations

import pytest

from mercato.chassis.rpc.discovery import Instance, Registry
from mercato.chassis.rpc.discovery.static import EXAMPLE, MalformedInstances, StaticRegistry

SETTING = "MERCATO_INSTANCES"


def parse(text: str) -> StaticRegistry:
    return StaticRegistry.parse(text, setting=SETTING)


def addresses(registry: Registry, service: str) -> list[str]:
    return [instance.address for instance in registry.instances(service)]


def test_each_service_has_its_addresses():
    registry = parse(" orders = 127.0.0.1:8083 , [::1]:9083 ; orders.log=shop.internal:1;users=10.0.0.7:65535; ")
    assert addresses(registry, "orders") == ["127.0.0.1:8083", "[::1]:9083"]
    assert addresses(registry, "orders.log") == ["shop.internal:1"]
    assert addresses(registry, "users") == ["10.0.0.7:65535"]
    assert registry.instances("users") == (Instance("users", "10.0.0.7:65535", "10.0.0.7:65535"),)


def test_a_mapping_says_the_same_as_a_text():
    registry = StaticRegistry.of({"orders": "127.0.0.1:8083,127.0.0.1:9083"}, setting=SETTING)
    assert registry.instances("orders") == parse("orders=127.0.0.1:8083,127.0.0.1:9083").instances("orders")


@pytest.mark.parametrize("text", ["", " ", ";", "users=127.0.0.1:1"])
def test_a_service_that_is_not_listed_has_no_instances(text: str):
    assert parse(text).instances("orders") == ()


def test_the_example_of_the_error_can_be_read():
    assert len(addresses(parse(EXAMPLE), "orders")) == 2


def test_a_listener_is_taken_and_let_go():
    parse(EXAMPLE).watch(lambda service: None)()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("orders", "'orders' has no '='"),
        ("orders 127.0.0.1:8083", "has no '='"),
        ("=127.0.0.1:8083", "'' is not the name of a service"),
        ("Orders!=127.0.0.1:8083", "'Orders!' is not the name of a service"),
        ("orders=", "'orders' has an empty address"),
        ("orders=127.0.0.1:8083,", "'orders' has an empty address"),
        ("orders=127.0.0.1", "'127.0.0.1' of 'orders' is not an address"),
        ("orders=::1:8083", "'::1:8083' of 'orders' is not an address"),
        ("orders=http://127.0.0.1:8083", "is not an address"),
        ("orders=127.0.0.1:8083/path", "is not an address"),
        ("orders=user@127.0.0.1:8083", "is not an address"),
        ("orders=127.0.0.1:http", "is not an address"),
        ("orders=127.0.0.1:0", "the port of '127.0.0.1:0' is not one from 1 to 65535"),
        ("orders=127.0.0.1:65536", "the port of '127.0.0.1:65536' is not one"),
        ("orders=127.0.0.1:1,127.0.0.1:1", "an address of 'orders' is listed twice"),
        ("orders=127.0.0.1:1; orders=127.0.0.1:2", "'orders' is listed twice"),
    ],
)
def test_a_malformed_list_names_the_setting_the_problem_and_the_way_out(text: str, problem: str):
    with pytest.raises(MalformedInstances) as error:
        parse(text)
    assert f"The setting {SETTING} is not valid: " in str(error.value)
    assert problem in str(error.value)
    assert EXAMPLE in str(error.value)
