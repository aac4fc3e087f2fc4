"""Makes random small changes of the product, each in a copy of this tree, and expects a test to fail.

    make mutants [N=100] [SEED=7] [ARGS="--only services/orders"] [ARGS=--list] [ARGS=--json]

A mutant that no test kills is a test that is missing, or a change that nothing can observe: then it is written to
`tests/system/mutation/equivalent.toml`, with the reason. The working tree is not touched; what was recorded about the
tests is kept in `.mutants/`. Ends with 0 if at least 95 % of the mutants were killed that are neither equivalent nor
invalid, with 1 if fewer, with 2 if nothing can be said.
"""

from __future__ import annotations

import argparse
import asyncio
import compileall
import contextlib
import io
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from system.mutation.console import Console, interruptible
from system.mutation.copies import Inconclusive, take_snapshot
from system.mutation.mutants import choosing, equivalents
from system.mutation.mutants.choosing import Mutant
from system.mutation.mutants.relevance import Relevance
from system.mutation.mutants.trial import MutantResult, equivalent, try_mutant

ROOT: Final = Path(__file__).parents[4]
CACHE: Final = ".mutants"
AT_ONCE: Final = 2
"""Copies that are tested at the same time. A run waits for a database to be made as long as it tests."""
COUNT: Final = 100
REQUIRED: Final = 0.95


class Result(msgspec.Struct, frozen=True):
    """A run, as `--json` prints it. `killed` counts those that a test failed on; `timed_out` those that hung."""

    ok: bool
    seed: int
    of: int
    """How many mutants there are to choose from."""
    rate: float
    killed: int
    timed_out: int
    survived: int
    invalid: int
    equivalent: int
    seconds: float
    mutants: tuple[MutantResult, ...]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    options = _options(arguments)
    display = Display(options.json)
    try:
        files = choosing.product_files(root, options.only)
        display.now(f"looking for what can be changed in {len(files)} files")
        all_places = choosing.places(root, files, root / CACHE)
        there_are = [place for place in all_places if not options.kind or place.kind in options.kind]
        mutants = choosing.make(root, choosing.choose(there_are, options.count, options.seed))
        display.line(f"{len(mutants)} of {len(there_are)} mutants, seed {options.seed}")
        if options.list:
            display.list(mutants)
            return 0
        result = asyncio.run(interruptible(try_all(mutants, len(there_are), options, display, root)))
    except Inconclusive as reason:
        print(f"mutants: {reason}", file=sys.stderr)
        return 2
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
        return 130
    display.result(result)
    return 0 if result.ok else 1


class Options(argparse.Namespace):
    count: int
    seed: int
    only: list[str]
    kind: list[str]
    at_once: int
    list: bool
    json: bool


def _options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="make mutants", description="Make random changes, and see a test fail on each."
    )
    parser.add_argument("--count", type=int, default=COUNT, metavar="N", help=f"how many ({COUNT})")
    new_seed = secrets.randbelow(100_000)
    parser.add_argument("--seed", type=int, default=new_seed, help="a number that chooses them (a new one each time)")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="files with this in their path")
    parser.add_argument("--kind", action="append", default=[], metavar="KIND", help="of this kind (see --list)")
    parser.add_argument(
        "--at-once", type=int, default=AT_ONCE, metavar="N", help=f"how many are tried at a time ({AT_ONCE})"
    )
    parser.add_argument("--list", action="store_true", help="show the mutants that were chosen, and try none")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(arguments, Options())
    if options.count < 1 or options.at_once < 1:
        parser.error("at least one mutant is needed, and one at a time")
    return options


