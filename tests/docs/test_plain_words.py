"""Documents use the terms of the field: sentences name the actor, and no private words stand for common terms."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
DOCUMENTS: Final = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]
PRIVATE: Final = re.compile(
    r"\b(nobody|somebody|everybody|whoever|strangers?|twins?|wish(?:es)?|blows?|lifelines?|graveyards?|obituary"
    r"|debts?|owed|hears?|told|the house)\b",
    re.IGNORECASE,
)
CODE: Final = re.compile(r"```.*?```|`[^`\n]+`|told apart", re.DOTALL)


def private_words(text: str) -> list[str]:
    """The private words of a text, without what is code: names of tests, and the account `nobody`."""
    return PRIVATE.findall(CODE.sub("", text))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_has_no_private_words(document: str) -> None:
    assert private_words((ROOT / document).read_text()) == []


def test_the_changes_that_are_not_released_have_no_private_words() -> None:
    unreleased = (ROOT / "CHANGELOG.md").read_text().partition("\n## Unreleased")[2].partition("\n## ")[0]

    assert len(unreleased) > 1_000
    assert private_words(unreleased) == []


def test_a_private_word_is_found() -> None:
    text = "Whoever waits hears it; `test_a_twin_waits` and the account `nobody` are names."

    assert private_words(text) == ["Whoever", "hears"]
