"""Tests that the installed Keras has every private attribute that keras_dst reads."""

import ast

import keras
import pytest

from keras_dst import _keras
from tests.pages import ROOT


def test_installed_keras_has_all_private_names():
    assert _keras.missing_names() == []


def hide(target, name):
    """Hide an attribute of an object, as if Keras had renamed the attribute."""

    class Renamed(type(target)):
        def __getattribute__(self, attribute):
            if attribute == name:
                raise AttributeError(f"no attribute {attribute!r}")
            return super().__getattribute__(attribute)

        # PyTorch modules find their submodules in `__getattr__`, so hide the attribute there, too.
        def __getattr__(self, attribute):
            if attribute == name:
                raise AttributeError(f"no attribute {attribute!r}")
            return super().__getattr__(attribute)

    object.__setattr__(target, "__class__", Renamed)


def test_renamed_private_names_are_reported(monkeypatch):
    objects = _keras._objects_to_check()
    monkeypatch.setattr(_keras, "_objects_to_check", lambda: objects)
    for kind, target in objects.items():
        original = type(target)
        for name in _keras.PRIVATE_NAMES[kind]:
            hide(target, name)
            assert _keras.missing_names() == [f"{kind}.{name}"]
            object.__setattr__(target, "__class__", original)
    assert _keras.missing_names() == []


def built_layer():
    layer = keras.layers.Dense(1)
    layer.build((1, 1))
    return layer


def built_optimizer():
    optimizer = keras.optimizers.AdamW()
    optimizer.build([keras.Variable([1.0], name="kernel")])
    return optimizer


def exempt(optimizer):
    _keras.exempt_from_decay(optimizer, _keras.trained_variables_of(optimizer))


# Without an error, a renamed attribute would silently change the training.
@pytest.mark.parametrize(
    ("name", "make", "use"),
    [
        ("_remat_mode", built_layer, _keras.is_rematerialized),
        ("_track_variables", built_layer, _keras.refresh_torch_parameters),
        ("_exclude_from_weight_decay", built_optimizer, exempt),
    ],
)
def test_using_renamed_private_names_raises(name, make, use):
    if name == "_track_variables" and keras.backend.backend() != "torch":
        pytest.skip("only layers on PyTorch have this attribute")
    target = make()
    use(target)
    hide(target, name)
    with pytest.raises((AttributeError, RuntimeError), match=name):
        use(target)


def test_private_names_are_read_in_one_module_only():
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
