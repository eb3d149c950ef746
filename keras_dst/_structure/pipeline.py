"""From a model with dead channels to one without: planned, built, compared."""

from __future__ import annotations

import warnings

import keras
import numpy as np
from keras import ops, tree

from keras_dst import _keras
from keras_dst._backend.jit import jit
from keras_dst._structure.build import build
from keras_dst._structure.graph import OPEN, array
from keras_dst._structure.plan import Plan
from keras_dst.surgery import check_model, is_sparse, strip


def shrink(model) -> keras.Model:
    """A smaller dense model that predicts the same, without channels and units that are dead.

    Dead is an output unit whose weights are all zero, as `strip` leaves them after
    `methods.Consensus` or any method with `pattern="channel"`, and a channel that no layer after it
    reads. They go through batch normalisation, activations, pooling, flattening, permutation,
    concatenation, addition and convolutions of every kind, of grouped ones as whole groups, in
    either data format; recurrent layers lose inputs. The constants they leave behind move into the
    biases of the layers after them. A branch that adds nothing but constants goes as a whole. Where
    a constant meets zero padding, one channel holds what all of them gave. What mixes its channels
    (a softmax, attention, layer normalisation) or is a layer of your own keeps them; one channel of
    every layer stays. `shrink_report` says what stayed, and why.

    Both models are run on random numbers before the new one is returned.

    Args:
        model: a built Sequential or Functional model, also one with such models inside. It is left
            as it was; one that is still sparse is stripped in a copy.

    Returns:
        A new Functional model, not compiled. Layers keep their names; those of nested models lie
        flat in it.

    Raises:
        TypeError: for something other than a Keras 3 model.
        ValueError: for an unbuilt model, or one whose `call` is its own.
        RuntimeError: should outputs differ by more than 1e-5 of their size (2e-2 in half
            precision).

    Warns:
        UserWarning: when nothing is dead.

    Example:
        >>> small = keras_dst.shrink(keras_dst.strip(model))
    """
    source = stripped(model)
    small = build(Plan(source))
    if small.count_params() >= source.count_params():
        warnings.warn(f"shrink found nothing to remove in '{model.name}'.", stacklevel=2)
    _compare(source, small)
    return small


def stripped(model) -> keras.Model:
    """The model, or a stripped copy of one that is sparse; raises where it has no graph."""
    check_model(model)
    if not isinstance(model, keras.Model) or _keras.graph_of(model) is None:
        raise ValueError(
            f"shrink works on Sequential and Functional models. '{model.name}' is a "
            f"{type(model).__name__}, whose layers are called by code of its own."
        )
    if not is_sparse(model):
        return model
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return strip(copy)


def random_inputs(model, batch: int):
    """Random numbers for a model's inputs, in their structure."""
    rng = np.random.default_rng(0)

    def draw(x):
        shape = [OPEN if n is None else n for n in x.shape[1:]]
        shape = [batch if x.shape[0] is None else x.shape[0], *shape]
        integer = "int" in x.dtype or x.dtype == "bool"
        drawn = rng.integers(0, 2, shape) if integer else rng.standard_normal(shape)
        return ops.convert_to_tensor(drawn, x.dtype)

    return tree.map_structure(draw, _keras.structures_of(_keras.graph_of(model))[0])


def inference(model):
    """The model's forward pass, compiled as a whole: op by op, JAX would compile each of them."""
    return jit(lambda x: model(x, training=False))


def _compare(model, small) -> None:
    """Raise unless both predict the same for random inputs."""
    inputs = random_inputs(model, batch=2)
    half = any("16" in str(layer.compute_dtype) for layer in _keras.flatten_layers(model))
    outputs = [inference(m)(inputs) for m in (model, small)]
    for a, b in zip(*map(tree.flatten, outputs)):
        a, b = array(a), array(b)
        difference, size = np.abs(a - b).max(initial=0), max(1.0, np.abs(a).max(initial=0))
        if not difference <= (2e-2 if half else 1e-5) * size:
            raise RuntimeError(
                f"shrink would have changed the outputs of '{model.name}' by {difference:.2g}, "
                f"which are of size {size:.2g}. No model is returned; please report this."
            )
