"""The packages of JavaScript, or why the tests that need them are skipped."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from system.nats_js.client import MISSING, PACKAGES, installed, is_missing


@pytest.fixture(scope="session")
def packages() -> Path:
    if is_missing():
        pytest.skip(MISSING)
    try:
        return installed()
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip(f"the JavaScript client was not run: this has failed: npm install {' '.join(PACKAGES)}")
