"""Tests of the configs of methods and schedules. To test a new class, add a line to OBJECTS."""

import inspect
import json
import re

import keras
import pytest

import keras_dst
from keras_dst import tfmot
from keras_dst.methods import (
    DCIL,
    DST,
    SET,
    ST3,
    FlipOut,
    LayerMethod,
    Magnitude,
    OptG,
    RigL,
    UpdateMethod,
)
from keras_dst.schedules import Constant, Cubic, Geometric, Sigmoid

GROUPS = [["stem", "project"], ["expand", ("depthwise", -2)]]
# OBJECTS contains one or more objects of every class. For every argument of a class, at least one
# object has a value that is not the default value.
OBJECTS = [
    Constant(0.9, begin=0.25),
    Constant(0.9, begin_step=10),
    Cubic(0.9, 0.5, begin=0.125, end=1.0),
    Cubic(0.9, begin_step=10, end_step=90),
    Geometric(0.9, 0.5, begin=0.125, end=1.0),
    Geometric(0.9, begin_step=10, end_step=90),
    Sigmoid(0.9, 0.5, begin=0.125, end=0.5, steepness=8.0),
    Sigmoid(0.9, begin_step=10, end_step=90),
    DST(sparsity=0.9, alpha=1e-3, granularity="layer", reset_density=0.125, frequency=5),
    DST(sparsity=Geometric(0.9, end=0.5), pattern="1x4"),
    DCIL(
        0.75,
        0.5,
        4.0,
        "erk",
        "channel",
        "square",
        frequency=5,
        min_kept=8,
        counted_in="flops",
        round_to=4,
    ),
    DCIL(Sigmoid(0.75), pattern="1x4"),
    Magnitude(0.75, "erk", "1x4", revival=True, frequency=5, min_kept=8),
    Magnitude(Sigmoid(0.75), {"conv.*": 0.5, "head": 0.25}, score="lamp"),
    Geometric(0.9, rate=0.25),
    Magnitude(0.9, pattern="channel", counted_in="parameters", round_to=16),
    FlipOut(0.9, pattern="channel", counted_in="parameters", round_to=16),
    OptG(0.9, pattern="channel", counted_in="parameters", round_to=16),
    SET(0.9, pattern="channel", counted_in="parameters", round_to=16),
    RigL(0.9, pattern="channel", counted_in="parameters", round_to=16),
    FlipOut(0.9, 3.0, 0.5, 0.25, "erk", "1x4", frequency=5, min_kept=8, seed=7),
    FlipOut(Cubic(0.9), allocation={"conv.*": 0.5, "head": 0.25}),
    OptG(0.9, 0.5, "erk", "1x4", frequency=5, min_kept=8),
    ST3(0.9, True, "erk", frequency=5, min_kept=8),
    ST3(0.9, pattern="channel", counted_in="parameters", round_to=16),
    DST(0.9, pattern="channel", counted_in="parameters"),
    Magnitude(0.9, pattern="channel", groups=GROUPS),
    FlipOut(0.9, pattern="channel", groups=GROUPS),
    OptG(0.9, pattern="channel", groups=GROUPS),
    SET(0.9, pattern="channel", groups=GROUPS),
    RigL(0.9, pattern="channel", groups=GROUPS),
    ST3(0.9, pattern="channel", groups=GROUPS),
    DCIL(0.9, pattern="channel", groups=GROUPS),
    SET(0.9, "uniform", "1x4", 0.25, stop=0.5, frequency=5, min_kept=8, seed=7),
    SET(0.9, {"conv.*": 0.5, "head": 0.25}, stop_step=100),
    RigL(0.9, "uniform", "1x4", 0.25, stop=0.5, frequency=5, min_kept=8, seed=7),
    RigL(0.9, {"conv.*": 0.5, "head": 0.25}, stop_step=100),
]
MINIMAL = [Constant(0.9), Cubic(0.9), Geometric(0.9), Sigmoid(0.9)]
MINIMAL += [DCIL(0.9), DST(), FlipOut(0.9), Magnitude(0.9), OptG(0.9), RigL(0.9)]
MINIMAL += [SET(0.9), ST3(0.9)]
CLASSES = [type(thing) for thing in MINIMAL]
every_object = pytest.mark.parametrize("thing", OBJECTS + MINIMAL, ids=repr)


def arguments(cls):
    parameters = dict(inspect.signature(cls.__init__).parameters)
    del parameters["self"]
    return parameters


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_argument_has_a_test_object(cls):
    for name, parameter in arguments(cls).items():
        assert any(
            getattr(thing, name) != parameter.default for thing in OBJECTS if type(thing) is cls
        ), f"no {cls.__name__} above sets {name}"


@every_object
def test_config_contains_exactly_the_arguments(thing):
    config = thing.get_config()
    assert config.keys() == arguments(type(thing)).keys()
    for name, value in config.items():
        if isinstance(value, (int, float, str)):
            assert value == getattr(thing, name)


