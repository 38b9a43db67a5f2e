"""What a mutant may replace a piece of source by, as syntax trees."""

import ast
from collections.abc import Iterator
from copy import deepcopy

Number = int | float

ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_PAIRS = [
    ("min", "max"),
    ("amin", "amax"),
    ("argmin", "argmax"),
    ("minimum", "maximum"),
    ("any", "all"),
    ("sum", "mean"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
    ("new_zeros", "new_ones"),
    ("floor", "ceil"),
    ("sqrt", "rsqrt"),
    ("tril", "triu"),
]
OPPOSITES = dict(_PAIRS) | {second: first for first, second in _PAIRS}
# Methods whose result could stand for their receiver: without them something is left undone.
OMITTED = {
    "abs", "clamp", "clone", "conj", "contiguous", "detach", "double", "flip", "nan_to_num",
    "reciprocal", "rsqrt", "sqrt", "square", "transpose",
}  # fmt: skip
WITH_IN_PLACE_FORM = {
    "abs", "add", "clamp", "div", "masked_fill", "mul", "neg", "reciprocal", "sqrt", "square",
    "sub",
}  # fmt: skip
SYMMETRIC = {"dot", "max", "maximum", "min", "minimum", "promote_types"}
TRANSPOSED = {"mT", "T", "mH", "H"}


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that may stand in place of a node, as new trees."""
    match node:
        case ast.Constant() | ast.UnaryOp(op=ast.USub(), operand=ast.Constant()):
            yield from _other_constants(node)
        case ast.UnaryOp():
            yield node.operand
        case ast.BinOp():
            yield from _other_operators(node)
            if isinstance(node.op, ast.MatMult):
                yield ast.BinOp(node.right, node.op, node.left)
        case ast.BoolOp():
            yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        case ast.Compare():
            for index, operator in enumerate(node.ops):
                for other in COMPARISONS[type(operator)]:
                    ops = [*node.ops[:index], other(), *node.ops[index + 1 :]]
                    yield ast.Compare(node.left, ops, node.comparators)
        case ast.Attribute(attr=attribute) if attribute in TRANSPOSED:
            yield node.value
        case ast.Call():
            yield from _other_calls(node)
        case ast.Slice():
            if node.lower is not None:
                yield ast.Slice(None, node.upper, node.step)
            if node.upper is not None:
                yield ast.Slice(node.lower, None, node.step)
        case ast.AugAssign():
            yield from _other_operators(node)
            yield ast.Pass()
        case ast.If() | ast.While() | ast.IfExp():
            yield from _with_negated_test(node)
        case ast.comprehension():
            for index, condition in enumerate(node.ifs):
                ifs = [*node.ifs[:index], negated(condition), *node.ifs[index + 1 :]]
                yield ast.comprehension(node.target, node.iter, ifs, node.is_async)
        case ast.Raise() | ast.Continue() | ast.Break() | ast.Assign() | ast.Return():
            yield ast.Pass()
        case ast.Expr(value=ast.Call() | ast.Yield() | ast.YieldFrom()):
            yield ast.Pass()


def negated(condition: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), condition)


def number(node: ast.AST) -> Number | None:
    """Value of a constant that is a number, with its sign; no bool."""
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, node = -1, node.operand
    if not isinstance(node, ast.Constant) or isinstance(node.value, bool):
        return None
    return sign * node.value if isinstance(node.value, Number) else None


def _other_constants(node: ast.AST) -> Iterator[ast.AST]:
    value = number(node)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif value is not None:
        others = [1] if value == 0 else [0, 2] if value == 1 else [value + 1, -value]
        yield from (_constant(type(value)(other)) for other in others)


def _constant(value: Number) -> ast.expr:
    return ast.Constant(value) if value >= 0 else ast.UnaryOp(ast.USub(), ast.Constant(-value))


def _other_operators(node: ast.BinOp | ast.AugAssign) -> Iterator[ast.AST]:
    other = ARITHMETIC.get(type(node.op))
    if other is not None:
        changed = deepcopy(node)
        changed.op = other()
        yield changed


def _with_negated_test(node: ast.If | ast.While | ast.IfExp) -> Iterator[ast.AST]:
    # A comparison and a negation are changed themselves.
    if isinstance(node.test, ast.Compare):
        return
    if isinstance(node.test, ast.UnaryOp) and isinstance(node.test.op, ast.Not):
        return
    changed = deepcopy(node)
    changed.test = negated(node.test)
    yield changed


def _other_calls(node: ast.Call) -> Iterator[ast.AST]:
    name = called(node)
    positional = [a for a in node.args if not isinstance(a, ast.Starred)]
    if len(positional) == len(node.args) >= 2 and name not in SYMMETRIC:
        first, second, *rest = node.args
        yield ast.Call(node.func, [second, first, *rest], node.keywords)
    for index, keyword in enumerate(node.keywords):
        if keyword.arg in ("min", "max") and name == "clamp":
            swapped = ast.keyword(OPPOSITES[keyword.arg], keyword.value)
            others = [*node.keywords[:index], swapped, *node.keywords[index + 1 :]]
            yield ast.Call(node.func, node.args, others)
    if name in OPPOSITES:
        yield _calling(node, OPPOSITES[name])
    if isinstance(node.func, ast.Attribute):
        if name in OMITTED and not _is_module(node.func.value):
            yield node.func.value
        if name in WITH_IN_PLACE_FORM and isinstance(node.func.value, ast.Name):
            yield _calling(node, f"{name}_")
        elif name.removesuffix("_") in WITH_IN_PLACE_FORM and name.endswith("_"):
            yield _calling(node, name.removesuffix("_"))


def called(node: ast.Call) -> str:
    """Last part of the name of what is called, or nothing."""
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _calling(node: ast.Call, name: str) -> ast.Call:
    function = deepcopy(node.func)
    if isinstance(function, ast.Attribute):
        function.attr = name
    else:
        function = ast.Name(name, ast.Load())
    return ast.Call(function, node.args, node.keywords)


def _is_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("torch", "math", "F")
