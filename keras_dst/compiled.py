"""One function compiled by whatever the backend offers; Keras has no public way to ask for it."""

import keras


def compiled(fn):
    """`fn` compiled for tensors in and out: by XLA on JAX, as a graph on TensorFlow, else as is.

    Without it each mask update would be traced anew on JAX, and run op by op on TensorFlow.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(fn)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(fn, reduce_retracing=True)
    if backend == "torch":
        import torch

        return torch.no_grad()(fn)
    return fn
