"""How dense the prose of the code is: python tests/prose.py [FILE ...] prints a row for each file,
and the sums.

A statement is any ast.stmt except def, class and docstrings; its nodes are all its descendants in
the syntax tree that are not in a nested statement. It is a mirror, not a law: where a formula is
one statement in the paper it may be one here. tests/test_house.py holds the whole to the limits at
the end of this file.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NESTED = (ast.stmt, ast.ExceptHandler, ast.match_case)


class Prose(NamedTuple):
    """The counts of one file, or of several."""

    lines: int
    statements: int
    nodes: int
    heavy: int  # statements of more than 40 nodes
    long_lines: int  # of more than 100 characters
    tuple_assignments: int  # a, b = x, y
    comprehensions: int
    nested_comprehensions: int
    walrus: int
    merges: int  # of dicts, by |
    conditionals: int  # x if y else z
    comments: int
    complexity: int  # of the most complex function


def is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def count_nodes(statement: ast.AST) -> int:
    """The statement's own nodes: those of statements inside it are theirs."""
    count = 0
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, NESTED):
            count += 1 + count_nodes(child)
    return count


def is_tuple_assignment(node: ast.AST) -> bool:
    """a, b = x, y; but not a swap."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    targets = node.targets[0]
    if not isinstance(targets, ast.Tuple):
        return False
    left = {ast.unparse(target) for target in targets.elts}
    right = {ast.unparse(value) for value in node.value.elts}
    return left != right


def is_merge(node: ast.AST) -> bool:
    """{...} | {...}, or a |= of a dict; types and flags are no merges."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return any(
            isinstance(side, ast.Dict | ast.DictComp | ast.Set) for side in (node.left, node.right)
        )
    return isinstance(node, ast.AugAssign) and isinstance(node.op, ast.BitOr)


BRANCHES = (ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.comprehension, ast.Assert)


def complexity_of(function: ast.AST) -> int:
    """Cyclomatic complexity: 1, and 1 for each branch, loop, handler, comprehension, and further
    `and` or `or`.
    """
    complexity = 1
    for node in ast.walk(function):
        if isinstance(node, BRANCHES):
            complexity += 1
        if isinstance(node, ast.BoolOp):
            complexity += len(node.values) - 1
        if isinstance(node, ast.comprehension):
            complexity += len(node.ifs)
    return complexity


def functions_of(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def count_comments(text: str) -> int:
    """Lines with a comment, section rules included."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def measure(text: str) -> Prose:
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    not_counted = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    statements = []
    for node in nodes:
        if (
            isinstance(node, ast.stmt)
            and not isinstance(node, not_counted)
            and not is_docstring(node)
        ):
            statements.append(node)
    sizes = [count_nodes(statement) for statement in statements]
    comprehensions = [node for node in nodes if isinstance(node, COMPREHENSIONS)]
    nested = 0
    for outer in comprehensions:
        inner = [node for node in ast.walk(outer) if isinstance(node, COMPREHENSIONS)]
        nested += len(inner) > 1 or len(outer.generators) > 1
    complexities = [complexity_of(function) for function in functions_of(tree)]
    lines = text.splitlines()
    return Prose(
        lines=len(lines),
        statements=len(statements),
        nodes=sum(sizes),
        heavy=sum(size > 40 for size in sizes),
        long_lines=sum(len(line) > 100 for line in lines),
        tuple_assignments=sum(is_tuple_assignment(node) for node in nodes),
        comprehensions=len(comprehensions),
        nested_comprehensions=nested,
        walrus=sum(isinstance(node, ast.NamedExpr) for node in nodes),
        merges=sum(is_merge(node) for node in nodes),
        conditionals=sum(isinstance(node, ast.IfExp) for node in nodes),
        comments=count_comments(text),
        complexity=max(complexities, default=0),
    )


def add(parts: list[Prose]) -> Prose:
    sums = [sum(column) for column in zip(*parts, strict=True)]
    return Prose(*sums)._replace(complexity=max(part.complexity for part in parts))


def show(name: str, prose: Prose) -> str:
    thousand = 1000 / max(1, prose.statements)
    cells = [
        f"{prose.lines:6d}",
        f"{prose.nodes / max(1, prose.statements):6.1f}",
        f"{100 * prose.heavy / max(1, prose.statements):6.1f}%",
        f"{prose.long_lines:6d}",
        f"{prose.tuple_assignments * thousand:6.0f}",
        f"{prose.comprehensions * thousand:6.0f}",
        f"{prose.nested_comprehensions:6d}",
        f"{prose.walrus:6d}",
        f"{prose.merges:6d}",
        f"{prose.conditionals * thousand:6.0f}",
        f"{100 * prose.comments / max(1, prose.lines):6.1f}",
        f"{prose.complexity:6d}",
    ]
    return f"{name:22s}" + " ".join(cells)


TITLES = (
    "lines  nodes   >40 nd  >100c  a,b=x,y  compr nested walrus merges  cond comments complexity"
)


def main(names: list[str]) -> None:
    files = [Path(name) for name in names] or sorted(
        [*ROOT.glob("*.py"), *ROOT.glob("systems/*.py")]
    )
    print(" " * 22 + TITLES)
    parts = []
    for file in files:
        parts.append(measure(file.read_text()))
        print(show(file.name, parts[-1]))
    print(show("all", add(parts)))


if __name__ == "__main__":
    main(sys.argv[1:])
