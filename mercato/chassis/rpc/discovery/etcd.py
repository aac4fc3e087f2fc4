"""Records in etcd 3.4 or newer: a key for each process under one prefix, all with the lease of their process.

It uses etcd's gateway for JSON over HTTP (https://etcd.io/docs/v3.5/dev-guide/api_grpc_gateway/);
`docs/decisions/0031-etcd-and-consul-by-http.md` says why it uses no library.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
import structlog

from .endpoints import Endpoints, RegistryAnswer
from .leased import TTL_SECONDS, ProcessRecord, StoreRefused, StoreUnavailable

CHECK_SECONDS: Final = 5.0
"""All keys are read again when nothing has arrived for so long: a connection may be dead without an error."""
BREAK_SECONDS: Final = 0.2
"""The pause between the end of a stream and the next one."""

INVALID, NOT_FOUND, DENIED, UNAUTHENTICATED = 3, 5, 7, 16
"""gRPC status codes."""
NO_AUTHENTICATION: Final = "authentication is not enabled"
LOGIN_AGAIN: Final = (
    "user name is empty",
    "invalid auth token",
    "revision of auth store is old",
    "revision in header is old",
)

T = TypeVar("T")
log = structlog.stdlib.get_logger("mercato.discovery")


class _Header(msgspec.Struct, frozen=True):
    revision: str = "0"


class _Pair(msgspec.Struct, frozen=True):
    """A key and its value, both in base64."""

    key: str
    value: str = ""


class _Range(msgspec.Struct, frozen=True):
    header: _Header
    kvs: tuple[_Pair, ...] = ()


class _Lease(msgspec.Struct, frozen=True):
    ID: str
    TTL: str = "0"


class _Renewed(msgspec.Struct, frozen=True):
    result: _Lease


class _Token(msgspec.Struct, frozen=True):
    token: str


class _Event(msgspec.Struct, frozen=True):
    kv: _Pair
    type: str = "PUT"


class _Watched(msgspec.Struct, frozen=True):
    canceled: bool = False
    events: tuple[_Event, ...] = ()


class _Line(msgspec.Struct, frozen=True):
    """A line of the stream of a watch. One without a result is an error, after which the stream ends."""

    result: _Watched | None = None


class _Failure(msgspec.Struct, frozen=True):
    code: int
    message: str = ""
    error: str = ""


class EtcdError(StoreUnavailable):
    """An error that etcd answers, with its gRPC status code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"etcd answers: {message}")
        self.code = code


