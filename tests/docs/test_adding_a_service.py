"""The service that `docs/adding-a-service.md` builds: its code blocks, written into a copy, pass the tests of the copy.

Above each block stands its file, `**path** (new)` or `**path** (changed)`. A changed file is given as a diff without
line numbers, in which `@@` begins another part: the lines that are there already must be in the file exactly once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import pytest

from mercato.testing.waiting import BOUND_SECONDS
from system.mutation.copies import PASSED, is_of_copy, run_pytest, take_snapshot

ROOT: Final = Path(__file__).parents[2]
DOCUMENT: Final = (ROOT / "docs/adding-a-service.md").read_text()
BLOCK: Final = re.compile(
    r"^\*\*(\S+)\*\* \((new|changed)\)\n\n```(?:python|diff)\n(.*?)^```\n", re.DOTALL | re.MULTILINE
)
PART: Final = re.compile(r"^@@\n", re.MULTILINE)
COMMANDS: Final = re.findall(r"^make (\w+)$", DOCUMENT, re.MULTILINE)
OWN_TESTS: Final = "tests/services/wishlists"


class DoesNotFit(Exception):
    """A block that cannot be written, in a sentence."""


class Block(msgspec.Struct, frozen=True):
    path: str
    is_new: bool
    text: str


def blocks(document: str) -> list[Block]:
    """The blocks of a document that belong to files, in order."""
    return [Block(path, kind == "new", text) for path, kind, text in BLOCK.findall(document)]


def write(document: str, copy: Path) -> list[str]:
    """Writes all blocks into a copy; gives their paths. Raises `DoesNotFit`."""
    for block in blocks(document):
        file = copy / block.path
        if block.is_new == file.exists():
            raise DoesNotFit(f"{block.path} is {'there already' if block.is_new else 'not there'}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.text if block.is_new else changed(file.read_text(), block))
    return [block.path for block in blocks(document)]


def changed(text: str, block: Block) -> str:
    """The text of a file after the parts of a block. Raises `DoesNotFit`."""
    for part in PART.split(block.text):
        before, after = ("".join(lines_of(part, marks)) for marks in (" -", " +"))
        if (found := f"\n{text}".count(f"\n{before}")) != 1:
            raise DoesNotFit(f"{block.path} has these lines {found} times, not once:\n{before}")
        text = f"\n{text}".replace(f"\n{before}", f"\n{after}")[1:]
    return text


def lines_of(part: str, marks: str) -> Iterator[str]:
    """The lines of a part that have one of these marks, without it."""
    for line in part.splitlines(keepends=True):
        if line[0] not in " +-":
            raise DoesNotFit(f"a line of a diff begins with a blank, + or -, not: {line}")
        if line[0] in marks:
            yield line[1:]


class Example(msgspec.Struct, frozen=True):
    """The copy with the service in it, and the paths of its Python modules."""

    copy: Path
    modules: list[str]

    def succeeds(self, *command: str) -> None:
        paths = os.pathsep.join((str(self.copy), str(self.copy / "tests")))
        environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(self.copy.parent)}
        done = subprocess.run(
            command, cwd=self.copy, env=environment, capture_output=True, text=True, timeout=BOUND_SECONDS
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"

    async def passes(self, *arguments: str) -> None:
        run = await run_pytest(self.copy, ["-m", "not long", *arguments], 10 * BOUND_SECONDS)
        assert run.exit_code == PASSED, run.output
        assert is_of_copy(run, self.copy)
        assert run.recorded.tests

    def make(self, target: str) -> None:
        """Runs the script of a target of the Makefile, without the installation on which the target depends."""
        recipe = re.search(rf"^{target}:.*\n\t@\$\(PY\) (\S+)", (self.copy / "Makefile").read_text(), re.MULTILINE)
        assert recipe, f"make {target} runs no script"
        self.succeeds(sys.executable, recipe[1])


@pytest.fixture(scope="module")
def example() -> Iterator[Example]:
    with tempfile.TemporaryDirectory(prefix="mercato-example-") as folder:
        copy = take_snapshot(ROOT, Path(folder))
        made = Example(copy, [path for path in write(DOCUMENT, copy) if path.endswith(".py")])
        for target in COMMANDS:
            made.make(target)
        yield made


def tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


@pytest.mark.slow
@pytest.mark.postgres
async def test_the_example_passes_its_tests_and_the_rules_of_the_repository(example: Example) -> None:
    assert COMMANDS == ["schemas", "freeze"]
    example.succeeds(tool("ruff"), "check", "--no-cache", *example.modules)
    example.succeeds(tool("ruff"), "format", "--no-cache", "--check", *example.modules)
    example.succeeds(tool("lint-imports"), "--no-logo", "--no-cache")
    architecture = [f"tests/architecture/test_{name}.py" for name in ("shape", "calls", "slices")]
    await example.passes(
        *("-k", "wishlist or shape or calls or placements", OWN_TESTS, *architecture, "tests/placements")
    )


@pytest.mark.long
@pytest.mark.postgres
async def test_the_example_passes_every_test_of_what_it_touches(example: Example) -> None:
    example.succeeds(tool("basedpyright"), "--pythonpath", sys.executable, *example.modules)
    # What was released is asked of git, and a copy has none.
    contracts = ("tests/contracts", "tests/chassis/contract", "-k", "not releases")
    await example.passes("tests/architecture", "tests/placements", "tests/chassis/postgres", *contracts)
    await example.passes(*("-k", "wishlist or openapi or docs or shedding", "tests/gateway"))


# ------------------------------------------------------------------------------------------------------------- blocks


def diff(*lines: str) -> Block:
    return Block("file.py", is_new=False, text="".join(f"{line}\n" for line in lines))


TEXT: Final = "a\nb\nc\nb\n"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("+0", " a"), "0\na\nb\nc\nb\n"),
        ((" c", "+d", " b"), "a\nb\nc\nd\nb\n"),
        (("-c", "+d"), "a\nb\nd\nb\n"),
        ((" a", "+0", "@@", " c", "+d"), "a\n0\nb\nc\nd\nb\n"),
    ],
)
def test_a_diff_is_applied_where_its_lines_are(lines: Sequence[str], expected: str) -> None:
    assert changed(TEXT, diff(*lines)) == expected


@pytest.mark.parametrize(
    ("lines", "reason"), [((" b", "+d"), "2 times"), ((" x", "+d"), "0 times"), (("x",), "begins with")]
)
def test_a_diff_that_fits_nowhere_or_twice_is_refused(lines: Sequence[str], reason: str) -> None:
    with pytest.raises(DoesNotFit, match=reason):
        changed(TEXT, diff(*lines))


def test_a_new_file_that_is_there_already_is_refused(tmp_path: Path) -> None:
    document = "**a.py** (new)\n\n```python\nx = 1\n```\n"
    assert write(document, tmp_path) == ["a.py"]
    with pytest.raises(DoesNotFit, match="there already"):
        write(document, tmp_path)
