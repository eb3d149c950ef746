"""`shrink`: plan the removal of channels, build the smaller model, and compare both models."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import keras
import numpy as np
from keras import ops, tree

from keras_dst import _keras
from keras_dst._backend.jit import jit
from keras_dst._structure.build import build
from keras_dst._structure.graph import check_graph, to_float64
from keras_dst._structure.plan import Plan
from keras_dst._utils.open_sizes import OPEN_SIZE, accepted_size


def shrink(model) -> keras.Model:
    """Remove dead channels, and return a smaller dense model with the same predictions.

    A unit is dead if its weights are all zero, as after `methods.Consensus` or after any method
    with `pattern="channel"`. A channel is also dead if no layer reads it. The analysis follows dead
    channels through batch normalization, activations, pooling, flattening, permutation,
    concatenation, addition and convolutions, with channels first or last. Grouped convolutions lose
    only whole groups of channels. The constant values of removed channels move into the biases of
    the next layers. If the next layer pads its input with zeros, a bias cannot replace the constant
    values. `shrink` then keeps one constant channel, and changes the kernel entries for this
    channel so that the outputs stay the same. A branch that only adds constants to a sum is removed
    completely. Custom layers keep all channels. Every layer keeps at least one channel.
    `shrink_report` lists the dead channels that are kept, and states why they are kept.

    Before `shrink` returns the smaller model, it runs both models on random inputs and compares
    their outputs.

    Args:
        model: Built Sequential or Functional model, which may contain other Sequential and
            Functional models. It is not changed. If the model is sparse, the function uses the
            masked weights, in which pruned entries are zero.

    Returns:
        A new Functional model that is not compiled. Layers keep their names, and layers of nested
        models become layers of the new model. Most layers are copies. Custom layers, preprocessing
        layers and layers without weights share their state with the given model.

    Raises:
        TypeError: If `model` is not a Keras 3 model.
        ValueError: If the model is not built, has its own `call` method, or cannot be run on random
            inputs.
        RuntimeError: If the outputs differ by more than 1e-5 of their magnitude (2e-2 in half
            precision).

    Warns:
        UserWarning: If no channel is dead.

    Example:
        >>> small = keras_dst.shrink(keras_dst.strip(model))
    """
    plan, small = plan_and_build(model)
    if plan.removes_nothing():
        warnings.warn(f"shrink found nothing to remove in '{model.name}'.", stacklevel=2)
    return small


def plan_and_build(model) -> tuple[Plan, keras.Model]:
    """Plan and build the smaller model, and compare its outputs with the given model's outputs."""
    check_graph(model)
    # To limit memory, the given model runs before the smaller model is built.
    samples = random_inputs(model, batch=1, count=2)
    expected = _outputs(model, samples)
    plan = Plan(model)
    small = build(plan)
    _compare(model, expected, _outputs(small, samples))
    return plan, small


def random_inputs(model, batch: int, count: int = 1) -> list:
    """Return `count` batches of random inputs, each in the structure that a model expects.

    Unknown sizes are set to 32, or to another size that the model accepts. Random strings and
    integers are drawn from the vocabularies of lookup layers in the model, if there are any.
    """
    vocabularies = _vocabularies(model)

    def draw(x, size, rng):
        shape = [size if n is None else n for n in x.shape[1:]]
        shape = [batch if x.shape[0] is None else x.shape[0], *shape]
        if x.dtype == "string":
            if keras.backend.backend() != "tensorflow":
                raise ValueError(
                    f"'{model.name}' has an input of strings, which Keras runs on TensorFlow only. "
                    "Fix: set KERAS_BACKEND=tensorflow, or shrink a model that begins after the "
                    "layer that reads the strings."
                )
            return ops.convert_to_tensor(rng.choice(vocabularies[str] or ["a", "b"], shape))
        if "int" in x.dtype or x.dtype == "bool":
            return ops.convert_to_tensor(rng.choice(vocabularies[int] or [0, 1], shape), x.dtype)
        if x.sparse:
            hot = rng.integers(0, shape[-1], shape[:-1])
            return ops.one_hot(hot, shape[-1], dtype=x.dtype, sparse=True)
        return ops.convert_to_tensor(rng.standard_normal(shape), x.dtype)

    def draw_all(size, seed=0):
        rng = np.random.default_rng(seed)
        return tree.map_structure(lambda x: draw(x, size, rng), inputs)

    def run(values):
        with keras.StatelessScope():
            model(values, training=False)

    inputs = _keras.structures_of(_keras.graph_of(model))[0]
    size = OPEN_SIZE
    if any(None in x.shape[1:] for x in tree.flatten(inputs)):
        size = accepted_size(draw_all, run, "create the model with fixed sizes in keras.Input.")
    return [draw_all(size, seed) for seed in range(count)]


def _vocabularies(model) -> dict[type, list]:
    """Return the words and the integers in the vocabularies of lookup layers."""
    found: dict[type, list] = {str: [], int: []}
    for layer in _keras.flatten_layers(model):
        if isinstance(layer, (keras.layers.StringLookup, keras.layers.TextVectorization)):
            found[str] += map(str, layer.get_vocabulary())
        elif isinstance(layer, keras.layers.IntegerLookup):
            found[int] += map(int, layer.get_vocabulary())
    return found


def inference(model) -> Callable:
    """Return the forward pass of a model without side effects, compiled if possible."""
    variables = model.variables

    def forward(values, x):
        # The values are passed as arguments, because JAX would copy captured values into the
        # compiled program as constants. A stateless scope keeps the states of recurrent layers and
        # random seeds unchanged.
        with keras.StatelessScope(state_mapping=list(zip(variables, values))):
            return model(x, training=False)

    function = jit(forward)

    def run(x):
        nonlocal function
        values = [v.value for v in variables]
        try:
            return function(values, x)
        except Exception:  # Some layers, such as lookup tables, cannot be compiled.
            function = forward
            return forward(values, x)

    return run


def _outputs(model, samples: list) -> list[np.ndarray]:
    """Return the outputs of a model for several inputs.

    The model runs on one input at a time to limit memory. Keras keeps the outputs of all layers in
    memory until the last layer has run.
    """
    run = inference(model)
    return [to_float64(y) for sample in samples for y in tree.flatten(run(sample))]


def _compare(model, expected: list[np.ndarray], received: list[np.ndarray]) -> None:
    """Raise an error unless the smaller model gives the outputs of the given model."""
    half = any("16" in str(layer.compute_dtype) for layer in _keras.flatten_layers(model))
    for a, b in zip(expected, received, strict=True):
        differ = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        difference = np.abs(a - b)[differ].max(initial=0)
        size = np.abs(a[np.isfinite(a)]).max(initial=1)
        if not difference <= (2e-2 if half else 1e-5) * size:
            raise RuntimeError(
                f"shrink would change the outputs of '{model.name}' by {difference:.2g}; the "
                f"largest output is {size:.2g}. No model is returned. Fix: if a custom layer is "
                "sparse, call keras_dst.strip(model) first; otherwise please report this model."
            )
