"""Folding of texts for the search: without case, accents and punctuation, also in scripts without blanks. Pure.

A product is found by the lexemes in the `tsvector` of its row: its words, the parts of a word with punctuation and both
joined (`usb`, `c`, `usbc`), two neighbouring words of a name joined, and pairs of characters of scripts without blanks
between words. A search is parsed into units, each with a `tsquery` over them; PostgreSQL adds English stems.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

LEXEME_LENGTH: Final = 64
"""In characters. A lexeme may have 2 046 bytes."""
FOLDED_LENGTH: Final = 20_000
"""Of a folded text, in characters: one character may fold into eighteen, and a tsvector has at most a megabyte."""
SORT_NAME_LENGTH: Final = 200
"""In characters: 800 bytes at most, and an entry of an index has up to 2 704."""
MAX_POSITION: Final = 16_383
MAX_POSITIONS: Final = 255
"""The limits of PostgreSQL for a lexeme in a tsvector."""
JOINED_WORDS: Final = 3
"""A search of at most so many words also matches them joined."""

# ------------------------------------------------------------------------------------------------------------- folding

# Letters without a decomposition that other keyboards lack; the first is the dotless i.
_LETTERS: Final = str.maketrans(
    {"\u0131": "i", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "æ": "ae", "œ": "oe", "ħ": "h", "ŧ": "t"}
)
_KATAKANA_TO_HIRAGANA: Final = {code: code - 0x60 for code in range(0x30A1, 0x30F7)}
# Kana, Han, Thai and Lao, Myanmar, Khmer: scripts without blanks between words.
_BLANKLESS: Final = (
    r"\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
)
_RUNS: Final = re.compile(f"(?P<run>[{_BLANKLESS}]+)|[^{_BLANKLESS}]+")
_PUNCTUATION: Final = "-"


def sort_name(name: str) -> str:
    """The sort key of a name: folded, in the order of code points."""
    return fold(name)[:SORT_NAME_LENGTH]


def fold(text: str) -> str:
    """The words of a text with one blank between them: letters without case and accents, and ASCII digits."""
    return " ".join(_folded(text).replace(_PUNCTUATION, " ").split())[:FOLDED_LENGTH]


def _folded(text: str) -> str:
    """As `fold`, but with a hyphen for punctuation, and blanks unchanged."""
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    kept = "".join(map(_folded_character, decomposed.translate(_LETTERS)))
    return unicodedata.normalize("NFC", kept).translate(_KATAKANA_TO_HIRAGANA)[:FOLDED_LENGTH]


def _folded_character(character: str) -> str:
    if character.isalnum():
        return str(unicodedata.decimal(character)) if character.isdecimal() else character
    if character.isspace():
        return " "
    category = unicodedata.category(character)
    if category in ("Mn", "Mc"):
        return character if _is_part_of_letter(character) else ""
    return "" if category in ("Me", "Cf") else _PUNCTUATION


def _is_part_of_letter(mark: str) -> bool:
    """Whether a combining mark makes another letter: a vowel, a tone, a voiced kana. Accents and points do not."""
    combining = unicodedata.combining(mark)
    is_point, is_accent = 10 <= combining <= 35, combining >= 200  # Hebrew and Arabic points; above and below a letter
    return not (is_point or is_accent or "\ufe00" <= mark <= "\ufe0f")


class _Part(NamedTuple):
    """A piece of a word: letters and digits, or a run of a script without blanks."""

    text: str
    is_run: bool


def _parts(folded_word: str) -> list[_Part]:
    return [
        _Part(match[0][:LEXEME_LENGTH] if match["run"] is None else match[0], match["run"] is not None)
        for piece in folded_word.split(_PUNCTUATION)
        for match in _RUNS.finditer(piece)
    ]


def _joined(texts: Sequence[str]) -> str:
    return "".join(texts)[:LEXEME_LENGTH]


# ------------------------------------------------------------------------------------------------------------ products


class FoundBy(msgspec.Struct, frozen=True, gc=False):
    """The search terms and sort key of a product. `stemmed_*` are texts of which PostgreSQL makes stems."""

    sort_name: str
    stemmed_name: str
    stemmed_labels: str
    stemmed_description: str
    terms: str
    """A tsvector as text. Weights: A for the name, B for sku and category, D for the description."""


def found_by(name: str, sku: str, category: str, description: str) -> FoundBy:
    lexemes = _Lexemes()
    lexemes.add_text(name, "A", joins_neighbours=True)
    lexemes.add_text(sku, "B")
    lexemes.add_text(category, "B")
    lexemes.add_text(description, "D")
    return FoundBy(
        sort_name=sort_name(name),
        stemmed_name=fold(name),
        stemmed_labels=fold(f"{sku} {category}"),
        stemmed_description=fold(description),
        terms=lexemes.tsvector(),
    )


class _Lexemes:
    """Collects lexemes with their positions. A pair of characters has the position of its first one."""

    def __init__(self) -> None:
        self._positions: dict[str, list[str]] = {}
        self._next = 1

    def add_text(self, text: str, weight: str, *, joins_neighbours: bool = False) -> None:
        before = ""
        for word in _folded(text).split():
            parts = _parts(word)
            if not parts:
                continue
            start = self._next
            for part in parts:
                self._add_part(part, weight)
            whole = _joined([part.text for part in parts])
            if len(parts) > 1:
                self._add(whole, start, weight)
            if joins_neighbours and before:
                self._add(_joined((before, whole)), start, weight)
            before = whole
        self._next += 1  # no phrase spans two texts

    def _add_part(self, part: _Part, weight: str) -> None:
        if not part.is_run:
            self._add(part.text, self._next, weight)
            self._next += 1
            return
        for i in range(len(part.text)):
            self._add(part.text[i : i + 2], self._next, weight)
            self._next += 1

    def _add(self, lexeme: str, position: int, weight: str) -> None:
        positions = self._positions.setdefault(lexeme, [])
        if len(positions) < MAX_POSITIONS:
            positions.append(f"{min(position, MAX_POSITION)}{weight}")

    def tsvector(self) -> str:
        # Lexemes have only letters, digits and marks: nothing has to be escaped.
        return " ".join(f"'{lexeme}':{','.join(positions)}" for lexeme, positions in self._positions.items())


# ------------------------------------------------------------------------------------------------------------ searches


class Unit(msgspec.Struct, frozen=True, gc=False):
    """A word or phrase of a search, with the condition for products."""

    joiner: str
    """The operator before it in a tsquery: ` & `, ` | `, and ` & !` for an excluded word."""
    folded: str
    raw: str
    """The unchanged text: products without terms are found by it."""
    terms: str
    """A tsquery as text."""
    is_phrase: bool
    may_be_stop_word: bool


class ParsedSearch(msgspec.Struct, frozen=True, gc=False):
    """A parsed search. `joined`: a tsquery as text for all its words joined; may be empty."""

    units: tuple[Unit, ...]
    joined: str


_UNIT: Final = re.compile(r'(?P<minus>-)?(?:"(?P<phrase>[^"]*)"|(?P<word>[^\s"]+))')


def parse_search(text: str) -> ParsedSearch:
    """Parses the text of a search box: words, "phrases", -not these, either or.

    A word matches the beginnings of words in names, skus and categories, and whole words in descriptions; an excluded
    word matches only whole words.
    """
    units: list[Unit] = []
    is_or, is_plain = False, True
    matches = list(_UNIT.finditer(text))
    for i, match in enumerate(matches):
        raw = match["word"] if match["phrase"] is None else match["phrase"]
        is_not, is_phrase = match["minus"] is not None, match["phrase"] is not None
        if raw.lower() == "or" and not is_not and not is_phrase and units and i + 1 < len(matches):
            is_or, is_plain = True, False
            continue
        terms = _terms(raw, is_phrase=is_phrase, is_not=is_not)
        if not terms:
            continue
        folded = fold(raw)
        is_plain = is_plain and not (is_not or is_phrase)
        units.append(
            Unit(
                joiner=(" | " if is_or else " & ") + ("!" if is_not else ""),
                folded=folded,
                raw=raw,
                terms=terms,
                is_phrase=is_phrase,
                may_be_stop_word=folded.isascii(),
            )
        )
        is_or = False
    return ParsedSearch(tuple(units), _all_joined(units) if is_plain else "")


def _all_joined(units: Sequence[Unit]) -> str:
    """`head phones` finds headphones."""
    if not 2 <= len(units) <= JOINED_WORDS:
        return ""
    return _beginning(_joined([unit.folded.replace(" ", "") for unit in units]))


def _terms(raw: str, *, is_phrase: bool, is_not: bool) -> str:
    """The tsquery of a word, or phrase; empty where it has neither letters nor digits."""
    words = [parts for word in _folded(raw).split() if (parts := _parts(word))]
    if is_phrase:
        return _phrase(list(itertools.chain.from_iterable(words)))
    parts = list(itertools.chain.from_iterable(words))
    if not parts:
        return ""
    *first, last = parts
    pieces = [_exact(part) for part in first] + [_exact(last) if is_not or last.is_run else _beginning(last.text)]
    together = " & ".join(pieces)
    if not first:
        return together
    joined = _joined([part.text for part in parts])
    whole = f"'{joined}'" if is_not else _beginning(joined)
    return f"{together} | {whole}"


def _beginning(text: str) -> str:
    return f"('{text}':*AB | '{text}')"


def _exact(part: _Part) -> str:
    return f"({_phrase([part])})" if part.is_run else f"'{part.text}'"


def _phrase(parts: Sequence[_Part]) -> str:
    """The parts one after the other, at the distances that `_Lexemes` gives them."""
    found, last_position = "", 0
    for position, lexeme in _placed(parts):
        found += f" <{position - last_position}> {lexeme}" if found else lexeme
        last_position = position
    return found


def _placed(parts: Sequence[_Part]) -> Iterator[tuple[int, str]]:
    position = 0
    for part in parts:
        if not part.is_run:
            yield position, f"'{part.text}'"
            position += 1
        elif len(part.text) == 1:
            yield position, f"'{part.text}':*"
            position += 1
        else:
            for i in range(len(part.text) - 1):
                yield position + i, f"'{part.text[i : i + 2]}'"
            position += len(part.text)
