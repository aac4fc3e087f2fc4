"""Journeys start the real command, and look into /proc."""

from __future__ import annotations

import sys

import pytest

collect_ignore_glob = [] if sys.platform.startswith("linux") else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/journeys/" in str(item.path):
            item.add_marker(pytest.mark.postgres)
