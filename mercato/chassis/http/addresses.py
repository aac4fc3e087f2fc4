"""What addresses have in common: the one place from which many connections or requests come."""

from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Final

IPV6_PREFIX_BITS: Final = 64
"""One customer of an internet provider has that many addresses, or more."""
REMEMBERED_ADDRESSES: Final = 4_096


@lru_cache(maxsize=REMEMBERED_ADDRESSES)
def network_of(address: str) -> str:
    """What callers from one place share: an IPv4 address, or the network of an IPv6 address."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{int(parsed) >> (128 - IPV6_PREFIX_BITS):x}"
