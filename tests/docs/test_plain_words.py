"""Documents and code use the terms of the field: sentences name the actor, and no private words stand for common terms.

Of code this holds for all that people read: names, comments, docstrings and other strings. Migrations that have landed
are left out: they are frozen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).parents[2]
DOCUMENTS: Final = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]
PACKAGES: Final = ["mercato", "tests", "bench"]

TERMS: Final[Mapping[str, str]] = {
    "nobody nobodys somebody somebodys everybody everybodys anybody whoever whomever": "name the actor",
    "stranger strangers": "unknown consumer, another program",
    "twin twins": "duplicate",
    "wish wishes wished": "request",
    "debt debts owe owes owed": "pending delivery",
    "hear hears heard hearing": "receive",
    "told": "emitted, notified, reported",
    "blow blows blew struck battered": "fault injection",
    "plantable uproot uproots uprooted": "inject, remove",
    "seize seizes seized seizing": "fence",
    "bury buries buried burying": "insert a tombstone; reap a child process",
    "hurry hurries hurried": "cap the deadline",
    "gatekeeper gatekeepers": "authenticator",
    "cork corks corked": "response buffer",
    "lifeline lifelines": "watch",
    "obituary obituaries": "description of the exit",
    "graveyard graveyards": "regression seeds",
}
"""Private words, and what to write instead. Words with a meaning in the field are no private words: dead letter, lease,
epoch, hold, void, pivot, tombstone, in flight, reap, zombie."""
PRIVATE: Final = {word: term for words, term in TERMS.items() for word in words.split()}
PHRASE: Final = "the house"
TERM: Final = PRIVATE | {PHRASE: "the package"}
ALLOWED: Final = re.compile(r"\b(?:told|tell|tells)\s+(?:[\w`]+\s+){0,3}apart\b", re.IGNORECASE)
"""To tell apart is to distinguish."""

EXCEPTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "mercato/cli/settings.py": {"nobody": "the account of Unix"},
    "mercato/embedded_postgres/place.py": {"nobody": "the account of Unix"},
    "tests/cli/test_up_start.py": {"nobody": "the account of Unix"},
    "tests/embedded_postgres/test_postgres.py": {"nobody": "the account of Unix"},
    "tests/pgbouncer/pooler.py": {"nobody": "the account of Unix"},
}
"""By file and word, with the reason."""
THIS: Final = "tests/docs/test_plain_words.py"
"""It lists the words, and has planted violations."""

WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
"""`twin_waits`, `TwinWaits` and `TWIN_WAITS` are two words each, and "warehouse" is one."""
PHRASE_IN_TEXT: Final = re.compile(r"\bthe[\s#]+house\b", re.IGNORECASE)
CODE_SPAN: Final = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)


class Found(NamedTuple):
    line: int
    word: str


def private_words(text: str) -> list[Found]:
    """All private words and phrases of a text, in its order, by line."""
    # Most texts have none, and are looked at as a whole only.
    if PRIVATE.keys().isdisjoint(map(str.lower, WORD.findall(text))) and not _phrases(text):
        return []
    text = ALLOWED.sub(_blank, text)
    words = [
        Found(number, word)
        for number, line in enumerate(text.split("\n"), 1)
        for word in map(str.lower, WORD.findall(line))
        if word in PRIVATE
    ]
    return sorted([*words, *_phrases(text)], key=lambda found: found.line)


def _phrases(text: str) -> list[Found]:
    return [Found(text.count("\n", 0, match.start()) + 1, PHRASE) for match in PHRASE_IN_TEXT.finditer(text)]


def _blank(match: re.Match[str]) -> str:
    """Nothing of a match but its ends of lines."""
    return "\n" * match[0].count("\n")


def prose(document: str) -> str:
    """A document without what is code: names of tests, and the account `nobody`."""
    return CODE_SPAN.sub(_blank, document)


def modules(package: str) -> Iterator[str]:
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if "migrations" not in path.parts and name != THIS:
            yield name


def in_code(name: str, text: str) -> list[str]:
    """A line for each private word in the path or the text of a module that its exceptions do not have."""
    excepted = EXCEPTIONS.get(name, {})
    found = [*(Found(0, word) for _, word in private_words(name)), *private_words(text)]
    return [f"{name}:{line}: {word} (write: {TERM[word]})" for line, word in found if word not in excepted]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_has_no_private_words(document: str) -> None:
    assert private_words(prose((ROOT / document).read_text())) == []


def test_the_changes_since_the_first_release_have_no_private_words() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text().partition("\n## Unreleased")[2].partition("\n## 0.1.0")[0]

    assert len(changes) > 1_000
    assert private_words(prose(changes)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_code_of_a_package_has_no_private_words(package: str) -> None:
    found = [line for name in modules(package) for line in in_code(name, (ROOT / name).read_text())]

    assert found == [], "\n".join(found)


def test_every_exception_is_needed() -> None:
    needed = {name: {word for _, word in private_words((ROOT / name).read_text())} for name in EXCEPTIONS}

    assert {(name, word) for name, words in EXCEPTIONS.items() for word in words if word not in needed[name]} == set()


def test_a_private_word_in_a_document_is_found() -> None:
    text = "Whoever waits hears it;\n`test_a_twin_waits` and the account `nobody` are names."

    assert private_words(prose(text)) == [Found(1, "whoever"), Found(1, "hears")]


@pytest.mark.parametrize(
    ("source", "line", "word"),
    [
        ("def first(): ...\ndef wait_for_twin(): ...\n", 2, "twin"),
        ("class TwinWaits: ...\n", 1, "twin"),
        ("TWIN_WAITS = 1\n", 1, "twin"),
        ("one.twin = other(twin_of=1)\n", 1, "twin"),
        ('def one():\n    """One.\n\n    Nobody waits for it.\n    """\n', 4, "nobody"),
        ("x = 1\ny = 2  # a twin of the first\n", 2, "twin"),
        ('x = "a twin"\n', 1, "twin"),
        ('x = f"{y} is a twin\'s"\n', 1, "twin"),
        ("x = 1\n# as the\n# house has it\n", 2, "the house"),
        ('x = """They can be\ntold apart. A caller is told."""\n', 2, "told"),
    ],
    ids=["function", "class", "constant", "attribute", "docstring", "comment", "string", "f-string", "phrase", "told"],
)
def test_a_private_word_in_code_is_found(source: str, line: int, word: str) -> None:
    found = {(found.split(":")[1], found.split()[1]) for found in in_code("mercato/planted.py", source)}

    assert found == {(str(line), word.split()[0])}


def test_a_private_word_in_the_name_of_a_module_is_found() -> None:
    assert in_code("mercato/chassis/lifeline.py", "") == ["mercato/chassis/lifeline.py:0: lifeline (write: watch)"]


@pytest.mark.parametrize(
    "source",
    [
        "in_flight = dead_letters + warehouse.wishlist + blowfish\n",
        '"""The lease of an epoch, a hold, a void, a pivot, a tombstone; only their words tell them apart."""\n',
    ],
)
def test_a_term_of_the_field_is_not_found(source: str) -> None:
    assert in_code("mercato/planted.py", source) == []


def test_an_exception_is_for_its_file_and_word_alone() -> None:
    source = "ACCOUNTS = ('nobody', 'twin')\n"

    assert [line.split()[1] for line in in_code("mercato/embedded_postgres/place.py", source)] == ["twin"]
    assert [line.split()[1] for line in in_code("mercato/cli/up.py", source)] == ["nobody", "twin"]
