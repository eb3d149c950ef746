"""Helpers for training on several devices. Keras has no common API for these functions, so each
backend has its own code here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_dst import _keras

Tensor = Any


@contextlib.contextmanager
def placed_like(variable) -> Iterator[None]:
    """Place variables that are created within this context on the devices of `variable`.

    Variables with the shape of `variable` are sharded like `variable`. Variables with other shapes
    are replicated: every device holds a full copy.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        strategy = getattr(variable.value, "distribute_strategy", None)
        if strategy is not None and not tf.distribute.has_strategy():
            with strategy.scope():
                yield
            return
    if backend == "jax" and keras.distribution.distribution() is not None:
        with _keras.distribution_like(variable).scope():
            yield
        return
    yield


def check_distribution(optimizer, variable) -> None:
    """Raise ValueError if an optimizer cannot train a variable with replicas on several devices."""
    if keras.backend.backend() != "tensorflow":
        return
    strategy = getattr(variable.value, "distribute_strategy", None)
    if strategy is None or strategy.num_replicas_in_sync == 1:
        return
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    for each in (optimizer, inner):
        if _keras.distribution_strategy_of(each) is not strategy:
            raise ValueError(
                "Expected an optimizer that was created within strategy.scope(), like the model. "
                f"Received: '{each.name}', which was created outside of the scope."
            )
    if inner.gradient_accumulation_steps:
        raise ValueError(
            "Keras cannot accumulate gradients under tf.distribute. Use a larger batch. Received: "
            f"gradient_accumulation_steps={inner.gradient_accumulation_steps}"
        )


def counter_dtype(variable, dtype: str) -> str:
    """Return the dtype to use for a counter: `dtype`, or int32 if several TensorFlow workers train
    the model.

    The workers of a TensorFlow cluster cannot exchange integers of 8 or 16 bits.
    """
    if keras.backend.backend() == "tensorflow" and dtype in ("uint8", "int16"):
        import tensorflow as tf

        strategy = getattr(variable.value, "distribute_strategy", None)
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            return "int32"
    return dtype


def sum_over_replicas(gradients: Sequence[Tensor | None]) -> tuple[list[Tensor | None], int]:
    """Return the gradients, each summed over all replicas, and the number of replicas.

    Only `tf.distribute` passes separate gradients for each replica to an optimizer. JAX runs one
    program for all devices, and torch's DistributedDataParallel sums the gradients before the
    optimizer step.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            known = {i: ops.convert_to_tensor(g) for i, g in enumerate(gradients) if g is not None}
            summed = context.all_reduce(tf.distribute.ReduceOp.SUM, list(known.values()))
            found = dict(zip(known, summed))
            return [found.get(i) for i in range(len(gradients))], context.num_replicas_in_sync
    return list(gradients), 1


def refresh_torch_parameters(model) -> None:
    """Update the torch parameters of a built model whose layers have gained or lost variables.

    Keras registers torch parameters when a model is built. DistributedDataParallel synchronizes
    only registered parameters between processes.
    """
    if keras.backend.backend() == "torch":
        for layer in _keras.flatten_layers(model):
            _keras.refresh_torch_parameters(layer)


def on_accelerator(tensor) -> bool:
    """Return whether the operations on a tensor run on a GPU or TPU instead of a CPU.

    On JAX and TensorFlow, a tensor that is being traced has no device yet. On JAX, the function
    therefore checks the default device. On TensorFlow, the function checks whether a GPU exists.
    """
    backend = keras.backend.backend()
    if backend == "torch":
        return tensor.device.type != "cpu"
    if backend == "jax":
        import jax

        default = jax.config.values["jax_default_device"]
        return getattr(default, "platform", default or jax.default_backend()) != "cpu"
    if backend == "tensorflow":
        import tensorflow as tf

        return bool(tf.config.list_logical_devices("GPU"))
    return False
