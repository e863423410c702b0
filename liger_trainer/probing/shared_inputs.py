"""Which children a forward calls on one and the same input, read from its source."""

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator

from .rebinding import cached_weakly

_CONDITIONAL = (
    ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.With, ast.BoolOp, ast.Lambda, ast.ListComp, ast.GeneratorExp,
    ast.DictComp, ast.SetComp, ast.FunctionDef, ast.Match,
)  # fmt: skip


@cached_weakly
def shared_inputs(forward: types.FunctionType) -> tuple[tuple[str, ...], ...]:
    """Groups of children that ``forward`` calls with the same argument of its own, each once and in every call.

    For ``q = self.q_proj(x); k = self.k_proj(x)`` it gives ``(("q_proj", "k_proj"),)``. A function whose source is not
    there, or that assigns to the argument, has no groups.
    """
    try:
        [function] = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return ()
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return ()
    owner, *parameters = (argument.arg for argument in function.args.args)
    assigned = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    mentioned = [n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)]
    groups: dict[str, list[str]] = {}
    for call in (node for statement in _before_returns(function.body) for node in _always_run(statement)):
        match call:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=child), args=[ast.Name(id=x)], keywords=[]):
                if name == owner and x in parameters and x not in assigned and mentioned.count(child) == 1:
                    groups.setdefault(x, []).append(child)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _before_returns(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements up to the first that may return and is no ``return`` itself."""
    for statement in body:
        may_return = not isinstance(statement, (ast.Return, ast.FunctionDef))
        if may_return and any(isinstance(node, ast.Return) for node in ast.walk(statement)):
            return
        yield statement


def _always_run(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, _CONDITIONAL):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _always_run(child)
