"""Which fields of an answer a consumer reads: answers that record it, and refuse what the pact does not state.

A consumer needs of an answer
    - what its decoder requires: the fields without a default, without which the message cannot be read at all;
    - what its code reads.

The decoder proves the first by itself, for it reads the example of the pact and nothing more. A field with a default is
the gap: where the pact does not state it, the code would read the default for ever. So the consumer gets its answers as
instances of subclasses that record each read, and raise `UnstatedField` for a field that the pact does not state. A
field with a default that is stated, and not read, is refused at the end: the consumer does not need it.

What is only encoded, copied or compared as a whole (`msgspec.json.encode`, `structs.replace`) is not recorded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import msgspec

from mercato.chassis.contract import Message, ServiceError


class UnstatedField(AssertionError):
    """The consumer reads a field of an answer that its pact does not state."""


class Reads:
    """The reads of one answer, by path (`lines.product_id`), and what is wrong with them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.paths: set[str] = set()
        self.violations: list[str] = []
        self._optional: set[str] = set()

    def watch(self, answer: Any, stated: Any, path: str = "") -> Any:
        """The same answer, whose reads are recorded. `stated` has the values of the pact."""
        if isinstance(answer, Message) and isinstance(stated, Mapping):
            fields = {field.name: field.required for field in msgspec.structs.fields(answer)}
            known = cast(Mapping[str, Any], stated)
            values = {n: self.watch(getattr(answer, n), known.get(n), self._below(path, n)) for n in fields}
            self._optional |= {self._below(path, n) for n, required in fields.items() if n in known and not required}
            return self._watched(type(answer), fields, known, path)(**values)
        if isinstance(answer, tuple) and isinstance(stated, Sequence) and stated:
            return tuple(self.watch(each, stated[0], path) for each in cast(tuple[Any, ...], answer))
        return answer

    def watch_error(self, error: ServiceError, stated: Mapping[str, Any]) -> ServiceError:
        """The same for the details of an error."""
        has_default = {name for name in error.fields if hasattr(type(error), name)}
        self._optional |= {f"details.{name}" for name in has_default & stated.keys()}
        watched: Any = self._watched(type(error), error.fields, stated, "details", is_base=True)
        # As `ServiceError.copy`: its constructor reads every detail, for the sentence.
        made = watched.__new__(watched, *error.args)
        vars(made).update(error.__dict__)
        return made

    def unneeded(self) -> list[str]:
        """The fields that the pact states, and the consumer neither needs for decoding nor reads."""
        return sorted(self._optional - self.paths)

    def _watched(
        self, kind: type[Any], fields: Collection[str], stated: Collection[str], path: str, **options: Any
    ) -> type[Any]:
        names, known = frozenset(fields), frozenset(stated)

        def read(instance: Any, name: str) -> Any:
            if name in names:
                where = self._below(path, name)
                if name not in known:
                    sentence = f"{self._name}: the code reads {where}, which the pact does not state"
                    self.violations.append(sentence)
                    raise UnstatedField(sentence)
                self.paths.add(where)
            return object.__getattribute__(instance, name)

        body = {"__getattribute__": read, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        metaclass: Any = type(kind)
        return metaclass(kind.__name__, (kind,), body, **options)

    def _below(self, path: str, name: str) -> str:
        return f"{path}.{name}" if path else name
