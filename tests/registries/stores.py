"""Registries of both kinds, as tests make them."""

from __future__ import annotations

from collections.abc import Sequence

from mercato.chassis.rpc.discovery.consul import ConsulStore
from mercato.chassis.rpc.discovery.etcd import EtcdStore
from mercato.chassis.rpc.discovery.leased import FIRST_SECONDS, TTL_SECONDS, LeasedRegistry


def registry(
    kind: str, urls: Sequence[str], name: str, *, ttl_seconds: int = TTL_SECONDS, first_seconds: float = FIRST_SECONDS
) -> LeasedRegistry:
    """Of the shop `name`. Changes are notified: nothing is polled within a test."""
    store = (
        EtcdStore(urls, f"/tests/{name}/", ttl_seconds=ttl_seconds, check_seconds=600.0)
        if kind == "etcd"
        else ConsulStore(urls, f"tests-{name}", ttl_seconds=ttl_seconds, wait_seconds=1)
    )
    return LeasedRegistry(store, ttl_seconds=ttl_seconds, first_seconds=first_seconds)
