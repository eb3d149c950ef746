"""Loss for training on two forward passes: with masks (pruned path) and without masks (full
path)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import keras
from keras import losses, ops

from keras_dst import _keras
from keras_dst.methods.base import full_path

Tensor = Any

_CLASSES = (
    losses.categorical_crossentropy,
    losses.sparse_categorical_crossentropy,
    losses.categorical_focal_crossentropy,
)
_BINARY = (losses.binary_crossentropy, losses.binary_focal_crossentropy)
_EPSILON = 1e-7  # Lower bound at which Keras's losses clip probabilities before the logarithm.


class TwoPathLoss:
    """Replacement of a model's `compute_loss` that trains both paths.

    A training step runs the model a second time, without masks. The total loss adds the loss of the
    pruned path, the loss of the full path, and the divergence between the outputs of the two paths.
    Metrics use only the outputs of the pruned path. The total loss contains the losses of
    regularizers and of `add_loss` only once.

    Args:
        model: Model that is trained.
        divergence: Function with two arguments: the logits of the pruned path and the logits of the
            full path. The classes are on the last axis. The function returns one divergence for
            each pair of logit vectors. If None, the loss has no divergence term.
        on_trace: Function that is called each time Keras traces a training step.
        inner: Original `compute_loss` method, which `TwoPathLoss` replaces.
        takes_training: Whether `inner` takes the argument `training`.

    Raises:
        ValueError: If layers of the model were created under `RematScope`, and the backend is not
            JAX.
    """

    def __init__(
        self,
        model,
        divergence: Callable[[Tensor, Tensor], Tensor] | None,
        on_trace: Callable[[], None],
        inner: Callable[..., Tensor],
        takes_training: bool,
    ):
        self.model, self.divergence, self.on_trace = model, divergence, on_trace
        self.inner, self.takes_training = inner, takes_training

    def __call__(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = self._loss(x, y, y_pred, sample_weight, training)
        if not training:
            return loss
        self.on_trace()
        with full_path():
            full = self.model(x, training=True)
            with self._without_penalties():
                loss = loss + self._loss(x, y, full, sample_weight, training)
        if self.divergence is not None:
            divergence = self._divergence(y_pred, full, sample_weight)
            loss = loss + ops.cast(divergence, loss.dtype)
        return loss

    def _loss(self, x, y, y_pred, sample_weight, training):
        known = {"training": training} if self.takes_training else {}
        return self.inner(x, y, y_pred, sample_weight, **known)

    @contextlib.contextmanager
    def _without_penalties(self):
        """Within this context, compute losses without penalties, and keep all variables
        unchanged."""
        variables = [*self.model.variables, *self.model.metrics_variables]
        with (
            _keras.without_additional_losses(self.model),
            keras.StatelessScope([(v, ops.convert_to_tensor(v)) for v in variables]),
        ):
            yield

    def _divergence(self, pruned, full, sample_weight) -> Tensor:
        """Return the sum of the divergences of all outputs that have a cross-entropy. Each
        divergence is multiplied by the weight of the output's loss."""
        structure, terms = _keras.output_structure(self.model), []
        for path, loss, weight in _keras.flat_losses(self.model):
            if _kind(loss) is None:
                continue
            outputs = [_output(y, structure, path) for y in (pruned, full)]
            weights = sample_weight
            if keras.tree.is_nested(sample_weight):
                for key in path:
                    weights = weights[key]
            term = _Divergence(self.divergence, loss)(*reversed(outputs), weights)
            terms.append(term if weight is None else weight * term)
        if not terms:
            raise ValueError(
                "Expected an output whose loss is a Keras cross-entropy (categorical, sparse "
                "categorical, binary or focal), because the divergence needs its logits. Received: "
                f"loss={getattr(self.model, 'loss', None)!r}. Fix: train without the divergence, "
                "with DCIL(warmup=1.0)."
            )
        return sum(terms)


def check_rematerialization(model) -> None:
    """Raise ValueError if a layer was created under `RematScope`, except on JAX. In the backward
    pass, a layer that was created under `RematScope` cannot tell the pruned path from the full
    path."""
    if keras.backend.backend() != "jax" and any(
        _keras.is_rematerialized(layer) for layer in _keras.flatten_layers(model)
    ):
        raise ValueError(
            "Expected a model without RematScope. Received a model with layers that were created "
            "under RematScope. The backward pass calls the layers a second time, and cannot tell "
            "the pruned path from the full path. Build the model without RematScope, or use JAX."
        )


class _Divergence(losses.Loss):
    """Keras loss that compares the outputs of the pruned path with the outputs of the full path.

    The loss has the same reduction over the batch as the given cross-entropy. Keras also applies
    the sample weights and the mask of the outputs to the loss.
    """

    def __init__(self, divergence, crossentropy):
        super().__init__(
            name="path_divergence", reduction=crossentropy.reduction, dtype=crossentropy.dtype
        )
        self.divergence, self.crossentropy = divergence, crossentropy

    def call(self, y_true, y_pred):
        """Return the divergence between the outputs of the pruned path and of the full path, for
        every entry of the batch."""
        logits = (class_logits(self.crossentropy, outputs) for outputs in (y_pred, y_true))
        entries = self.divergence(*logits)
        if _kind(self.crossentropy) is _BINARY and len(entries.shape):
            # `BinaryCrossentropy` also takes the mean over the last axis.
            return ops.mean(entries, axis=-1)
        return entries


def _output(outputs, structure, path):
    """Return one output of a model. `path` lists the keys that select the output in nested
    outputs."""
    if keras.tree.is_nested(outputs):
        outputs = keras.tree.pack_sequence_as(structure, keras.tree.flatten(outputs))
    for key in path:
        outputs = outputs[key]
    return outputs


def _kind(loss):
    """Return the type of a loss: `_CLASSES` or `_BINARY` for a cross-entropy, and None for other
    losses."""
    fn = getattr(loss, "fn", None)
    return next((kind for kind in (_CLASSES, _BINARY) if fn in kind), None)


def class_logits(loss, outputs: Tensor) -> Tensor:
    """Return the logits for a cross-entropy, with the classes on the last axis.

    Args:
        loss: Cross-entropy, as a Keras loss object. The argument `from_logits` of the loss states
            whether the outputs are logits or probabilities. Probabilities are clipped at 1e-7. For
            a binary cross-entropy, each output is converted to the logits of two classes.
        outputs: Outputs of the model, as a float tensor.

    Returns:
        A float32 tensor. If the outputs are probabilities, the logits may be shifted by a constant,
        which does not change a cross-entropy.
    """
    outputs = ops.cast(outputs, "float32")
    from_logits = getattr(loss, "from_logits", False)
    if not from_logits:
        outputs = ops.clip(outputs, _EPSILON, 1 - _EPSILON)
    if _kind(loss) is _BINARY:
        one = outputs if from_logits else ops.log(outputs) - ops.log(1 - outputs)
        return ops.stack([ops.zeros_like(one), one], axis=-1)
    logits = outputs if from_logits else ops.log(outputs)
    return ops.moveaxis(logits, getattr(loss, "axis", -1), -1)
