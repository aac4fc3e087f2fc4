"""Sagas: steps with compensations that go on after a crash."""
