"""A block that ended at its first break: which of its statements did not run, read from the user's own source."""

import ast
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from stabilitykit.words import code, counted, listed

_Path = list[tuple[list[ast.stmt], ast.stmt]]
"""From a block down to a statement: each body on the way, and the statement in it."""


def skipped(end: BaseException) -> str | None:
    """A sentence on what `end`, which left a recorded block, kept from running; None where that is nothing.

    A call that stands alone, last in its block and in no loop, leaves nothing out. Where the source cannot be read, as
    of code from a string, whatever follows is said to be left out. Of the kit's own blocks nothing is said.
    """
    there = _in_block(end.__traceback__)
    if there is None or str(there.tb_frame.f_globals.get("__name__")).startswith("stabilitykit."):
        return None
    at = f"{Path(there.tb_frame.f_code.co_filename).name}:{there.tb_lineno}"
    said = f"The recorded block ended at its first break, at {at}, as stop_at_break asks: "
    path = _path_to(there)
    if not path:
        return f"{said}what follows there did not run. `recording.stopped` is True."
    left = [one for body, statement in path for one in body[body.index(statement) + 1 :]]
    if not _is_whole(there, path[-1][1]):
        left.append(path[-1][1])
    looped = any(isinstance(statement, ast.For | ast.While | ast.AsyncFor) for _, statement in path)
    if not left and not looped:
        return None
    what = (
        f"{counted(len(left), 'statement')} in it did not run to the end"
        if left
        else "the rest of the loop did not run"
    )
    names = list(dict.fromkeys(_assigned(left)))
    unset = (
        f", {listed(list(map(code, names)), 4)} {'was' if len(names) == 1 else 'were'} not assigned" if names else ""
    )
    return f"{said}{what}{unset}. `recording.stopped` is True."


def _in_block(traceback: TracebackType | None) -> TracebackType | None:
    """Where in the block it was raised: the first frame that is neither the recorder's own nor contextlib's."""
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__") not in ("contextlib", "stabilitykit.recorder.record"):
            return traceback
        traceback = traceback.tb_next
    return None


def _path_to(there: TracebackType) -> _Path:
    """From the innermost `with` that calls `record` to the statement that ran; empty where there is none to be seen."""
    try:
        node: ast.AST = ast.parse("".join(inspect.findsource(there.tb_frame)[0]))
    except (OSError, SyntaxError):
        return []
    path: _Path = []
    begin: int | None = None
    while found := next(((body, one) for body in _bodies(node) for one in body if _holds(one, there)), None):
        path.append(found)
        node = found[1]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            begin = None
        elif isinstance(node, ast.With) and any("record(" in ast.unparse(item.context_expr) for item in node.items):
            begin = len(path)
    return [] if begin is None else path[begin:]


def _holds(statement: ast.stmt, there: TracebackType) -> bool:
    return statement.lineno <= there.tb_lineno <= (statement.end_lineno or statement.lineno)


def _bodies(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        body = getattr(node, name, None)
        if isinstance(body, list):
            yield body
    for one in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield one.body


def _is_whole(there: TracebackType, statement: ast.stmt) -> bool:
    """Whether the call that was left is all that the statement does."""
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return False
    call, positions = statement.value, list(there.tb_frame.f_code.co_positions())[there.tb_lasti // 2]
    return positions == (call.lineno, call.end_lineno, call.col_offset, call.end_col_offset)


def _assigned(statements: Sequence[ast.stmt]) -> Iterator[str]:
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
