"""What Keras has no public way to ask of a backend."""

import keras
from keras import ops


def jit(fn):
    """`fn` compiled for tensors in and out: by XLA on JAX, as a graph on TensorFlow, else as is.

    Without it each mask update would be traced anew on JAX, and run op by op on TensorFlow.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(fn)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(fn, autograph=False, reduce_retracing=True)
    if backend == "torch":
        import torch

        return torch.no_grad()(fn)
    return fn


def is_known_false(flag) -> bool:
    """Return whether a boolean tensor is false now; a tensor that is being traced is not known."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return not isinstance(flag, jax.core.Tracer) and not bool(flag)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.executing_eagerly() and not bool(flag)
    return not bool(flag)


def outside_torch_graph(fn):
    """Return `fn`, which torch.compile does not trace but calls between two compiled graphs."""
    if keras.backend.backend() != "torch":
        return fn

    import torch

    return torch.compiler.disable(fn)


def masked(w, mask):
    """`masks.masked` on torch, run op by op, where `where` may take longer than the plain step.

    On a processor it branches at every entry. A product is vectorised, and with the bits of a float
    it is exact: zeros are positive, and nothing is left of what is not finite.
    """
    import torch

    if torch.compiler.is_compiling():
        return torch.where(mask, w, 0)
    if not (w.is_floating_point() or w.is_complex()):
        return w * mask
    bits = {2: torch.int16, 4: torch.int32}.get(w.element_size())
    if bits is None:
        return torch.where(mask, w, 0)

    @ops.custom_gradient
    def product(w):
        def grad(*args, upstream):
            return masked(upstream, mask)

        return (w.view(bits) * mask).view(w.dtype), grad

    return product(w)


def torch_rng_state() -> str | None:
    """State of the random numbers that layers draw apart from Keras's seeds: Dropout on torch."""
    if keras.backend.backend() != "torch":
        return None
    import torch

    return torch.get_rng_state().numpy().tobytes().hex()


def set_torch_rng_state(state: str) -> None:
    """Go on drawing from a state that `torch_rng_state` gave."""
    import torch

    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8))