async def try_all(mutants: Sequence[Mutant], of: int, options: Options, display: Display, root: Path = ROOT) -> Result:
    """Tries mutants in the order given, some at a time. Raises `Inconclusive`."""
    began_at = time.monotonic()
    listed = equivalents.read(root)
    with tempfile.TemporaryDirectory(prefix="mercato-mutants-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        snapshot = take_snapshot(root, folder)
        # Once here, not once in each copy.
        with contextlib.redirect_stdout(io.StringIO()):
            await asyncio.to_thread(compileall.compile_dir, snapshot, quiet=2)
        turn = asyncio.Semaphore(options.at_once)
        relevance = Relevance(snapshot, root / CACHE, asyncio.Semaphore(options.at_once))

        async def try_one(n: int, mutant: Mutant) -> MutantResult:
            if (reason := equivalents.reason(mutant, listed)) is not None:
                result = equivalent(mutant, reason)
            else:
                async with turn:
                    display.begin(n, len(mutants), mutant)
                    # By number: a socket's path must be short.
                    (folder / str(n)).mkdir(mode=0o755)
                    result = await try_mutant(mutant, snapshot, folder / str(n), relevance)
            display.end(n, len(mutants), result)
            return result

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(try_one(n, mutant)) for n, mutant in enumerate(mutants, 1)]
        except BaseExceptionGroup as errors:
            known, others = errors.split(Inconclusive)
            if known is None or others is not None:
                raise
            raise Inconclusive(str(_first(known))) from errors
        finally:
            await relevance.close()
    for test in sorted(relevance.failed):
        display.line(f"failed without any change, and was left out: {test}")
    return summed_up([task.result() for task in tasks], options.seed, of, time.monotonic() - began_at)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def summed_up(results: Sequence[MutantResult], seed: int, of: int, seconds: float) -> Result:
    count = Counter(result.outcome for result in results)
    detected = count["killed"] + count["timed_out"]
    counted = detected + count["survived"]
    rate = detected / counted if counted else 1.0
    return Result(
        ok=rate >= REQUIRED,
        seed=seed,
        of=of,
        rate=round(rate, 4),
        killed=count["killed"],
        timed_out=count["timed_out"],
        survived=count["survived"],
        invalid=count["invalid"],
        equivalent=count["equivalent"],
        seconds=round(seconds, 1),
        mutants=tuple(results),
    )


class Display(Console):
    """What a person sees: what goes on, a line for what is done, the survivors. With --json nothing but the result."""

    def list(self, mutants: Sequence[Mutant]) -> None:
        if self.as_json:
            print(msgspec.json.encode([_shown(mutant) for mutant in mutants]).decode())
            return
        for mutant in mutants:
            print(f"\n{mutant.file}:{mutant.line} {mutant.function} ({mutant.kind})\n{_indented(mutant.diff)}")

    def begin(self, n: int, count: int, mutant: Mutant) -> None:
        self.going[n] = f"[{n:3d}/{count}] {mutant.file}:{mutant.line} {mutant.kind}"
        self.draw()

    def end(self, n: int, count: int, result: MutantResult) -> None:
        self.going.pop(n, None)
        place = f"{result.file.removeprefix('mercato/')}:{result.line}"
        self.line(f"[{n:3d}/{count}] {place:44s} {result.kind:16s} {result.outcome:10s} {result.seconds:6.1f} s")
        self.draw()

    def result(self, result: Result) -> None:
        if self.as_json:
            print(msgspec.json.encode(result).decode())
            return
        for mutant in result.mutants:
            if mutant.outcome == "survived":
                place = f"{mutant.file}:{mutant.line} {mutant.function} ({mutant.kind})"
                print(f"\nSURVIVED {place}\n{_indented(mutant.diff)}")
                print(f"  ran: {_by_file(mutant.ran) or 'no test runs this statement'}")
        print(
            f"\n{result.killed} killed, {result.timed_out} hung until their time was up, {result.survived} survived, "
            f"{result.equivalent} equivalent, {result.invalid} invalid: {result.rate:.1%} "
            f"(seed {result.seed}, {result.seconds:.0f} s; {REQUIRED:.0%} are required)"
        )


def _shown(mutant: Mutant) -> dict[str, object]:
    fields = msgspec.structs.asdict(mutant)
    del fields["text"]
    return fields


def _indented(diff: str) -> str:
    return "\n".join(f"  {line}" for line in diff.splitlines())


def _by_file(tests: Sequence[str]) -> str:
    counts = Counter(test.partition("::")[0] for test in tests)
    return ", ".join(f"{file} ({count} tests)" for file, count in counts.items())


if __name__ == "__main__":
    sys.exit(main())
