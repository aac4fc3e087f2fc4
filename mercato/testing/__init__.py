"""Builders and harnesses that tests of all kinds share. No other package of the product imports this one."""
