"""A function that computes gradients with the backend of the test run."""

import keras
import numpy as np
from keras import ops


def gradients(function, arguments, upstream):
    """Return float64 gradients of `sum(upstream * function(*arguments))` for each argument.

    `arguments` is a list of tensors. `upstream` is a tensor with the shape of the function's
    result.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(arguments)
            result = function(*arguments)
        found = tape.gradient(result, arguments, output_gradients=upstream)
    elif backend == "jax":
        import jax

        found = jax.jit(lambda arguments: jax.vjp(function, *arguments)[1](upstream))(arguments)
    else:
        import torch

        leaves = [a.detach().clone().requires_grad_() for a in arguments]
        found = torch.autograd.grad(function(*leaves), leaves, upstream)
    return [ops.convert_to_numpy(ops.cast(g, "float32")).astype(np.float64) for g in found]
