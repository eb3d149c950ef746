"""Tests of the package layout: imports only from lower layers, and public names in the root."""

import ast
import pathlib
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import keras_dst
from tests.backends import heavy, once

pytestmark = once

ROOT = pathlib.Path(keras_dst.__file__).parent
FILES = {
    ".".join(("keras_dst", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in ROOT.rglob("*.py")
}
# ROWS lists the modules on each level of the package, from the lowest to the highest level. A
# module may import only modules of its own level or of lower levels.
ROWS = (
    ("version", "_utils", "_keras"),
    ("_backend", "masks", "schedules", "allocation", "regularizers"),
    ("methods",),
    ("layers",),
    ("optimizers",),
    ("surgery",),
    ("_reporting", "_structure", "_training", "plots"),
    ("callbacks", "clustering", "export", "recalibration", "recommendation", "sparse_files"),
    ("tfmot", "tuner", "demo"),
    ("cli", "__main__"),
)


def imports(path):
    """Yield the modules of keras_dst that a file imports, also inside functions."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in FILES else node.module


GRAPH = {name: set(imports(path)) - {name} for name, path in FILES.items()}


def row_of(name):
    part = name.split(".")[1] if "." in name else "__main__"
    return next(i for i, row in enumerate(ROWS) if part in row)


def test_modules_do_not_import_in_a_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from error


def test_modules_do_not_import_from_higher_groups():
    upwards = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        if name != "keras_dst"
        for other in others
        if other != "keras_dst" and row_of(other) > row_of(name)
    ]
    assert upwards == []


def test_no_function_shadows_a_module():
    """If there were a module `report`, the function of the same name would hide this module."""
    packages = [name for name, path in FILES.items() if path.name == "__init__.py"]
    for package in packages:
        module = sys.modules.get(package) or __import__(package, fromlist=["_"])
        for name in getattr(module, "__all__", ()):
            if f"{package}.{name}" in FILES:
                assert isinstance(getattr(module, name), type(sys)), f"{package}.{name}"


def test_dir_lists_the_public_names():
    assert dir(keras_dst) == sorted(keras_dst.__all__)
    assert not [name for name in keras_dst.__all__ if name[0] == "_" and name != "__version__"]


@heavy
def test_importing_the_package_loads_only_keras_and_no_reports_or_plots():
    code = "import sys, keras; before = set(sys.modules); import keras_dst; "
    code += "print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    packages = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert packages == {"keras_dst"}
    ours = {"export", "plots", "_structure", "_reporting.html", "_reporting.sparsity", "cli"}
    assert not loaded & {f"keras_dst.{name}" for name in ours}
