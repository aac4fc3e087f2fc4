"""Logs, metrics, fault points, clock."""
