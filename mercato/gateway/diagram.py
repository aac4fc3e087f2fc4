"""Diagrams of states, as SVG that is a part of a page: a box for each state, an arrow for each legal move.

A state is right of those that lead to it; the first state is the leftmost. Arrows of moves back run below, arrows past
a state above it. Colours and fonts come from the style sheet of the page (`.states`).
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Final

Moves = Mapping[str, frozenset[str]]

WIDTH: Final = 140
HEIGHT: Final = 32
GAP: Final = 44
ROW: Final = 64
MARGIN: Final = 8
ARCH: Final = 22
"""How high an arrow rises for each column that it crosses."""


def svg(name: str, moves: Moves) -> str:
    """The diagram of the states of `name`. The first of `moves` is the initial state."""
    places = _places(moves)
    columns = 1 + max(column for column, _ in places.values())
    rows = 1 + max(row for _, row in places.values())
    pairs = [(places[before], places[after]) for before in moves for after in moves[before]]
    spans = [end[0] - start[0] for start, end in pairs]
    along = [end[0] - start[0] for start, end in pairs if start[1] == end[1]]
    above = MARGIN + ARCH * max(along) if max(along) > 1 or 0 in along else MARGIN
    below = MARGIN + (ARCH if min(spans) < 0 else 0)
    width = columns * WIDTH + (columns - 1) * GAP + 2 * MARGIN
    height = above + (rows - 1) * ROW + HEIGHT + below
    corners = {state: (MARGIN + column * (WIDTH + GAP), above + row * ROW) for state, (column, row) in places.items()}
    arrows = [
        f'<path class="move" data-from="{before}" data-to="{after}" marker-end="url(#arrow-{name})" '
        f'd="{_arrow(corners[before], corners[after])}"/>'
        for before in moves
        for after in sorted(moves[before])
    ]
    boxes = [_box(state, *corners[state], is_last=not moves[state]) for state in moves]
    said = "; ".join(f"{before} to {', '.join(sorted(after))}" for before, after in moves.items() if after)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(f"Moves of {name}: {said}.")}">'
        f'<defs><marker id="arrow-{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>'
        f"{''.join(arrows)}{''.join(boxes)}</svg>"
    )


def _places(moves: Moves) -> dict[str, tuple[int, int]]:
    """Column and row of each state. A move to a state that is declared before is a move back."""
    order = list(moves)
    columns: dict[str, int] = {}
    filled: dict[int, int] = {}
    places: dict[str, tuple[int, int]] = {}
    for i, state in enumerate(order):
        columns[state] = 1 + max((columns[before] for before in order[:i] if state in moves[before]), default=-1)
    # In a column, a state with moves is in the first row, next to the states that follow it.
    for state in sorted(order, key=lambda state: not moves[state]):
        column = columns[state]
        places[state] = (column, filled.get(column, 0))
        filled[column] = filled.get(column, 0) + 1
    return places


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    (left, top), (to_left, to_top) = start, end
    middle, to_middle = left + WIDTH // 2, to_left + WIDTH // 2
    span = round((to_left - left) / (WIDTH + GAP))
    if span == 0 and top == to_top:
        return f"M{middle - 18} {top}C{middle - 30} {top - ARCH} {middle + 30} {top - ARCH} {middle + 18} {top}"
    if span == 0:
        return f"M{middle} {top + HEIGHT}L{middle} {to_top}"
    if span < 0:
        bottom, low = top + HEIGHT, max(top, to_top) + HEIGHT + ARCH
        return f"M{middle - 12} {bottom}C{middle - 40} {low} {to_middle + 40} {low} {to_middle + 12} {to_top + HEIGHT}"
    if span > 1 and top == to_top:
        high = top - ARCH * span
        return f"M{middle} {top}C{middle + 40} {high} {to_middle - 40} {high} {to_middle} {to_top}"
    if span > 1:
        return f"M{middle} {top + HEIGHT}Q{middle} {to_top + HEIGHT // 2} {to_left} {to_top + HEIGHT // 2}"
    side, y, to_y = left + WIDTH, top + HEIGHT // 2, to_top + HEIGHT // 2
    bend = (to_left - side) // 2
    return f"M{side} {y}C{side + bend} {y} {to_left - bend} {to_y} {to_left} {to_y}"


def _box(state: str, left: int, top: int, *, is_last: bool) -> str:
    kind = "state last" if is_last else "state"
    return (
        f'<g class="{kind}"><rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text x="{left + WIDTH // 2}" y="{top + HEIGHT // 2 + 4}" text-anchor="middle">{escape(state)}</text></g>'
    )
