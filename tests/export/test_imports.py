"""Test that the modules of the export package do not import each other in a circle."""

import ast
import graphlib
import pathlib

import keras_dst

ROOT = pathlib.Path(keras_dst.__file__).parent / "export"


def imported_modules(path):
    """Yield the names of export modules that a file imports, including imports inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "keras_dst.export":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            parent, _, name = node.module.rpartition(".")
            if parent == "keras_dst.export":
                yield name


def test_no_import_circles():
    imports = {
        path.stem: set(imported_modules(path))
        for path in ROOT.glob("*.py")
        if path.stem != "__init__"
    }
    assert imports["linter"] >= {"rules", "findings"}
    graphlib.TopologicalSorter(imports).prepare()  # Circular imports raise CycleError.
