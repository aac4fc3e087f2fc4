"""Records in Consul: a service instance for each process, with a TTL check, and the contracts that it serves as tags.

It uses the documented HTTP API (https://developer.hashicorp.com/consul/api-docs): `/v1/agent/service` and
`/v1/agent/check` to register and to renew, blocking queries on `/v1/health/service` to follow. A dead instance becomes
critical when its TTL is over, and is no longer in the answers; Consul deregisters it a minute later.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

import msgspec
import structlog

from .endpoints import ANSWER_SECONDS, Endpoints, RegistryAnswer
from .leased import TTL_SECONDS, ProcessRecord, StoreRefused

WAIT_SECONDS: Final = 10
"""The longest wait of a blocking query; Consul adds up to a sixteenth."""
PAUSE_SECONDS: Final = 0.2
"""The pause between two queries: each change in Consul may end one."""
DEREGISTER_AFTER: Final = "1m"
"""The shortest time that Consul accepts."""
INDEX: Final = "X-Consul-Index"

log = structlog.stdlib.get_logger("mercato.discovery")


class _Service(msgspec.Struct, frozen=True):
    Address: str
    Port: int
    Tags: tuple[str, ...] | None = None
    Meta: Mapping[str, str] | None = None


class _Entry(msgspec.Struct, frozen=True):
    """One instance in an answer of `/v1/health/service`."""

    Service: _Service


class ConsulStore:
    """A `Store` of the instances of the service `name`. `urls` are of agents of one data center, the nearest first."""

    def __init__(
        self,
        urls: Sequence[str],
        name: str,
        *,
        token: str = "",
        tls: ssl.SSLContext | None = None,
        ttl_seconds: int = TTL_SECONDS,
        wait_seconds: int = WAIT_SECONDS,
    ) -> None:
        self._endpoints = Endpoints("Consul", urls, tls)
        self._name = name
        self._headers = {"X-Consul-Token": token} if token else {}
        self._ttl_seconds = ttl_seconds
        self._wait_seconds = wait_seconds
        self._held: dict[str, ProcessRecord] = {}
        """The registered records, by the id of the instance in Consul."""

    async def open(self) -> None:
        self._endpoints.open()

    async def close(self) -> None:
        await self._endpoints.close()

    # -------------------------------------------------------------------------------------------------- this process

    async def hold(self, records: Sequence[ProcessRecord]) -> None:
        """Sends a request for each record, and for each one that ends; a process has one record."""
        wanted = {f"{self._name}-{record.id}-{_split(record.address)[1]}": record for record in records}
        for id_ in [id_ for id_ in self._held if id_ not in wanted]:
            await self._put(f"/v1/agent/service/deregister/{quote(id_, safe='')}", also=(404,))
            del self._held[id_]
        for id_, record in wanted.items():
            if self._held.get(id_) != record or not await self._renew(id_):
                await self._register(id_, record)

    async def _register(self, id_: str, record: ProcessRecord) -> None:
        host, port = _split(record.address)
        # It may be registered even if the answer does not arrive.
        self._held[id_] = msgspec.structs.replace(record, services=())
        await self._put(
            "/v1/agent/service/register",
            {
                "ID": id_,
                "Name": self._name,
                "Address": host,
                "Port": port,
                "Tags": record.services,
                "Meta": {"id": record.id, "version": record.version},
                "Check": {
                    "CheckID": _check_of(id_),
                    "TTL": f"{self._ttl_seconds}s",
                    "Status": "passing",
                    "DeregisterCriticalServiceAfter": DEREGISTER_AFTER,
                },
            },
        )
        self._held[id_] = record

    async def _renew(self, id_: str) -> bool:
        """False if the agent does not know the instance: it has lost its state, or another agent answers."""
        path = f"/v1/agent/check/update/{quote(_check_of(id_), safe='')}"
        given = await self._request("PUT", path, {"Status": "passing"})
        if given.status == 404 or (given.status == 500 and b"check" in given.body.lower()):  # 500: before 1.11
            return False
        self._require(given)
        return True

    # --------------------------------------------------------------------------------------------------- all processes

    async def follow(self) -> AsyncGenerator[Sequence[ProcessRecord]]:
        index = 0
        while True:
            # Without an index, Consul answers at once.
            waiting = f"&index={index}&wait={self._wait_seconds}s" if index else ""
            path = f"/v1/health/service/{quote(self._name, safe='')}?passing=true{waiting}"
            longest = ANSWER_SECONDS + (self._wait_seconds * 17 / 16 if index else 0.0)
            given = self._require(await self._request("GET", path, seconds=longest))
            try:
                entries = msgspec.json.decode(given.body, type=list[_Entry])
                now = int(given.headers.get(INDEX, ""))
            except ValueError:  # msgspec's errors are
                raise self._endpoints.unavailable(given.endpoint, "is not the API of Consul") from None
            yield [_record(entry.Service) for entry in entries]
            # An index that decreases belongs to restored servers: begin without an index. It is never below 1.
            index = 0 if now < index else max(now, 1)
            await asyncio.sleep(PAUSE_SECONDS)

    # ------------------------------------------------------------------------------------------------------- requests

    async def _put(self, path: str, body: Mapping[str, Any] | None = None, *, also: Sequence[int] = ()) -> None:
        given = await self._request("PUT", path, body)
        if given.status not in also:
            self._require(given)

    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, seconds: float = ANSWER_SECONDS
    ) -> RegistryAnswer:
        content = None if body is None else msgspec.json.encode(body)
        return await self._endpoints.request(method, path, body=content, headers=self._headers, seconds=seconds)

    def _require(self, given: RegistryAnswer) -> RegistryAnswer:
        """The answer, if it is a 200. Raises `StoreUnavailable`, or `StoreRefused`."""
        if given.status == 200:
            return given
        said = given.body[:200].decode("utf-8", "replace").strip()
        if given.status in (401, 403):
            raise StoreRefused(
                "Consul does not accept what this process asks with its token: look at MERCATO_REGISTRY_TOKEN; it "
                f"needs service:write for {self._name!r}, service:read and node:read"
            )
        raise self._endpoints.unavailable(given.endpoint, f"answers {given.status}: {said}")


def _record(service: _Service) -> ProcessRecord:
    said = service.Meta or {}
    host = f"[{service.Address}]" if ":" in service.Address else service.Address
    return ProcessRecord(
        said.get("id", ""), f"{host}:{service.Port}", tuple(service.Tags or ()), said.get("version", "")
    )


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _check_of(id_: str) -> str:
    return f"service:{id_}"
