"""Tests of services run over both transports; over loopback by `make test-all`.

What differs between the transports has tests of its own (`tests/chassis`, `tests/reference`, `tests/system`), which
`make test` runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        callspec = getattr(item, "callspec", None)
        if HERE in item.path.parents and callspec is not None and "loopback" in callspec.params.values():
            item.add_marker(pytest.mark.long)
