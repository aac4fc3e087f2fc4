"""A data folder that the tests of a run take turns with: making a database takes longer than all that they do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mercato.testing.process import used_folder

collect_ignore_glob = [] if sys.platform.startswith("linux") else ["test_*.py"]  # they look into /proc


@pytest.fixture(scope="session")
def data() -> Iterator[Path]:
    """Nothing runs on it when a test begins, and nothing may when it ends."""
    with used_folder() as folder:
        yield folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/cli/" in str(item.path):
            item.add_marker(pytest.mark.postgres)
