"""Balancing with a clock that the tests move."""

from __future__ import annotations

import random

import pytest

from chassis.rpc.breakers import ManualClock
from mercato.chassis.rpc.balancing import (
    FIRST_PAUSE_SECONDS,
    LONGEST_DRAIN_SECONDS,
    LONGEST_PAUSE_SECONDS,
    PROBE_SECONDS,
    Balancer,
    Pick,
)
from mercato.chassis.rpc.discovery import Instance

A, B, C = (Instance("stock", f"127.0.0.1:{port}", "1") for port in (1, 2, 3))


class Case:
    """A balancer whose chance says 0.0: of the available instances it names the first ones, and jitter is none."""

    def __init__(self, *instances: Instance) -> None:
        self.clock = ManualClock()
        self.balancer = Balancer(clock=self.clock, chance=lambda: 0.0)
        self.balancer.update(instances)

    def pick(self, *tried: Instance) -> Pick:
        pick = self.balancer.pick(1, tried)
        assert pick is not None
        return pick

    def nothing(self) -> bool:
        return self.balancer.pick(1) is None

    def eject(self) -> None:
        self.pick().failed()


def test_without_instances_there_is_no_pick():
    assert Case().nothing()


def test_of_two_the_one_with_fewer_requests_in_flight_gets_the_batch():
    case = Case(A, B)
    large = case.balancer.pick(10)
    assert large is not None
    assert large.instance == A
    assert [case.pick().instance for _ in range(5)] == [B] * 5
    large.answered()
    assert case.pick().instance == A


def test_many_instances_share_the_load_evenly():
    instances = [Instance("stock", f"127.0.0.1:{port}", "1") for port in range(1, 11)]
    balancer = Balancer(clock=ManualClock(), chance=random.Random(7).random)
    balancer.update(instances)
    picks = [balancer.pick(1) for _ in range(1_000)]
    counts = [sum(pick is not None and pick.instance == i for pick in picks) for i in instances]
    assert sum(counts) == 1_000
    # The most is within a few of the mean; with one choice it would be within a few dozen.
    assert max(counts) - min(counts) <= 10


def test_an_instance_that_was_tried_is_not_picked_again():
    case = Case(A, B)
    assert case.pick(A).instance == B
    assert case.balancer.pick(1, [A, B]) is None


def test_a_transport_error_ejects_and_an_answer_does_not():
    case = Case(A)
    case.pick().answered()
    assert not case.nothing()
    case.eject()
    assert case.nothing()


def test_after_the_pause_one_probe_goes_out_and_its_answer_restores():
    case = Case(A, B)
    case.eject()
    assert [case.pick().instance for _ in range(3)] == [B] * 3
    case.clock.seconds += FIRST_PAUSE_SECONDS
    probe = case.pick()
    assert (probe.instance, probe.is_probe) == (A, True)
    assert [case.pick().instance for _ in range(3)] == [B] * 3
    probe.answered()
    after = case.pick()
    assert (after.instance, after.is_probe) == (A, False)


def test_each_failed_probe_doubles_the_pause_up_to_the_cap():
    case, pauses = Case(A, B), list[float]()
    case.eject()
    for _ in range(8):
        begun = case.clock.seconds
        while not (probe := case.pick()).is_probe:
            probe.answered()
            case.clock.seconds += FIRST_PAUSE_SECONDS / 2
        pauses.append(case.clock.seconds - begun)
        probe.failed()
    assert pauses[:5] == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert pauses[5:] == [LONGEST_PAUSE_SECONDS] * 3


def test_the_last_that_is_left_may_be_back_before_its_next_probe():
    """A was paused for long; when B goes, A is tried out of turn by every batch, and its first answer restores it."""
    case = Case(A, B)
    for _ in range(4):
        case.eject()
        case.clock.seconds += LONGEST_PAUSE_SECONDS
        case.pick()
    case.eject()
    case.clock.seconds += FIRST_PAUSE_SECONDS / 2
    case.pick().drains(30.0)
    assert case.nothing(), "each was paused a moment ago"
    case.clock.seconds += FIRST_PAUSE_SECONDS
    picks = [case.pick(B) for _ in range(3)]
    assert {pick.instance for pick in picks} == {A}
    picks[0].answered()
    assert (case.pick().instance, case.pick().is_probe) == (A, False)


def test_after_an_answer_the_pauses_begin_anew():
    case = Case(A)
    for _ in range(3):
        case.eject()
        case.clock.seconds += LONGEST_PAUSE_SECONDS
    case.pick().answered()
    case.eject()
    case.clock.seconds += FIRST_PAUSE_SECONDS
    assert case.pick().is_probe


def test_a_hundred_batches_that_break_together_eject_once():
    case = Case(A)
    picks = [case.pick() for _ in range(100)]
    for pick in picks:
        pick.failed()
    case.clock.seconds += FIRST_PAUSE_SECONDS
    assert case.pick().is_probe


def test_an_answer_to_a_batch_from_before_the_error_does_not_restore():
    case = Case(A)
    early = case.pick()
    case.eject()
    early.answered()
    assert case.nothing()


def test_a_probe_that_was_given_up_gives_way_at_once():
    case = Case(A)
    case.eject()
    case.clock.seconds += FIRST_PAUSE_SECONDS
    case.pick().given_up()
    assert case.pick().is_probe


def test_a_probe_without_a_report_gives_way_and_its_late_report_changes_nothing():
    case = Case(A, B)
    case.eject()
    case.clock.seconds += FIRST_PAUSE_SECONDS
    slow = case.pick()
    assert [case.pick().instance for _ in range(3)] == [B] * 3
    case.clock.seconds += PROBE_SECONDS
    second = case.pick()
    assert second.is_probe
    slow.failed()
    second.answered()
    assert not case.pick(B).is_probe


def test_only_the_first_report_counts():
    case = Case(A)
    pick = case.pick()
    pick.answered()
    pick.failed()
    pick.given_up()
    assert not case.nothing()


@pytest.mark.parametrize(
    ("said", "paused_s"), [(3.0, 3.0), (1e9, LONGEST_DRAIN_SECONDS), (-5.0, 0.0)], ids=["said", "too long", "negative"]
)
def test_a_draining_instance_is_paused_for_as_long_as_it_says(said: float, paused_s: float):
    case = Case(A, B)
    case.pick().drains(said)
    if paused_s:
        case.clock.seconds += paused_s - 0.001
        assert [case.pick().instance for _ in range(3)] == [B] * 3
        case.clock.seconds += 0.001
    probe = case.pick()
    assert (probe.instance, probe.is_probe) == (A, True)


def test_a_new_list_keeps_what_is_known_about_those_that_stay():
    case = Case(A, B)
    case.eject()
    case.balancer.update([A, C])
    assert case.pick().instance == C
    case.balancer.update([A])
    assert case.nothing()


def test_another_process_at_the_address_of_one_that_is_paused_gets_calls_at_once():
    case = Case(A)
    case.pick().drains(30.0)
    case.balancer.update([Instance(A.service, A.address, "2")])
    assert not case.pick().is_probe
