"""Compilation and other backend functions that Keras does not expose."""

import functools
import math

import keras
from keras import ops

from keras_dst._backend import devices
from keras_dst._backend.guesses import with_guesses


def jit(fn):
    """Return `fn`, compiled by XLA on JAX or as a TensorFlow graph. On torch, return a function
    that guesses the conditions in `fn` (see `guesses.py`).

    Without compilation, JAX would trace every mask update again, and TensorFlow would run every
    operation separately.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(fn)
    if backend == "tensorflow":
        import tensorflow as tf

        # TensorFlow warns if functions with the same code object are traced often, even if the
        # functions belong to different models. A `functools.partial` object has no code object, so
        # TensorFlow counts the tracings of each model separately.
        return tf.function(functools.partial(fn), autograph=False, reduce_retracing=True)
    if backend == "torch":
        import torch

        return with_guesses(torch.no_grad()(fn))
    return fn


def traced_once(fn, scores, kept, *constants):
    """Return `fn(scores, kept, *constants)`. JAX and TensorFlow trace `fn` only once for all models
    with equal shapes.

    Tracing the top-k selection takes up to a second on JAX and TensorFlow. If no function is being
    traced, `fn` is called directly.

    Args:
        fn: Function whose result depends only on its arguments.
        scores: List of tensors.
        kept: Integer tensor.
        constants: Hashable values.
    """
    if not _is_traced(kept):
        return fn(scores, kept, *constants)
    shapes = tuple((*s.shape, keras.backend.standardize_dtype(s.dtype)) for s in scores)
    return _shared(fn, constants, shapes, kept.ndim, devices.on_accelerator(kept))(scores, kept)


@functools.lru_cache(maxsize=64)  # A full cache frees the trace that was used least recently.
def _shared(fn, constants, *signature):
    return jit(lambda scores, kept: fn([*scores], kept, *constants))


def _is_traced(tensor) -> bool:
    """Return whether JAX or TensorFlow is tracing the function that computes a tensor."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return isinstance(tensor, jax.core.Tracer)
    if backend == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly()
    return False


def is_known_false(flag) -> bool:
    """Return whether a boolean tensor is known to be false.

    While a function is traced, the values of its tensors are unknown, and the result is False.
    """
    return not _is_traced(flag) and not bool(flag)


def outside_torch_graph(fn):
    """Return a wrapper of `fn` that torch.compile does not trace. torch.compile splits the graph of
    the caller in two, and calls the wrapper between the two graphs."""
    if keras.backend.backend() != "torch":
        return fn

    import torch

    return torch.compiler.disable(fn)


def masked(w, mask):
    """Compute `masks.masked` on torch. In eager mode, this function is faster than `torch.where`.

    On a CPU, `torch.where` tests the condition separately for every entry. This function instead
    views the floats as integers and multiplies the integers by the mask, which is faster. The
    integer multiplication is vectorized, and its result is exact. Every pruned entry becomes +0,
    even if the weight is not finite.
    """
    import torch

    # Exporters trace with torch.jit, which cannot trace a custom gradient that closes over a
    # tensor.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return torch.where(mask, w, 0)
    if not (w.is_floating_point() or w.is_complex()):
        return w * mask
    bits = _integers_of_size(w.element_size())
    if bits is None:
        return torch.where(mask, w, 0)
    if not (w.requires_grad and torch.is_grad_enabled()):
        # Without gradients, skip `ops.custom_gradient`, which takes ten times as long.
        return (w.view(bits) * mask).view(w.dtype)

    @ops.custom_gradient
    def product(w):
        def grad(*args, upstream):
            return masked(upstream, mask)

        return masked(w, mask), grad

    return product(w)


def tensor_of(x):
    """Convert a variable or tensor to a tensor that can be passed to a custom gradient.

    On TensorFlow, `ops.convert_to_tensor` returns a variable, which a custom gradient refuses.
    """
    x = ops.convert_to_tensor(x)
    return ops.reshape(x, ops.shape(x)) if keras.backend.backend() == "tensorflow" else x


def sum_of_squares(x):
    """Return the sum of all squared entries of a tensor, in one pass over the tensor."""
    if keras.backend.backend() != "torch":
        flat = ops.reshape(x, (-1,))
        return ops.dot(flat, flat)
    import torch

    # The squares may be added in any order. If the axes are sorted by their strides, `reshape` need
    # not copy the tensor.
    flat = x.permute(sorted(range(x.ndim), key=x.stride, reverse=True)).reshape(-1)
    # For a small tensor, `ops.dot` takes ten times as long as `torch.dot`.
    return torch.dot(flat, flat)


