"""The command line of Mercato in a process that counts nothing: what metrics cost is the difference to `mercato`.

    python -m bench.throughput.unobserved up ...

Each metric keeps its name and its labels, and its methods do nothing. A shop that cannot be watched has no use, so it
is no setting.
"""

from __future__ import annotations

from typing import Any

from mercato.chassis.observability.counting import Pending, PendingCounter, PendingGauge, PendingHistogram

METHODS = {PendingCounter: ("inc",), PendingGauge: ("inc", "dec", "set"), PendingHistogram: ("observe",)}


def nothing(*_arguments: Any, **_named: Any) -> None:
    """Instead of counting."""


def stop_counting() -> None:
    """Before any metric is made: its methods are bound then."""
    for metric, names in METHODS.items():
        for name in names:
            setattr(metric, name, nothing)
    made = Pending._metric_init  # pyright: ignore[reportPrivateUsage]

    def make(self: Pending) -> None:
        made(self)
        self.add = nothing

    Pending._metric_init = make  # pyright: ignore[reportPrivateUsage]


def main() -> None:
    stop_counting()
    from mercato.cli import main as command

    command()


if __name__ == "__main__":
    main()
