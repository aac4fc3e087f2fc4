"""Fault points: free when unused, and only where a module declares one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mercato.chassis.observability import faults


@pytest.fixture
def point() -> Iterator[str]:
    faults.declare("tests.here")
    yield "tests.here"
    faults.POINTS.discard("tests.here")


async def test_an_injected_fault_happens_until_it_is_removed(point: str):
    seen: list[str] = []

    async def note(name: str) -> None:
        seen.append(name)

    remove = faults.inject(point, note)
    await faults.point(point)
    remove()
    await faults.point(point)
    assert seen == [point]


def test_a_fault_at_an_undeclared_point_is_refused():
    with pytest.raises(KeyError):
        faults.inject("tests.nowhere", faults.hang)


@pytest.mark.parametrize("value", ["tests.here", "tests.here=explode", "tests.nowhere=kill", "=kill"])
def test_a_wrong_setting_names_itself(point: str, value: str):
    with pytest.raises(ValueError, match="MERCATO_FAULTS"):
        faults.inject_from_environment(value)