def mask_in_place(w, mask) -> None:
    """Set the entries of a torch tensor to 0, in place, where the mask is false."""
    import torch

    with torch.no_grad():
        w.view(_integers_of_size(w.element_size())).mul_(mask)


def _integers_of_size(size: int):
    """Return the torch integer type whose values have `size` bytes, or None."""
    import torch

    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(size)


def separate_buffer(value):
    """Return a tensor that has the values of `value` and can be assigned to a second variable.

    On JAX, an assigned tensor becomes the buffer of the variable, and two variables must not share
    one buffer.
    """
    return ops.copy(value) if keras.backend.backend() == "jax" else value


def divide_in_place(x, divisor):
    """Return `ops.divide(x, divisor)`. On torch, the result overwrites `x` to save memory."""
    if keras.backend.backend() != "torch":
        return ops.divide(x, divisor)
    import torch

    with torch.no_grad():
        return torch.divide(x, divisor, out=x)


def where_in_place(mask, x1, x2, out):
    """Return `ops.where(mask, x1, x2)`. On torch, the result overwrites `out` to save memory."""
    if keras.backend.backend() != "torch":
        return ops.where(mask, x1, x2)
    import torch

    # Create numbers on the device with `torch.full`, because the host would wait for the copy of a
    # number to the device.
    x1, x2 = (
        x.to(out.dtype)
        if torch.is_tensor(x)
        else torch.full((), x, dtype=out.dtype, device=out.device)
        for x in (x1, x2)
    )
    with torch.no_grad():
        return torch.where(mask, x1, x2, out=out)


def count_all_true(mask):
    """Return the number of true entries of a boolean tensor, as an int32 scalar."""
    if keras.backend.backend() != "torch":
        return ops.sum(ops.cast(mask, "int32"))
    if mask.numel() % 128:
        import torch

        return mask.sum(dtype=torch.int32)
    return ops.sum(count_true(ops.reshape(mask, (-1, 128))))


def count_true(mask):
    """Return the number of true entries in every row of a boolean matrix, as an int32 vector.

    `torch.sum` converts booleans to int64, which needs eight bytes per entry. This function views
    the booleans as bytes, which need no conversion. Each sum of 128 booleans fits into a byte.
    """
    if keras.backend.backend() != "torch":
        return ops.cast(ops.count_nonzero(mask, axis=1), "int32")
    import torch

    rows, width = mask.shape
    parts = mask.view(torch.uint8).view(rows, -1, math.gcd(width, 128))
    return parts.sum(2, dtype=torch.uint8).sum(1, dtype=torch.int32)


def true_positions(mask, limit: int):
    """Return the positions of the first `limit` true entries of a torch tensor. If the tensor has
    fewer true entries, the rest of the result is -1.

    The length of the result is always `limit`. The CPU therefore need not wait until the GPU has
    counted the true entries.
    """
    import torch

    return torch.nonzero_static(mask.view(-1), size=limit, fill_value=-1).view(-1)


def gather(values, positions):
    """Return the entries of a torch vector at the given positions, which must not be negative.

    This function is faster than `ops.take`, which reads and writes the positions several times to
    support negative positions.
    """
    import torch

    return torch.index_select(ops.convert_to_tensor(values), 0, positions)


def set_true(mask, positions) -> None:
    """Set the entries of a boolean torch tensor at the given positions to true, in place."""
    mask.view(-1).index_fill_(0, positions.long(), True)


def remove_true(mask, other):
    """Set the entries of the torch tensor `mask` to false, in place, where `other` is true. Return
    `mask`."""
    return mask.gt_(other)  # For booleans, `gt_` computes `mask and not other`.


def add_true(mask, positions, flags) -> None:
    """Set entries of a boolean torch tensor to true, in place. Entry i of `flags` states whether to
    set the entry at `positions[i]`.

    Before the call, `mask` must be false at all positions in `positions`. A position may occur
    several times in `positions`, but at most one of its flags may be true.
    """
    import torch

    mask.view(torch.uint8).view(-1).index_add_(0, positions, flags.to(torch.uint8))


def torch_rng_state() -> str | None:
    """Return the state of torch's random number generator, or None on other backends."""
    if keras.backend.backend() != "torch":
        return None
    import torch

    return torch.get_rng_state().numpy().tobytes().hex()


def set_torch_rng_state(state: str) -> None:
    """Restore a state that `torch_rng_state` returned."""
    import torch

    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8))
