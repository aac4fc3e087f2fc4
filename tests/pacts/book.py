"""The pacts of one consumer: what its tests write is what is committed.

A committed pact has nothing that changes from run to run: its interactions are in the order of their descriptions, and
the versions of Pact are left out. `make pacts` writes it, tests compare.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

# Read by Pact's core when it is loaded: it reports its use to its makers otherwise.
os.environ["PACT_DO_NOT_TRACK"] = "true"

from pact import Pact

COMMITTED: Final = Path(__file__).with_name("committed")
COMMAND: Final = "make pacts"
WRITES: Final = "MERCATO_TEST_WRITE_PACTS"
SPECIFICATION: Final = "V4"

Interaction = dict[str, Any]


def new_pact(consumer: str, provider: str) -> Pact:
    return Pact(consumer, provider).with_specification(SPECIFICATION)


def interactions_of(pact: Pact) -> list[Interaction]:
    """What Pact writes of them."""
    with tempfile.TemporaryDirectory(prefix="mercato-pact-") as folder:
        pact.write_file(folder, overwrite=True)
        (file,) = Path(folder).iterdir()
        return json.loads(file.read_text())["interactions"]


def path_of(consumer: str, provider: str, folder: Path = COMMITTED) -> Path:
    return folder / f"{consumer}-{provider}.json"


def text_of(consumer: str, provider: str, interactions: Collection[Interaction]) -> str:
    """A pact as it is committed."""
    pact = {
        "consumer": {"name": consumer},
        "provider": {"name": provider},
        "interactions": sorted(interactions, key=lambda each: each["description"]),
        "metadata": {"pactSpecification": {"version": "4.0"}},
    }
    return json.dumps(pact, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


class PactBook:
    """Collects the interactions of a consumer, by provider."""

    def __init__(self, consumer: str, folder: Path = COMMITTED) -> None:
        self.consumer = consumer
        self._folder = folder
        self._found: dict[str, dict[str, Interaction]] = {}
        self._reads: dict[tuple[str, str], set[str]] = {}

    def add(self, provider: str, interaction: Interaction, reads: Collection[str] = ()) -> None:
        """`reads`: what the consumer's code reads of the answer, by paths. It is noted for the provider's team.

        Raises `AssertionError` where the pact has another interaction of that description.
        """
        known, name = self._found.setdefault(provider, {}), interaction["description"]
        if known.setdefault(name, interaction) != interaction:
            raise AssertionError(f"{self.consumer} has two interactions {name!r} with {provider}")
        self._reads.setdefault((provider, name), set()).update(reads)

    def noted(self, provider: str) -> dict[str, Interaction]:
        """The interactions with a provider, by description, each with a comment on what is read."""
        found = dict[str, Interaction]()
        for name, interaction in self._found[provider].items():
            reads = ", ".join(sorted(self._reads[provider, name]))
            comments = {"comments": {"text": [f"Read by the code of the consumer: {reads}."]}} if reads else {}
            found[name] = {**interaction, **comments}
        return found

    def close(self, *, is_complete: bool) -> None:
        """Compares with what is committed, or writes it. `is_complete`: every test of the consumer has run."""
        if WRITES in os.environ:
            self._write(is_complete)
            return
        for provider in self._found:
            found = self.noted(provider)
            committed = {each["description"]: each for each in self._committed(provider)}
            for description, interaction in found.items():
                if committed.get(description) != interaction:
                    raise AssertionError(self._differs(provider, f"{description!r} is not as it is committed"))
            if is_complete and (gone := committed.keys() - found.keys()):
                raise AssertionError(self._differs(provider, f"no test has {sorted(gone)} any more"))
        if is_complete and (gone := self._files() - {path_of(self.consumer, p, self._folder) for p in self._found}):
            raise AssertionError(f"no test of {self.consumer} writes {sorted(gone)} any more: run `{COMMAND}`")

    def _differs(self, provider: str, what: str) -> str:
        return f"the pact of {self.consumer} with {provider}: {what}. Run `{COMMAND}`, and look at the difference."

    def _files(self) -> set[Path]:
        return set(self._folder.glob(f"{self.consumer}-*.json"))

    def _committed(self, provider: str) -> list[Interaction]:
        file = path_of(self.consumer, provider, self._folder)
        return json.loads(file.read_text())["interactions"] if file.exists() else []

    def _write(self, is_complete: bool) -> None:
        if not is_complete:
            raise AssertionError(f"not every test of {self.consumer} has passed: its pacts are not written")
        for file in self._files():
            file.unlink()
        self._folder.mkdir(exist_ok=True)
        for provider in self._found:
            file = path_of(self.consumer, provider, self._folder)
            file.write_text(text_of(self.consumer, provider, self.noted(provider).values()))
