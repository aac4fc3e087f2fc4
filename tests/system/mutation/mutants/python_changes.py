"""The changes that can be made in Python code: the operators of mutmut, and two that it lacks.

What mutmut offers beyond those is left out: `a = b` to `a = None` and the like are refused by the strict type check
before any test runs, so that a test that fails proves nothing. Its two others that are added here: a condition of `if`
is negated, and a statement that only has an effect is deleted.

Left as they are: what stands outside functions (constants, tables of texts), annotations, defaults of parameters,
assertions of the code itself, what is logged, prose, SQL (see `sql_changes.py`) and durations that only tune.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import libcst as cst
from libcst.metadata import CodeRange, MetadataWrapper, PositionProvider
from mutmut.mutation import mutators

from system.mutation.mutants.change import MODULE, Change

LEFT_ALONE: Final = frozenset({"critical", "debug", "error", "exception", "info", "log", "warning", "point"})
"""Methods that log, and `faults.point`, which is there for tests."""
UNTESTED_FUNCTIONS: Final = frozenset({"__repr__", "__str__"})
TUNING: Final = re.compile(r"(timeout|(^|_)(s|ms|us|seconds|days|hours))$")
"""Names of arguments that are durations."""
STRICTNESS: Final = "strict"
"""`zip(..., strict=True)` asserts: it changes nothing where lengths are equal, as they must be."""
CODE: Final = re.compile(r"[\w.:/*-]+")
"""A string that is a code, a name or a path, and not a text for people."""

Operator = Callable[[Any], Iterable[cst.CSTNode]]


def python_changes(source: str) -> list[Change]:
    """In the order of the text."""
    wrapper = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
    finder = _Finder(wrapper.module)
    wrapper.visit(finder)
    return finder.changes


class _Finder(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, module: cst.Module) -> None:
        super().__init__()
        self.changes: list[Change] = []
        self._module = module
        self._scopes: list[str] = []
        self._functions = 0
        self._statements: list[tuple[int, int]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if _is_left_alone(node):
            return False
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            self._scopes.append(node.name.value)
            self._functions += isinstance(node, cst.FunctionDef)
        if (span := self._span(node)) is not None:
            self._statements.append(span)
        if self._functions and self._statements and not isinstance(node, cst.FunctionDef):
            self._find(node)
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if _is_left_alone(original_node):
            return
        if isinstance(original_node, (cst.FunctionDef, cst.ClassDef)):
            self._scopes.pop()
            self._functions -= isinstance(original_node, cst.FunctionDef)
        if self._span(original_node) is not None:
            self._statements.pop()

    def _span(self, node: cst.CSTNode) -> tuple[int, int] | None:
        """The lines of a statement; of a compound one those of its head."""
        if isinstance(node, cst.SimpleStatementLine):
            return self._lines(node)
        if isinstance(node, cst.BaseCompoundStatement) and not isinstance(node, cst.ClassDef):
            first = self._lines(node)[0]
            body = node.cases[0] if isinstance(node, cst.Match) else node.body
            return first, max(first, self._lines(body)[0] - 1)
        return None

    def _lines(self, node: cst.CSTNode) -> tuple[int, int]:
        position = self.get_metadata(PositionProvider, node)
        assert isinstance(position, CodeRange)
        return position.start.line, position.end.line

    def _find(self, node: cst.CSTNode) -> None:
        for of_type, operator in OPERATORS:
            if isinstance(node, of_type):
                for changed in operator(node):
                    self._add(operator.__name__.removeprefix("operator_"), node, changed)

    def _add(self, kind: str, node: cst.CSTNode, changed: cst.CSTNode) -> None:
        line, statement = self._lines(node)[0], self._statements[-1]
        name = ".".join(self._scopes) or MODULE
        self.changes.append(Change(kind, line, statement, name, lambda: self._with(node, changed)))

    def _with(self, node: cst.CSTNode, changed: cst.CSTNode) -> str:
        module = self._module.deep_replace(node, changed)
        assert isinstance(module, cst.Module)
        return module.code


# ------------------------------------------------------------------------------------------------- what is left alone


def _is_left_alone(node: cst.CSTNode) -> bool:
    """Whether neither a node nor what is in it is changed."""
    match node:
        case cst.Annotation() | cst.Decorator() | cst.Assert() | cst.Param() | cst.FormattedString():
            return True
        case cst.ConcatenatedString():
            return True
        case cst.FunctionDef(name=cst.Name(value=name)):
            return name in UNTESTED_FUNCTIONS
        case cst.If(test=cst.Name(value="TYPE_CHECKING")):
            return True
        case cst.Call(func=cst.Attribute(attr=cst.Name(value=name))):
            return name in LEFT_ALONE
        case cst.Arg(keyword=cst.Name(value=name), value=value):
            return name == STRICTNESS or (isinstance(value, cst.BaseNumber) and TUNING.search(name) is not None)
        case _:
            return False


# ---------------------------------------------------------------------------------------------------------- operators


def operator_string(node: cst.SimpleString) -> Iterator[cst.CSTNode]:
    """Of the three changes of mutmut the first alone: the others differ from it in case."""
    value = node.evaluated_value
    if isinstance(value, str) and CODE.fullmatch(value):
        yield from list(mutators.operator_string(node))[:1]


def operator_argument(node: cst.Call) -> Iterator[cst.CSTNode]:
    """Drops a keyword argument, which may have a default."""
    for changed in mutators.operator_arg_removal(node):
        assert isinstance(changed, cst.Call)
        if len(changed.args) < len(node.args):
            [dropped] = [arg for arg in node.args if not any(arg is kept for kept in changed.args)]
            if dropped.keyword is not None and dropped.keyword.value != STRICTNESS:
                yield changed


def operator_condition(node: cst.If | cst.CompIf) -> Iterator[cst.CSTNode]:
    """Negates a condition. Where it begins with `not`, mutmut does it."""
    if not (isinstance(node.test, cst.UnaryOperation) and isinstance(node.test.operator, cst.Not)):
        test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))


def operator_deletion(node: cst.BaseSmallStatement) -> Iterator[cst.CSTNode]:
    """Deletes a statement that only has an effect: a call, an assignment to an attribute or an item, a `raise`."""
    match node:
        case cst.Expr(value=cst.Call() | cst.Await(expression=cst.Call())):
            call = node.value.expression if isinstance(node.value, cst.Await) else node.value
            deletable = not (isinstance(call, cst.Call) and (_is_left_alone(call) or _is_of_parent(call)))
        case cst.Assign(targets=[cst.AssignTarget(target=cst.Attribute() | cst.Subscript())]):
            deletable = True
        case cst.AugAssign() | cst.Raise() | cst.Del():
            deletable = True
        case _:
            deletable = False
    if deletable:
        yield cst.Pass()


def _is_of_parent(call: cst.Call) -> bool:
    """`super().__init__(...)`: what follows fails at once."""
    return isinstance(call.func, cst.Attribute) and call.func.attr.value == "__init__"


OPERATORS: Final[Sequence[tuple[type[cst.CSTNode], Operator]]] = (
    (cst.BaseNumber, mutators.operator_number),
    (cst.SimpleString, operator_string),
    (cst.Name, mutators.operator_name),
    (cst.AugAssign, mutators.operator_augmented_assignment),
    (cst.UnaryOperation, mutators.operator_remove_unary_ops),
    (cst.Call, operator_argument),
    (cst.Call, mutators.operator_symmetric_string_methods_swap),
    (cst.Call, mutators.operator_unsymmetrical_string_methods_swap),
    (cst.CSTNode, mutators.operator_keywords),
    (cst.CSTNode, mutators.operator_swap_op),
    (cst.Match, mutators.operator_match),
    (cst.IfExp, mutators.operator_if_exp),
    (cst.If, operator_condition),
    (cst.CompIf, operator_condition),
    (cst.BaseSmallStatement, operator_deletion),
)
