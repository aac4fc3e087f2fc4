"""The command line. Imports nothing heavy before it knows what is wanted."""

from __future__ import annotations


def main() -> None:
    """What `mercato` runs."""
    from mercato.cli.commands import app

    app()
