"""The installed Keras has every private attribute that the package reads."""

import ast

import keras
import pytest

from keras_dst import _keras
from tests.pages import ROOT


def test_this_keras_has_every_private_name():
    assert _keras.missing_names() == []


def hide(target, name):
    """Make an attribute of an object missing, as if Keras had renamed the attribute."""

    class Renamed(type(target)):
        def __getattribute__(self, attribute):
            if attribute == name:
                raise AttributeError(f"no attribute {attribute!r}")
            return super().__getattribute__(attribute)

        def __getattr__(self, attribute):  # Modules of torch find their submodules here.
            if attribute == name:
                raise AttributeError(f"no attribute {attribute!r}")
            return super().__getattr__(attribute)

    object.__setattr__(target, "__class__", Renamed)


def test_every_name_that_moved_is_reported(monkeypatch):
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


# Without an error, a renamed attribute would change the training and nobody would notice.
@pytest.mark.parametrize(
    ("name", "make", "use"),
    [
        ("_remat_mode", built_layer, _keras.is_rematerialized),
        ("_track_variables", built_layer, _keras.refresh_torch_parameters),
        ("_exclude_from_weight_decay", built_optimizer, exempt),
    ],
)
def test_a_use_of_a_name_that_moved_raises_an_error_with_the_name(name, make, use):
    if name == "_track_variables" and keras.backend.backend() != "torch":
        pytest.skip("an attribute of layers on torch")
    target = make()
    use(target)
    hide(target, name)
    with pytest.raises((AttributeError, RuntimeError), match=name):
        use(target)


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
