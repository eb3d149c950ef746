"""Two forward paths through one model: the pruned one, which counts, and the full one beside it.

Which of them runs is known while a step is traced, so the compiled step has no branch.
"""

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
_EPSILON = 1e-7  # probabilities are clipped to it before their logarithm, as Keras's losses do


class TwoPathLoss:
    """What stands in for a model's `compute_loss` while both paths are trained.

    In training the model runs again, on the full path; the loss is the sum of both and of what
    couples their outputs. Metrics see the outputs of the pruned path alone, and what does not
    depend on the path (regularisers) or comes from the pruned one (`add_loss`) is counted once.

    Args:
        model: the model that is fitted.
        coupling: from the logits of both paths, classes last, to a scalar; None without.
        on_trace: called whenever a training step is traced.
    """

    def __init__(
        self,
        model,
        coupling: Callable[[Tensor, Tensor], Tensor] | None,
        on_trace: Callable[[], None],
    ):
        if keras.backend.backend() != "jax" and any(
            _keras.is_rematerialized(layer) for layer in _keras.flatten_layers(model)
        ):
            raise ValueError(
                "Layers under RematScope are called again in the backward pass, where it is not "
                "known which of two paths they were on. Build the model without it, or use JAX."
            )
        if isinstance(model.compute_loss, TwoPathLoss):  # left by a fit that was interrupted
            model.compute_loss.restore()
        self.model, self.coupling, self.on_trace = model, coupling, on_trace
        # Past Keras's tracking of attributes; the instance may hold a `compute_loss` of its own.
        self.own = vars(model).get("compute_loss")
        self.inner = model.compute_loss
        self.takes_training = _keras.takes_training(model)
        vars(model)["compute_loss"] = self
        _keras.set_takes_training(model, True)

    def restore(self) -> None:
        """Give the model its own `compute_loss` back."""
        _keras.set_takes_training(self.model, self.takes_training)
        model = vars(self.model)
        if self.own is None:
            del model["compute_loss"]
        else:
            model["compute_loss"] = self.own

    def __call__(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = self._loss(x, y, y_pred, sample_weight, training)
        if not training:
            return loss
        self.on_trace()
        with full_path():
            full = self.model(x, training=True)
            with self._task_alone():
                loss = loss + self._loss(x, y, full, sample_weight, training)
        if self.coupling is not None:
            for weight, *logits in _logits(self.model, y_pred, full):
                term = _keras.add_to_loss(self.model, self.coupling(*logits))
                term = ops.cast(term, loss.dtype)
                loss = loss + (term if weight is None else weight * term)
        return loss

    def _loss(self, x, y, y_pred, sample_weight, training):
        known = {"training": training} if self.takes_training else {}
        return self.inner(x, y, y_pred, sample_weight, **known)

    @contextlib.contextmanager
    def _task_alone(self):
        """No penalties in the model's losses, and nothing that a loss assigns lasts: metrics."""
        variables = [*self.model.variables, *self.model.metrics_variables]
        with (
            _keras.without_additional_losses(self.model),
            keras.StatelessScope([(v, ops.convert_to_tensor(v)) for v in variables]),
        ):
            yield


def _logits(model, pruned, full) -> list[tuple[Any, Tensor, Tensor]]:
    """For every output under a cross-entropy: weight of its loss, logits of both paths."""
    found = []
    for path, loss, weight in _keras.flat_losses(model):
        if _kind(loss) is not None:
            both = [_output(y, _keras.output_structure(model), path) for y in (pruned, full)]
            found.append((weight, *(class_logits(loss, y) for y in both)))
    if not found:
        raise ValueError(
            "The divergence between the two paths is defined for outputs under a cross-entropy of "
            "Keras (categorical, sparse categorical, binary and their focal forms), and this model "
            f"has none. Received: loss={getattr(model, 'loss', None)!r}. "
            "Give DCIL(warmup=1.0) to train without it."
        )
    return found


def _output(outputs, structure, path):
    """One of a model's outputs, where its compiled loss finds it."""
    if keras.tree.is_nested(outputs):
        outputs = keras.tree.pack_sequence_as(structure, keras.tree.flatten(outputs))
    for key in path:
        outputs = outputs[key]
    return outputs


def _kind(loss):
    """The cross-entropies that a loss is one of, or None."""
    fn = getattr(loss, "fn", None)
    return next((kind for kind in (_CLASSES, _BINARY) if fn in kind), None)


def class_logits(loss, outputs: Tensor) -> Tensor:
    """Logits over classes, on the last axis, of outputs that go into a cross-entropy.

    Args:
        loss: a cross-entropy, as a Keras loss object. Its `from_logits` says what the outputs are;
            probabilities are clipped at 1e-7. A binary one makes two classes of every output.
        outputs: float tensor.

    Returns:
        A float32 tensor, up to a constant per entry.
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
