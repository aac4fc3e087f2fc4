"""The catalogue of the demo shop, which the examples of the documentation use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mercato.chassis.observability import faults
from mercato.chassis.postgres.database import Database
from mercato.contracts.products import CreateProduct

from . import store
from .rules import found_by

SEED_BEFORE_COMMIT: Final = "products.seed.before_commit"

faults.declare(SEED_BEFORE_COMMIT)


async def seed(database: Database) -> bool:
    """Inserts the demo catalogue into an empty database, all of it or nothing. Gives False where a product exists."""
    async with database.transaction() as tx:
        if not await store.lock_catalogue(tx):
            return False
        await store.insert_many(tx, CATALOGUE)
        await store.fill_terms(tx, [product_id for product_id, _ in CATALOGUE], [found_by(p) for _, p in CATALOGUE])
        await faults.point(SEED_BEFORE_COMMIT)
    return True


# Id, sku, name, price in cents, description.
_SHELVES: Final[Mapping[str, tuple[tuple[int, str, str, int, str], ...]]] = {
    "computers": (
        (1, "P1", "Laptop", 1299_99, "A 14-inch laptop with 32 GB of memory and a day of battery."),
        (3, "DESK-3", "Desktop Computer", 1049_00, "A quiet eight-core computer in a case of four litres."),
        (4, "MONI-4", 'Monitor 27"', 329_00, "A 27-inch 4K monitor that charges a laptop through the same cable."),
        (5, "KEYB-5", "Mechanical Keyboard", 119_00, "A compact mechanical keyboard with replaceable switches."),
        (6, "MOUS-6", "Wireless Mouse", 39_95, "A wireless mouse for either hand that runs a year on one AA cell."),
        (7, "DRIV-7", "Portable SSD 2 TB", 149_00, "A shock-proof solid-state drive the size of a matchbox."),
        (8, "DOCK-8", "USB-C Dock", 89_50, "A dock with two display outputs, Ethernet and five USB ports."),
    ),
    "phones": (
        (2, "P2", "Smartphone", 899_99, "A 6.1-inch smartphone with two cameras and seven years of updates."),
        (9, "TABL-9", "Tablet", 449_00, "An 11-inch tablet for reading and drawing; the pen is included."),
        (10, "WATC-10", "Smartwatch", 229_00, "A smartwatch with heart rate, GPS and ten days between charges."),
        (11, "CHAR-11", "Fast Charger 65 W", 34_99, "A wall charger with two USB-C ports, for phone and laptop."),
        (12, "BANK-12", "Power Bank 20 000 mAh", 44_99, "A power bank for four charges; allowed on planes."),
        (13, "CASE-13", "Phone Case", 19_99, "A slim recycled case that survives a fall from two metres."),
        (14, "CABL-14", "USB-C Cable 2 m", 12_49, "A braided two-metre cable for charging at up to 100 W."),
    ),
    "audio": (
        (100, "HEAD-100", "Headphones", 99_99, "Over-ear headphones with noise cancelling and 30 hours of battery."),
        (101, "EARB-101", "Wireless Earbuds", 79_99, "Small wireless earbuds, proof against rain and sweat."),
        (102, "SPKR-102", "Bluetooth Speaker", 59_00, "A waterproof speaker that floats, with 15 hours of music."),
        (103, "MICR-103", "USB Microphone", 129_00, "A condenser microphone for calls and podcasts."),
        (104, "TURN-104", "Turntable", 249_00, "A belt-driven turntable with a built-in preamplifier."),
        (105, "SBAR-105", "Soundbar", 199_00, "A soundbar that makes voices clear at low volume."),
    ),
    "home-office": (
        (200, "LAMP-200", "Desk Lamp", 54_90, "A dimmable LED lamp with a long arm, free of flicker."),
        (201, "CHAI-201", "Office Chair", 379_00, "An adjustable office chair with a twelve-year guarantee."),
        (202, "STND-202", "Standing Desk", 499_00, "An electric standing desk that remembers four heights."),
        (203, "NOTE-203", "Notebook A5", 9_90, "A dotted notebook with 192 numbered pages that lies flat when open."),
        (204, "BPAK-204", "Backpack 22 l", 89_00, "A backpack with a padded sleeve for a laptop."),
    ),
}

CATALOGUE: Final = tuple(
    (
        product_id,
        CreateProduct(
            sku=sku, name=name, price_minor=cents, currency="USD", category=category, description=description
        ),
    )
    for category, shelf in _SHELVES.items()
    for product_id, sku, name, cents, description in shelf
)
"""Ids and products. Ids up to 1000 are reserved for them: the sequence of the database begins above."""
