"""Groups client addresses by network, to limit what comes from one client."""

from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Final

IPV6_PREFIX_BITS: Final = 64
"""An internet provider gives one customer a network of this prefix, or a larger one."""
REMEMBERED_ADDRESSES: Final = 4_096


@lru_cache(maxsize=REMEMBERED_ADDRESSES)
def network_of(address: str) -> str:
    """The key by which callers are counted: an IPv4 address, or the network of an IPv6 address."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{int(parsed) >> (128 - IPV6_PREFIX_BITS):x}"
