"""A broad `except` that goes on keeps the traceback: in the log line that it writes, or in the one of a named function.

It says so in a comment on its line where that is not seen at once: `logged by NAME`, a function of the same module that
logs with `exc_info`, or `no traceback: REASON`.
"""

from __future__ import annotations

import ast
import re

import pytest

from .test_shape import MODULES, label

KEEPING = ("exception", "print_exc")
LOGGED_BY = re.compile(r"#.*logged by (\w+)")
NO_TRACEBACK = re.compile(r"#.*no traceback: .{15,}")


def silent_handlers(source: str) -> list[int]:
    """The lines of broad handlers that neither raise at their end nor keep the traceback."""
    tree, lines = ast.parse(source), source.splitlines()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    logging = {function.name for function in functions if _keeps_traceback(function)}
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and _is_broad(node)
        and not isinstance(node.body[-1], ast.Raise)
        and not _keeps_traceback(node)
        and not _says_why(lines[node.lineno - 1], logging)
    ]


def _is_broad(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(each is None or ast.unparse(each) in ("Exception", "BaseException") for each in caught)


def _keeps_traceback(node: ast.AST) -> bool:
    return any(
        (isinstance(each, ast.keyword) and each.arg == "exc_info")
        or (isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute) and each.func.attr in KEEPING)
        for each in ast.walk(node)
    )


def _says_why(line: str, logging: set[str]) -> bool:
    named = LOGGED_BY.search(line)
    return (named is not None and named[1] in logging) or NO_TRACEBACK.search(line) is not None


def test_every_broad_handler_that_goes_on_keeps_the_traceback():
    modules = [module for module in MODULES if "testing" not in module.parts]

    assert {label(m): lines for m in modules if (lines := silent_handlers(m.read_text()))} == {}


@pytest.mark.parametrize(
    "handler",
    [
        "except Exception:\n    pass",
        "except:\n    return",
        "except (ValueError, Exception) as error:\n    log.warning('x', reason=str(error))",
        "except BaseException:  # logged by elsewhere\n    pass",
        "except Exception:  # no traceback: short\n    pass",
        "except Exception:\n    if a:\n        raise\n    pass",
    ],
)
def test_a_handler_that_loses_the_traceback_is_found(handler: str):
    assert silent_handlers(f"def f():\n  try:\n    a()\n  {handler.replace(chr(10), chr(10) + '  ')}\n") == [4]


@pytest.mark.parametrize(
    "handler",
    [
        "except Exception:\n    log.exception('x')",
        "except Exception as error:\n    log.error('x', exc_info=error)",
        "except BaseException:\n    undo()\n    raise",
        "except ValueError:\n    pass",
        "except Exception:  # an edge; logged by report\n    report()",
        "except Exception:  # no traceback: the child of a fork says one sentence\n    pass",
    ],
)
def test_a_handler_that_keeps_it_is_none(handler: str):
    source = f"def f():\n  try:\n    a()\n  {handler.replace(chr(10), chr(10) + '  ')}\n"
    assert silent_handlers(source + "def report():\n  log.error('x', exc_info=True)\n") == []
