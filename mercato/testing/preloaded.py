"""Imports all of the command line: what the server of `command.py` does once for all commands of a test run."""

from __future__ import annotations

import gc
import importlib
import pkgutil

import mercato.cli

for module in pkgutil.iter_modules(mercato.cli.__path__):
    if module.name != "__main__":
        importlib.import_module(f"mercato.cli.{module.name}")

gc.collect()
gc.freeze()  # what the forks share stays shared: the collector would write to it
