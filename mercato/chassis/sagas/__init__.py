"""Sagas: steps with compensations that are continued after a crash."""