class EtcdStore:
    """A `Store` of the keys under `prefix`. `urls` are of the members of one cluster. `user` empty: without a token."""

    def __init__(
        self,
        urls: Sequence[str],
        prefix: str,
        *,
        user: str = "",
        password: str = "",
        tls: ssl.SSLContext | None = None,
        ttl_seconds: int = TTL_SECONDS,
        check_seconds: float = CHECK_SECONDS,
    ) -> None:
        self._endpoints = Endpoints("etcd", urls, tls)
        self._prefix = prefix
        self._keys = {"key": _encoded(prefix), "range_end": _encoded(prefix[:-1] + chr(ord(prefix[-1]) + 1))}
        self._user = user
        self._password = password
        self._ttl_seconds = ttl_seconds
        self._check_seconds = check_seconds
        self._token: str | None = None
        """None: not requested yet; empty: etcd has no authentication."""
        self._lease = ""
        self._held: dict[str, ProcessRecord] = {}
        """The records that are known to be written with this lease, by key."""
        self._written: set[str] = set()
        """The keys that may exist with this lease."""

    async def open(self) -> None:
        self._endpoints.open()

    async def close(self) -> None:
        await self._endpoints.close()

    # -------------------------------------------------------------------------------------------------- this process

    async def hold(self, records: Sequence[ProcessRecord]) -> None:
        """Sends one request, if nothing has changed."""
        wanted = {f"{self._prefix}{record.address}/{record.id}": record for record in records}
        if not wanted:
            await self._revoke()
            return
        if self._lease and not await self._renew():
            self._forget()
        if not self._lease:
            granted = await self._call("/v3/lease/grant", {"TTL": str(self._ttl_seconds)}, _Lease)
            self._lease = granted.ID
        if self._held != wanted:
            try:
                await self._write(wanted)
            except EtcdError as error:
                if error.code == NOT_FOUND:  # the lease has just ended
                    self._forget()
                raise

    async def _renew(self) -> bool:
        """False if the lease has ended."""
        renewed = await self._call("/v3/lease/keepalive", {"ID": self._lease}, _Renewed)
        return int(renewed.result.TTL) > 0

    async def _write(self, wanted: Mapping[str, ProcessRecord]) -> None:
        changes: list[Mapping[str, Any]] = []
        for key, record in wanted.items():
            if self._held.get(key) != record:
                value = _encoded(msgspec.json.encode(record))
                changes.append({"request_put": {"key": _encoded(key), "value": value, "lease": self._lease}})
        changes += [{"request_delete_range": {"key": _encoded(key)}} for key in self._written - wanted.keys()]
        self._written |= wanted.keys()
        await self._call("/v3/kv/txn", {"success": changes}, dict[str, Any])
        self._held = dict(wanted)
        self._written = set(wanted)

    async def _revoke(self) -> None:
        if self._lease:
            try:
                await self._call("/v3/lease/revoke", {"ID": self._lease}, dict[str, Any])
            except EtcdError as error:
                if error.code != NOT_FOUND:
                    raise
        self._forget()

    def _forget(self) -> None:
        """Resets the state of this lease, which has ended together with its keys."""
        self._lease = ""
        self._held = {}
        self._written = set()

    # --------------------------------------------------------------------------------------------------- all processes

    async def follow(self) -> AsyncGenerator[Sequence[ProcessRecord]]:
        while True:
            answer = await self._call("/v3/kv/range", self._keys, _Range)
            found = {pair.key: pair.value for pair in answer.kvs}
            yield self._read(found)
            request = {"create_request": {**self._keys, "start_revision": str(int(answer.header.revision) + 1)}}
            with contextlib.suppress(StoreUnavailable):  # the next range request raises the reason
                async with contextlib.aclosing(self._watch(request)) as changes:
                    async for events in changes:
                        for event in events:
                            if event.type == "DELETE":
                                found.pop(event.kv.key, None)
                            else:
                                found[event.kv.key] = event.kv.value
                        yield self._read(found)
            await asyncio.sleep(BREAK_SECONDS)

    async def _watch(self, request: Mapping[str, Any]) -> AsyncGenerator[Sequence[_Event]]:
        """The changes. Ends when the stream can no longer give all of them."""
        stream = self._endpoints.stream(
            "/v3/watch", body=msgspec.json.encode(request), headers=self._headers(), idle_seconds=self._check_seconds
        )
        async with contextlib.aclosing(stream) as lines:
            async for line in lines:
                try:
                    watched = msgspec.json.decode(line, type=_Line).result
                except msgspec.MsgspecError:
                    return
                if watched is None or watched.canceled:
                    return
                if watched.events:
                    yield watched.events

    def _read(self, found: Mapping[str, str]) -> Sequence[ProcessRecord]:
        """The records of all processes. A missing record of this process is written again with the next renewal."""
        for key in [key for key in self._held if _encoded(key) not in found]:
            del self._held[key]
        records = list[ProcessRecord]()
        for key, value in found.items():
            try:
                records.append(msgspec.json.decode(base64.b64decode(value), type=ProcessRecord))
            except (msgspec.MsgspecError, ValueError):
                log.warning("service_not_resolved", name=_decoded(key), reason="malformed")
        return records

    # ----------------------------------------------------------------------------------------------------- the gateway

    async def _call(self, path: str, body: Mapping[str, Any], answer: type[T]) -> T:
        """Raises `StoreUnavailable`: also its subclasses `StoreRefused`, and `EtcdError` with a code."""
        if self._user and self._token is None:
            await self._authenticate()
        try:
            return await self._ask(path, body, answer)
        except EtcdError as error:
            if not (self._user and (error.code == UNAUTHENTICATED or any(said in str(error) for said in LOGIN_AGAIN))):
                raise
        await self._authenticate()
        return await self._ask(path, body, answer)

    async def _ask(self, path: str, body: Mapping[str, Any], answer: type[T]) -> T:
        given = await self._endpoints.request("POST", path, body=msgspec.json.encode(body), headers=self._headers())
        if given.status == 200:
            try:
                return msgspec.json.decode(given.body, type=answer)
            except msgspec.MsgspecError:
                raise self._endpoints.unavailable(given.endpoint, "is not the API of etcd, version 3") from None
        raise self._failure(given)

    async def _authenticate(self) -> None:
        self._token = None
        try:
            given = await self._ask("/v3/auth/authenticate", {"name": self._user, "password": self._password}, _Token)
        except EtcdError as error:
            if NO_AUTHENTICATION in str(error):
                self._token = ""
                return
            raise StoreRefused(
                f"etcd does not accept the user {self._user!r} with this password: look at "
                "MERCATO_REGISTRY_USER and MERCATO_REGISTRY_PASSWORD"
            ) from error
        self._token = given.token

    def _headers(self) -> Mapping[str, str]:
        return {"Authorization": self._token} if self._token else {}

    def _failure(self, given: RegistryAnswer) -> Exception:
        try:
            said = msgspec.json.decode(given.body, type=_Failure)
        except msgspec.MsgspecError:
            return self._endpoints.unavailable(given.endpoint, f"answers {given.status}, as the API of etcd does not")
        code, message = said.code, (said.message or said.error).removeprefix("etcdserver: ")
        if code == DENIED:
            return StoreRefused(
                f"etcd does not let the user {self._user!r} read and write below {self._prefix}: "
                f"`etcdctl role grant-permission ROLE --prefix=true readwrite {self._prefix}`"
            )
        if code == INVALID and not self._user:
            return StoreRefused("etcd asks for a user: set MERCATO_REGISTRY_USER and MERCATO_REGISTRY_PASSWORD")
        if code in (INVALID, NOT_FOUND, UNAUTHENTICATED) or NO_AUTHENTICATION in message:
            return EtcdError(code, message)
        return self._endpoints.unavailable(given.endpoint, f"answers: {message}")


def _encoded(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode("ascii")


def _decoded(key: str) -> str:
    return base64.b64decode(key).decode("utf-8", "replace")
