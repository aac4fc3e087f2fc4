"""From measured CPU of an order to the machines for many: compares a simulation with what was measured, then plans.

    python -m bench.capacity                                   the plan for 100, 10 000 and 500 000 paid orders a second
    python -m bench.capacity --orders-per-second 2000 --zones 1
    python -m bench.capacity --json                            everything, for programs
    python -m bench.capacity --document docs/capacity.md       writes the tables of the default plan into the page

Nothing is measured: it reads `bench/results/latest.json`. Exit code 1: a prediction is farther from what was measured
than its bound, and there is no plan; 2: wrong input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from bench.throughput.document import CannotWrite

from . import assumptions, document, inputs
from .assumptions import Question
from .report import Report, report
from .tables import tables

WRONG: Final = 1
FAILED: Final = 2
DEFAULTS: Final = Question(0.0)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, without the usage."""
        self.exit(FAILED, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    questions = _questions(options)
    if options.document and questions != document.QUESTIONS:
        parser.error("the page has the default plan: --document goes with --results and --json alone")
    try:
        result = inputs.read(options.results)
        found = report(result, questions)
        if options.document:
            _write(options.document, found, result.commit)
    except (inputs.CannotRead, CannotWrite) as error:
        print(f"bench.capacity: {error}", file=sys.stderr)
        return FAILED
    for sentence in found.violations:
        print(f"bench.capacity: the simulation does not reproduce {sentence}", file=sys.stderr)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
    elif not options.document:
        print("\n".join(line for table in tables(found) for line in table.text()))
    return WRONG if found.violations else 0


def _parser() -> Parser:
    parser = Parser(prog="bench.capacity", description="The machines for so many orders, from what one costs.")
    parser.add_argument(
        "--orders-per-second",
        type=_within(1, 10_000_000),
        nargs="+",
        default=list(assumptions.RATES),
        help="paid orders a second at the peak; one or more (100 10000 500000)",
    )
    for name, low, high, about in (
        ("--use", 0.05, 0.95, "share of what a part can carry that is used at the peak"),
        ("--reads", 0, 10_000, "reads of the catalogue for each paid order"),
        ("--commit-ms", 0.05, 100, "milliseconds until a commit is on disk, on a standby too"),
    ):
        default = getattr(DEFAULTS, name.strip("-").replace("-", "_"))
        parser.add_argument(name, type=_within(low, high), default=default, help=f"{about} ({default})")
    for name, high, about in (
        ("--cores", 1_024, "of a machine for gateway and services"),
        ("--lines", 200, "of an order"),
        ("--zones", 9, "of which any one may be lost"),
    ):
        default = getattr(DEFAULTS, name.strip("-"))
        parser.add_argument(name, type=_whole(1, high), default=default, help=f"{about} ({default})")
    parser.add_argument("--results", type=Path, default=inputs.LATEST, help="a result of make bench (latest.json)")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument("--document", type=Path, help="the page into which the tables of the default plan are written")
    return parser


def _within(low: float, high: float) -> Callable[[str], float]:
    def value(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = float("nan")
        if not low <= found <= high:
            raise argparse.ArgumentTypeError(f"a number from {low:g} to {high:g} is needed, not {text!r}")
        return found

    return value


def _whole(low: int, high: int) -> Callable[[str], int]:
    def value(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"a whole number from {low} to {high} is needed, not {text!r}")
        return int(text)

    return value


def _questions(options: argparse.Namespace) -> list[Question]:
    return [
        Question(
            orders_per_second=rate,
            use=options.use,
            cores=options.cores,
            lines=options.lines,
            zones=options.zones,
            reads=options.reads,
            commit_ms=options.commit_ms,
        )
        for rate in options.orders_per_second
    ]


def _write(file: Path, found: Report, commit: str) -> None:
    if found.violations:
        return
    try:
        file.write_text(document.replaced(file.read_text(), found, commit))
    except OSError as error:
        raise CannotWrite(f"{file} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