@every_object
def test_round_trip(thing):
    config = json.loads(json.dumps(thing.get_config()))
    again = type(thing).from_config(config)
    through_keras = keras.saving.deserialize_keras_object(
        json.loads(json.dumps(keras.saving.serialize_keras_object(thing)))
    )
    for other in (again, through_keras):
        assert type(other) is type(thing)
        assert other == thing
        assert hash(other) == hash(thing)
        for name in arguments(type(thing)):
            assert getattr(other, name) == getattr(thing, name)


@every_object
def test_repr_is_the_constructor_call(thing):
    scope = {**vars(keras_dst.methods), **vars(keras_dst.schedules)}
    assert eval(repr(thing), scope) == thing


class NoArguments(UpdateMethod):
    """A pruning method that defines no constructor."""


class Forwarding(Magnitude):
    """A method that passes arguments on to its base class."""

    def __init__(self, *args, extra=1, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = extra


class EveryKind(LayerMethod):
    """A method with positional-only and keyword-only arguments."""

    def __init__(self, first, /, second=2, *, third=3):
        self.first, self.second, self.third = first, second, third


class NoSteps(tfmot.PruningSchedule):
    """A schedule that defines no constructor."""


OWN = [NoArguments(), NoSteps(), Forwarding(0.5), Forwarding(0.5, extra=2, allocation="erk")]
OWN += [EveryKind(1), EveryKind(1, second=5, third=7)]


@pytest.mark.parametrize("thing", OWN, ids=repr)
def test_config_of_unusual_constructors(thing):
    again = type(thing).from_config(json.loads(json.dumps(thing.get_config())))
    assert again == thing
    assert eval(repr(thing), globals()) == thing
    assert repr(again) == repr(thing)


def test_objects_without_arguments_are_equal():
    assert NoArguments() == NoArguments()
    assert NoArguments() != NoSteps()
    assert NoArguments().get_config() == {}


@pytest.mark.parametrize("signature", ["*values", "**values", "a, *args", "a, **values"])
def test_variadic_arguments_raise(signature):
    scope = {"Method": LayerMethod}
    with pytest.raises(TypeError, match="must have names"):
        exec(f"class Own(Method):\n    def __init__(self, {signature}): pass", scope)


def test_an_argument_that_is_not_stored_raises():
    class Forgetful(LayerMethod):
        def __init__(self, strength):
            pass

    for use in (repr, LayerMethod.get_config):
        with pytest.raises(AttributeError, match=r"self\.strength = strength"):
            use(Forgetful(1))


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (Cubic(0.9), "Cubic(sparsity=0.9)"),
        # The argument 0.0 equals its default, so `repr` omits it.
        (Cubic(0.9, 0.0), "Cubic(sparsity=0.9)"),
        (DST(), "DST()"),
        (DST(Constant(0.5), pattern="1x4"), "DST(sparsity=Constant(sparsity=0.5), "
         "pattern='1x4')"),
    ],
)  # fmt: skip
def test_repr_leaves_out_defaults(thing, text):
    assert repr(thing) == text


def test_objects_of_equal_class_and_arguments_are_equal():
    everything = OBJECTS + MINIMAL
    assert len(set(everything)) == len(everything)
    assert Cubic(0.9) == Cubic(0.9, 0.0)
    assert Cubic(0.9) != Cubic(0.8)
    assert Cubic(0.9, end=1.0) != Sigmoid(0.9)
    assert Cubic(0.9) != 0.9


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Cubic(0), Cubic(0.0)),
        (Magnitude(0.9, {"a": 0.5, "b": 0.25}), Magnitude(0.9, {"b": 0.25, "a": 0.5})),
    ],
)
def test_equal_objects_have_equal_hashes(one, other):
    assert one == other
    assert hash(one) == hash(other)


# -- documentation ---------------------------------------------------------------------------------


def documented_defaults():
    """Yield the class, the argument and the default value for each "Defaults to" in docstrings of
    public classes."""
    for module in (keras_dst.methods, keras_dst.schedules, keras_dst.regularizers):
        for cls in vars(module).values():
            if not inspect.isclass(cls) or not cls.__module__.startswith(module.__name__):
                continue
            text = inspect.getdoc(cls).partition("Args:")[2].partition("\n\n")[0]
            for entry in re.split(r"\n(?=    \w)", text):
                name, _, rest = entry.strip().partition(":")
                if found := re.search(r"Defaults\s+to\s+`?([^\s`,:;()]+)", rest):
                    yield cls, name, eval(found[1].rstrip("."), {"__builtins__": {}})


def test_defaults_are_documented():
    found = {(cls.__name__, name) for cls, name, _ in documented_defaults()}
    assert {("DST", "alpha"), ("Magnitude", "frequency"), ("ThresholdPenalty", "alpha")} <= found


@pytest.mark.parametrize(("cls", "name", "default"), [*documented_defaults()])
def test_documented_default_equals_the_signature(cls, name, default):
    assert arguments(cls)[name].default == default


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_argument_is_documented(cls):
    documented = "\n".join(inspect.getdoc(base) or "" for base in cls.__mro__[:-1])
    for name in arguments(cls):
        assert re.search(rf"^ +(\w+, )*{name}(, \w+)*:", documented, re.M), name
