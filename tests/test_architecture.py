"""Imports go down the layers of ARCHITECTURE.md, never up or sideways."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "cats"
LAYERS = {
    11: "__main__",
    10: "cli",
    9: "recipes",
    8: "evaluation families finetuning benchmarks report serving integrations",
    7: "checkpoint metrics decode card",
    6: "calibration apply quantisation",
    5: "methods fusion mlp",
    4: "model fingerprint formats",
    3: "weights",
    2: "ops data results history smollm2",
    1: "functional config errors storage version undo lazy protocols processes",
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names.split()}
# config is the content of files: within layer 1, errors and storage lie below it
WITHIN = {("config", n) for n in ("errors", "storage", "version")} | {("storage", "errors")}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _part(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(tree):
    """The parts of cats that a module imports, at its top or inside functions, at run time."""
    skipped = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "cats" and rest:
                yield rest.partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = _part(path)
    assert here in LAYER, f"{here} has no layer: name it in ARCHITECTURE.md and here"
    for there in set(imported_parts(ast.parse(path.read_text()))) - {here}:
        allowed = LAYER[there] < LAYER[here] or (here, there) in WITHIN
        assert allowed, f"{here} (layer {LAYER[here]}) imports {there} (layer {LAYER[there]})"


def test_an_import_upwards_inside_a_function_is_seen():
    source = "def f():\n    from cats.cli import options\n    from cats import ops"
    assert [*imported_parts(ast.parse(source))] == ["cli", "ops"]
    hidden = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cats import cli"
    assert [*imported_parts(ast.parse(hidden))] == []
