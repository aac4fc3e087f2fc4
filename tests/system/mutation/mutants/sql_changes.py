"""The changes that can be made in the SQL of Python code.

The tokens and the grammar are PostgreSQL's own (pglast). A change is made in the text of a literal, at a token: what
is not changed stays as it is, with its comments and its values between braces. Where PostgreSQL parses a literal, it
parses it with the change, too; a literal that is a part of a statement cannot be asked about.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
from pglast.parser import ParseError, parse_sql, scan

from system.mutation.mutants.change import MODULE, Change

SQL: Final = re.compile(
    r"\b(SELECT|INSERT INTO|LOCK TABLE|DELETE FROM|UPDATE \w+|WHERE|FROM|VALUES|ORDER BY|AND|SET)\b"
)
"""SQL stands in capitals, other than prose."""
QUOTES: Final = re.compile(r"(?i)([a-z]*)(\"\"\"|'''|\"|')")
BRACES: Final = re.compile(r"\{[^{}]*\}")

SWAPPED: Final = {
    "=": ("sql_equality", "<>"),
    "<>": ("sql_equality", "="),
    "<": ("sql_bound", "<="),
    "<=": ("sql_bound", "<"),
    ">": ("sql_bound", ">="),
    ">=": ("sql_bound", ">"),
    "+": ("sql_arithmetic", "-"),
    "-": ("sql_arithmetic", "+"),
    "*": ("sql_arithmetic", "/"),
    "/": ("sql_arithmetic", "*"),
    "and": ("sql_logic", "OR"),
    "or": ("sql_logic", "AND"),
    "not": ("sql_logic", ""),
    "asc": ("sql_order", "DESC"),
    "desc": ("sql_order", "ASC"),
    "first": ("sql_order", "LAST"),
    "last": ("sql_order", "FIRST"),
    "distinct": ("sql_set", ""),
    "all": ("sql_set", ""),
    "left": ("sql_join", ""),
    "min": ("sql_extreme", "max"),
    "max": ("sql_extreme", "min"),
    "least": ("sql_extreme", "greatest"),
    "greatest": ("sql_extreme", "least"),
    "true": ("sql_truth", "false"),
    "false": ("sql_truth", "true"),
}
CONDITIONS: Final = frozenset({"where", "having", "on", "and"})
CLAUSES: Final = frozenset(
    [
        "where",
        "group",
        "having",
        "window",
        "order",
        "limit",
        "offset",
        "fetch",
        "for",
        "returning",
        "union",
        "except",
        "intersect",
        "on",
        "set",
        "from",
        "join",
        "left",
        "right",
        "inner",
        "cross",
        "full",
        "values",
        "when",
        "then",
        "else",
        "or",
        ";",
    ]
)
"""Words that end a condition, where they are not deeper between parentheses."""
TABLE_LOCK: Final = frozenset({"share", "row", "exclusive"})
LOCKS: Final = frozenset({"update", "share", "no", "key", "of", "skip", "locked", "nowait"})


class Token(msgspec.Struct, frozen=True):
    text: str
    start: int
    end: int
    depth: int

    @property
    def word(self) -> str:
        return self.text.lower()


class Edit(msgspec.Struct, frozen=True):
    """In the text of a literal, `start` to `end` become `new`."""

    kind: str
    start: int
    end: int
    new: str


def sql_changes(source: str) -> list[Change]:
    """In the order of the text."""
    if SQL.search(source) is None:
        return []
    scopes = _Scopes(source)
    changes: list[Change] = []
    for start, end in literals(source):
        body = source[start:end]
        if SQL.search(body) is None or scopes.is_docstring(line := source.count("\n", 0, start) + 1):
            continue
        function, statement = scopes.of(line)
        for edit in edits(body):
            at = start + edit.start
            changed = source[:at] + edit.new + source[start + edit.end :]
            changes.append(Change(edit.kind, source.count("\n", 0, at) + 1, statement, function, lambda c=changed: c))
    return changes


def edits(literal: str) -> list[Edit]:
    """The changes of a literal that leave it SQL, by their places."""
    text = blank(literal)
    try:
        tokens = _tokens(text)
    except ParseError:
        return []
    is_whole = parses(text)
    found = (
        *_swaps(tokens),
        *_conditions(literal, tokens),
        *_locks(tokens),
        *_table_locks(tokens),
        *_conflicts(tokens),
        *_sorts(tokens),
    )
    changed = sorted(found, key=lambda edit: (edit.start, edit.end, edit.kind, edit.new))
    return [e for e in changed if not is_whole or parses(text[: e.start] + blank(e.new) + text[e.end :])]


def blank(text: str) -> str:
    """The text with a name of the same length for each value between braces."""
    return BRACES.sub(lambda found: "x" * len(found[0]), text)


def parses(text: str) -> bool:
    try:
        parse_sql(text)
    except ParseError:
        return False
    return True


def _tokens(text: str) -> list[Token]:
    tokens: list[Token] = []
    depth = 0
    for found in scan(text):
        if found.name in ("SQL_COMMENT", "C_COMMENT"):
            continue
        word = text[found.start : found.end + 1]
        # CASE ... END holds conditions of its own, as parentheses do.
        depth -= word == ")" or word.lower() == "end"
        tokens.append(Token(word, found.start, found.end + 1, depth))
        depth += word == "(" or word.lower() == "case"
    return tokens


# ---------------------------------------------------------------------------------------------------------- the kinds


def _swaps(tokens: Sequence[Token]) -> Iterator[Edit]:
    """A word or an operator becomes another; a number grows by one."""
    for n, token in enumerate(tokens):
        if token.text.isdigit():
            yield Edit("sql_number", token.start, token.end, str(int(token.text) + 1))
        elif token.word in SWAPPED and _is_keyword(tokens, n):
            kind, new = SWAPPED[token.word]
            yield Edit(kind, token.start, token.end, new)


def _is_keyword(tokens: Sequence[Token], n: int) -> bool:
    """Whether a word of `SWAPPED` means there what it means in most places."""
    before, after = _word(tokens, n - 1), _word(tokens, n + 1)
    match tokens[n].word:
        case "first" | "last":
            return before == "nulls"
        case "all":
            return before == "union"
        case "left":
            return after == "join"
        case "not":
            # How a part is planned changes no result.
            return after != "materialized"
        case "and":
            return not _is_of_between(tokens, n)
        case _:
            return True


def _word(tokens: Sequence[Token], n: int) -> str:
    return tokens[n].word if 0 <= n < len(tokens) else ""


def _conditions(literal: str, tokens: Sequence[Token]) -> Iterator[Edit]:
    """A condition, or a part of one, holds always. It stays in the text: its parameters have their types from it."""
    for n, token in enumerate(tokens):
        if token.word in CONDITIONS and not _is_of_between(tokens, n):
            last = n
            while last + 1 < len(tokens) and not _ends_condition(tokens, last + 1, token.depth):
                last += 1
            if last > n and _word(tokens, n + 1) not in ("conflict", "constraint"):
                start, end = tokens[n + 1].start, tokens[last].end
                yield Edit("sql_condition", start, end, f"({literal[start:end]} OR true)")


def _ends_condition(tokens: Sequence[Token], n: int, depth: int) -> bool:
    token = tokens[n]
    if token.depth != depth:
        return token.depth < depth
    if token.word == "and":
        return not _is_of_between(tokens, n)
    return token.word in CLAUSES and not (token.word == "from" and _word(tokens, n - 1) == "distinct")


def _is_of_between(tokens: Sequence[Token], n: int) -> bool:
    """Whether the word `and` belongs to `BETWEEN a AND b`."""
    if tokens[n].word != "and":
        return False
    for token in reversed(tokens[:n]):
        if token.depth < tokens[n].depth:
            return False
        if token.depth == tokens[n].depth and token.word in {"between", "and", *CLAUSES}:
            return token.word == "between"
    return False


def _locks(tokens: Sequence[Token]) -> Iterator[Edit]:
    """Rows are read without their lock; rows that are locked are waited for."""
    for n, token in enumerate(tokens):
        if token.word != "for" or _word(tokens, n + 1) not in ("update", "no", "share", "key"):
            continue
        last = n + 1
        while last + 1 < len(tokens) and tokens[last + 1].depth == token.depth and _is_of_lock(tokens, last + 1):
            last += 1
        yield Edit("sql_lock", token.start, tokens[last].end, "")
        if _word(tokens, last) == "locked":
            yield Edit("sql_skip_locked", tokens[last - 1].start, tokens[last].end, "")


def _table_locks(tokens: Sequence[Token]) -> Iterator[Edit]:
    """A table is locked in a mode that keeps no writer away."""
    for n, token in enumerate(tokens[:-2]):
        if token.word == "lock" and _word(tokens, n + 1) == "table":
            modes = [t for t in tokens[n + 2 :] if t.word in TABLE_LOCK]
            if modes:
                yield Edit("sql_lock", modes[0].start, modes[-1].end, "ACCESS SHARE")


def _is_of_lock(tokens: Sequence[Token], n: int) -> bool:
    return tokens[n].word in LOCKS or _word(tokens, n - 1) in ("of", ",")


def _conflicts(tokens: Sequence[Token]) -> Iterator[Edit]:
    """A row that is there already is an error; or it stays as it is."""
    for n, token in enumerate(tokens):
        if token.word != "on" or _word(tokens, n + 1) != "conflict":
            continue
        last, update = n, -1
        while last + 1 < len(tokens) and tokens[last + 1].depth >= token.depth:
            if tokens[last + 1].depth == token.depth and tokens[last + 1].word in ("returning", ";"):
                break
            last += 1
            if tokens[last].word == "update" and tokens[last - 1].word == "do":
                update = last
        yield Edit("sql_conflict", token.start, tokens[last].end, "")
        if update >= 0:
            yield Edit("sql_conflict", tokens[update].start, tokens[last].end, "NOTHING")


def _sorts(tokens: Sequence[Token]) -> Iterator[Edit]:
    """An order that is not named is the other one."""
    for n, token in enumerate(tokens):
        if token.word != "order" or _word(tokens, n + 1) != "by":
            continue
        last, is_named = n + 1, False
        while last + 1 < len(tokens) and tokens[last + 1].depth >= token.depth:
            following = tokens[last + 1]
            if following.depth == token.depth and (following.word in {",", "nulls", "rows", ";", *CLAUSES}):
                break
            last += 1
            is_named = is_named or following.word in ("asc", "desc")
        if last > n + 1 and not is_named:
            yield Edit("sql_order", tokens[last].end, tokens[last].end, " DESC")


# ------------------------------------------------------------------------------------------------------------ literals


def literals(source: str) -> Iterator[tuple[int, int]]:
    """The text of each string between its quotes. Those with escapes are left out: offsets would not fit."""
    offsets = [0]
    for line in source.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    fstring_start, fstring_end = getattr(tokenize, "FSTRING_START", -1), getattr(tokenize, "FSTRING_END", -1)
    starts: list[int] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        start = offsets[token.start[0] - 1] + token.start[1]
        end = offsets[token.end[0] - 1] + token.end[1]
        if token.type == fstring_start:
            starts.append(start)
            continue
        if token.type == fstring_end:
            start = starts.pop()
        elif token.type != tokenize.STRING:
            continue
        if starts:
            continue  # A string within the braces of another.
        opening = QUOTES.match(source, start)
        assert opening is not None
        if "\\" not in source[start:end]:
            yield opening.end(), end - len(opening[2])


class _Scopes:
    """In which function and statement a line is."""

    def __init__(self, source: str) -> None:
        nodes = list(_statements(ast.parse(source), ()))
        self._statements = [(node.lineno, _last_line(node), names) for node, names in nodes]
        self._docstrings = {
            node.lineno for node, _ in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }

    def is_docstring(self, line: int) -> bool:
        return line in self._docstrings

    def of(self, line: int) -> tuple[str, tuple[int, int]]:
        """The innermost: of those that hold the line, the one that begins last."""
        first, last, names = max(
            (found for found in self._statements if found[0] <= line <= found[1]), default=(line, line, ())
        )
        return ".".join(names) or MODULE, (first, last)


def _statements(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[ast.stmt, tuple[str, ...]]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from _statements(child, (*names, child.name))
        else:
            if isinstance(child, ast.stmt):
                yield child, names
            yield from _statements(child, names)


def _last_line(node: ast.stmt) -> int:
    """Of a compound statement, that of its head."""
    body: list[ast.stmt] = getattr(node, "body", None) or []
    return max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
