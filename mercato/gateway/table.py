"""From a method and a path to a route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from mercato.gateway import problems

if TYPE_CHECKING:
    from mercato.gateway.app import BoundRoute


class Table:
    """Finds the route of a method and path: a path without a parameter by one look-up, one with it by its shape.

    The shape of a path is the path without its parameter: that of `/orders/12/history` is `/orders//history`. A path
    has at most one parameter, and in paths of one length it stands in few places; each of them costs one look-up.
    """

    def __init__(self, routes: Sequence[BoundRoute]) -> None:
        self._fixed: dict[str, dict[str, BoundRoute]] = {}
        self._shaped: dict[str, tuple[str, dict[str, BoundRoute]]] = {}
        self._places: dict[int, list[int]] = {}
        for route in routes:
            path, method = route.route.path, route.route.method
            methods = self._fixed.setdefault(path, {}) if "{" not in path else self._add_shape(path)
            assert method not in methods, f"two routes for {route.name}"
            methods[method] = route

    def _add_shape(self, path: str) -> dict[str, BoundRoute]:
        segments = path.split("/")
        places = [i for i, segment in enumerate(segments) if "{" in segment]
        assert len(places) == 1, f"{path} has more than one parameter"
        place = places[0]
        name, segments[place] = segments[place].strip("{}"), ""
        known = self._places.setdefault(len(segments), [])
        if place not in known:
            known.append(place)
        return self._shaped.setdefault("/".join(segments), (name, {}))[1]

    def find(self, method: str, path: str) -> tuple[BoundRoute | problems.MethodNotAllowed | None, Mapping[str, str]]:
        """The route and the path's parameters; an error where the path takes other methods; None for unknown paths."""
        methods, parts = self._fixed.get(path), NOTHING
        if methods is None:
            methods, parts = self._find_shaped(path)
            if methods is None:
                return None, NOTHING
        route = methods.get("GET" if method == "HEAD" else method)
        if route is None:
            allowed = sorted({*methods, "OPTIONS"} | ({"HEAD"} if "GET" in methods else set()))
            return problems.MethodNotAllowed(path=path, allowed=tuple(allowed)), NOTHING
        return route, parts

    def _find_shaped(self, path: str) -> tuple[dict[str, BoundRoute] | None, Mapping[str, str]]:
        segments = path.split("/")
        for place in self._places.get(len(segments), ()):
            value, segments[place] = segments[place], ""
            found = self._shaped.get("/".join(segments))
            if found is not None and value:
                return found[1], {found[0]: value}
            segments[place] = value
        return None, NOTHING


NOTHING: Final[Mapping[str, Any]] = {}
