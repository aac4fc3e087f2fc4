"""A client of the shop leaves while its read waits: its place and its batch are free at once."""

from __future__ import annotations

import asyncio
import socket
import struct

from gateway.test_shedding import locked
from mercato.testing.cluster import Cluster
from mercato.testing.shop import Shop
from mercato.testing.waiting import until_true


async def test_read_whose_client_has_left_is_not_awaited(cluster: Cluster) -> None:
    shop = await Shop.start(cluster)
    try:
        async with locked(shop, "products", of="products"):
            address = shop.url.removeprefix("http://")
            _, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
            writer.write(f"GET /products/100 HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
            await until_true(lambda: shop.load.in_work == 1, "it is in work")
            at_once = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            writer.transport.abort()
            await until_true(lambda: shop.load.in_work == 0, "it was cancelled, though the table is locked still")
        assert (await shop.get("/products/100")).status == 200
    finally:
        await shop.close()
