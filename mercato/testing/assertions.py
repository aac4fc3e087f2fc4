"""Tests of what the package asserts: declarations that are wrong in its code, which are found when it is imported."""

from __future__ import annotations

from typing import Final

import pytest

needs_assertions: Final = pytest.mark.skipif(not __debug__, reason="`python -O` does not run assertions")
