"""Reset the states of recurrent layers while a model is exported or evaluated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras

from keras_dst import _keras


@contextlib.contextmanager
def reset_states(model: keras.Model) -> Iterator[None]:
    """Reset the states of stateful recurrent layers to zero, and restore them afterwards.

    A ``.tflite`` file starts from zero states, so the Keras model must also start from zero states
    in a comparison. The function also restores all other variables that a call of the model can
    change.

    Args:
        model: A built Keras model.
    """
    recurrent = [
        layer
        for layer in _keras.flatten_layers(model)
        if isinstance(layer, keras.layers.RNN) and layer.stateful
    ]
    variables = list(model.non_trainable_variables)
    variables += [state for layer in recurrent for state in keras.tree.flatten(layer.states)]
    before = [(variable, keras.ops.convert_to_numpy(variable).copy()) for variable in variables]
    try:
        for layer in recurrent:
            layer.reset_state()
        yield
    finally:
        for variable, value in before:
            variable.assign(value)
