"""What a command imports: a start takes longer for each library that it does not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

CLIENTS = {"nats", "aiohttp", "zeroconf"}
"""Libraries of the transports between processes and of their registries."""


@pytest.mark.parametrize("module", ["up", "serving", "serve", "looking"])
def test_no_client_library_is_imported_before_it_is_known_which_one_is_used(module: str):
    asked = f"import sys, mercato.cli.{module}; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    assert f"mercato.cli.{module}" in imported
    assert not CLIENTS & set(imported)
