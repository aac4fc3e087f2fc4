"""Mercato: an e-commerce backend of small services behind one gateway.

Start reading at `docs/architecture.md`, then `mercato/contracts/orders.py`, then `mercato/services/orders/`.
"""

__version__ = "0.3.0"
