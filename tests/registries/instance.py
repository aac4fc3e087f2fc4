"""A process that registers one instance and does no more, for tests that kill or stop it.

python -m registries.instance etcd|consul URL NAME TTL ADDRESS ID
"""

from __future__ import annotations

import asyncio
import sys

from mercato.chassis.rpc.discovery import Instance
from registries.stores import registry


async def main(kind: str, url: str, name: str, ttl: str, address: str, id_: str) -> None:
    registered = registry(kind, [url], name, ttl_seconds=int(ttl))
    await registered.open()
    await registered.register(Instance("orders", address, id_, "1.2.3"))
    print("registered", flush=True)  # noqa: T201  # its parent waits for it
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
