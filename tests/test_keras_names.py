"""The installed Keras has every private attribute that the package reads."""

import ast

from keras_dst import _keras
from tests.pages import ROOT


def test_this_keras_has_every_private_name():
    assert _keras.missing_names() == []


def test_a_name_that_moved_is_reported(monkeypatch):
    names = {**_keras.PRIVATE_NAMES, "layer": ("_a_name_that_moved",)}
    monkeypatch.setattr(_keras, "PRIVATE_NAMES", names)
    assert _keras.missing_names() == ["layer._a_name_that_moved"]


def test_no_other_module_reads_a_private_name_of_keras():
    private = {name for names in _keras.PRIVATE_NAMES.values() for name in names}
    for path in (ROOT / "keras_dst").rglob("*.py"):
        if path.name == "_keras.py":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        assert not [module for module in imported if module.startswith("keras.src")], path
        own = {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
        read = {n.attr for n in nodes if isinstance(n, ast.Attribute)} - own
        assert read & private == set(), path
