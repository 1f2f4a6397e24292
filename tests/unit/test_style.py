"""The density of the package's code: how much a reader has to unpack per line."""

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import post_dist

PACKAGE = Path(post_dist.__file__).parent
MOST_PER_1000_LINES = {"comprehensions": 25, "tuple packings": 4, "conditional expressions": 12}
FEWEST_COMMENTS_PER_1000_LINES = 45
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "_assets" not in path.parts)


def counts(text: str) -> Counter[str]:
    found = Counter(lines=sum(bool(line.strip()) for line in text.splitlines()))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, COMPREHENSIONS):
            found["comprehensions"] += 1
        if isinstance(node, ast.IfExp):
            found["conditional expressions"] += 1
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            found["tuple packings"] += any(isinstance(t, ast.Tuple) for t in node.targets)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        found["comments"] += token.type == tokenize.COMMENT
    return found


def density() -> dict[str, float]:
    total: Counter[str] = Counter()
    for path in files():
        total += counts(path.read_text())
    return {name: 1000 * count / total["lines"] for name, count in total.items()}


@pytest.mark.parametrize("name", MOST_PER_1000_LINES)
def test_the_code_is_not_compressed(name: str) -> None:
    assert density()[name] <= MOST_PER_1000_LINES[name]


def test_comments_say_why() -> None:
    assert density()["comments"] >= FEWEST_COMMENTS_PER_1000_LINES


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods that a reader of the package may call."""
    for node in tree.body:
        if isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
            yield node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                if isinstance(member, FUNCTIONS) and not member.name.startswith("_"):
                    yield member


def test_commands_for_people_to_copy_are_quoted() -> None:
    """A path in an f-string would be two words of the shell if it has a space."""
    for path in files():
        assert not re.search(r"post-dist [\w-]+ [\w -]*\{", path.read_text()), (
            f"{path}: command_line"
        )


def test_public_functions_with_four_parameters_explain_them() -> None:
    lacking = []
    for path in files():
        for function in public_functions(ast.parse(path.read_text())):
            given = function.args
            names = [each.arg for each in given.posonlyargs + given.args + given.kwonlyargs]
            names = [name for name in names if name not in ("self", "cls")]
            explained = "Args:" in (ast.get_docstring(function) or "")
            if len(names) >= 4 and not explained:
                lacking.append(f"{path.relative_to(PACKAGE)}: {function.name}")
    # typer shows the parameters of a command by their own help texts.
    assert [each for each in lacking if not each.startswith("commands/")] == []
