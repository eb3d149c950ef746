"""The pruning API of TensorFlow Model Optimization (tfmot) on Keras 3, for moving over.

The names, the arguments and the masks are those of `tfmot.sparsity.keras` 0.8, on every backend.
Masks live in the layers, as those of `sparsify` do, so that `report`, `shrink` and `export_tflite`
read a pruned model as it is:

    t = 1, 2, ...  before step t, where the schedule has a turn:  m = 1[|w| >= k-th largest |w|],
                   k = max(1, round(size (1 - s_t)));  then  w = m w
                   step t: forward with m w, gradient for all of w

Every weight is ranked by itself, weights that tie with the k-th are kept, and the gradient of a
pruned weight moves it for one step, so that it may come back at a turn.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_dst import _keras, masks
from keras_dst._backend.jit import jit
from keras_dst._training.drivers import LayerDriver
from keras_dst._utils.config import Configurable
from keras_dst._utils.validation import is_integer
from keras_dst.callbacks import guard_step
from keras_dst.layers import SparseMixin, sparse_class
from keras_dst.methods.base import LayerMethod
from keras_dst.schedules import check_sparsity
from keras_dst.surgery import become_sparse, check_model, has_kernel, strip, unsupported
from keras_dst.tfmot import legacy_files

_register = keras.saving.register_keras_serializable("keras_dst.tfmot")


# -- schedules -----------------------------------------------------------------------------------


class PruningSchedule(Configurable):
    """Base of the schedules, your own too: `schedule(step)` gives `(is it a turn, sparsity)`.

    Steps count from 1. A schedule of your own that is to be saved takes its constructor's
    arguments as attributes and `@keras.saving.register_keras_serializable()`.
    """

    def __call__(self, step: int) -> tuple[bool, float]:
        raise NotImplementedError

    def _should_prune_in_step(self, step, begin_step, end_step, frequency) -> bool:
        in_range = begin_step <= step and (end_step < 0 or step <= end_step)
        return in_range and (step - begin_step) % frequency == 0

    def _check_steps(self, begin_step, end_step, frequency) -> None:
        steps = {"begin_step": begin_step, "end_step": end_step, "frequency": frequency}
        whole = all(is_integer(n) for n in steps.values())
        if not whole or begin_step < 0 or not (end_step == -1 or begin_step <= end_step):
            raise ValueError(
                "Expected whole numbers 0 <= begin_step <= end_step, where ConstantSparsity takes "
                f"end_step=-1 for no end. Received: {steps}"
            )
        if frequency < 1:
            raise ValueError(f"frequency must be a number of steps >= 1. Received: {frequency}")


@_register
class ConstantSparsity(PruningSchedule):
    """The same sparsity at every turn.

    Args:
        target_sparsity: fraction of zeros, in [0, 1).
        begin_step: the first turn; there is none at step 0.
        end_step: no turn after it; -1 (default): there is no end.
        frequency: steps from turn to turn. Defaults to 100.

    Example:
        >>> keras_dst.tfmot.ConstantSparsity(0.5, begin_step=2, frequency=10)(12)
        (True, 0.5)
    """

    def __init__(self, target_sparsity, begin_step, end_step=-1, frequency=100):
        self.target_sparsity = target_sparsity
        self.begin_step, self.end_step, self.frequency = begin_step, end_step, frequency
        check_sparsity(target_sparsity, "target_sparsity")
        self._check_steps(begin_step, end_step, frequency)

    def __call__(self, step):
        turn = self._should_prune_in_step(step, self.begin_step, self.end_step, self.frequency)
        return turn, self.target_sparsity


@_register
class PolynomialDecay(PruningSchedule):
    """From one sparsity to another, `s_f + (s_i - s_f)(1 - progress)**power`.

    Args:
        initial_sparsity, final_sparsity: fractions of zeros, in [0, 1).
        begin_step, end_step: steps between which sparsity changes and turns are.
        power: of the polynomial. Defaults to 3.
        frequency: steps from turn to turn. Defaults to 100.

    Example:
        >>> keras_dst.tfmot.PolynomialDecay(0.0, 0.8, 0, 200)(100)
        (True, 0.7)

    Source: arXiv 1710.01878, equation 1.
    """

    def __init__(
        self, initial_sparsity, final_sparsity, begin_step, end_step, power=3, frequency=100
    ):
        self.initial_sparsity, self.final_sparsity = initial_sparsity, final_sparsity
        self.power = power
        self.begin_step, self.end_step, self.frequency = begin_step, end_step, frequency
        check_sparsity(initial_sparsity, "initial_sparsity")
        check_sparsity(final_sparsity, "final_sparsity")
        self._check_steps(begin_step, end_step, frequency)
        if end_step == -1:
            raise ValueError("PolynomialDecay needs the end_step at which the way ends.")

    def __call__(self, step):
        turn = self._should_prune_in_step(step, self.begin_step, self.end_step, self.frequency)
        way = max(self.end_step - self.begin_step, 1)
        # In float32, as the counts of weights follow from it by rounding.
        left = np.float32(1) - np.clip(np.float32(step - self.begin_step) / np.float32(way), 0, 1)
        drop = np.float32(self.initial_sparsity - self.final_sparsity)
        sparsity = drop * left ** np.float32(self.power) + np.float32(self.final_sparsity)
        return turn, float(sparsity)


# -- masks ---------------------------------------------------------------------------------------


def magnitude_mask(w: np.ndarray, sparsity: float) -> np.ndarray:
    """Boolean mask of the largest magnitudes, `max(1, round(size * (1 - sparsity)))` of them.

    Whatever ties with the smallest of them is kept as well.
    """
    magnitudes = np.abs(w)
    share = np.float32(w.size) * (np.float32(1) - np.float32(sparsity))
    kept = max(1, int(np.round(share)))
    return magnitudes >= np.partition(magnitudes, w.size - kept, axis=None)[w.size - kept]


def block_mask(w: np.ndarray, sparsity: float, block_size, pooling: str) -> np.ndarray:
    """`magnitude_mask` of the blocks of a matrix, by their mean (`"AVG"`) or largest magnitude.

    Where a block does not divide an axis by 2 or more, the windows that are pooled begin half of
    what is missing before the blocks that they stand for: so it is in tfmot.
    """
    pooled = np.abs(w)
    for axis, length in enumerate(block_size):
        pooled = _pool(pooled, axis, length, {"AVG": np.nanmean, "MAX": np.nanmax}[pooling])
    mask = magnitude_mask(pooled, sparsity)
    for axis, length in enumerate(block_size):
        mask = np.repeat(mask, length, axis)
    return mask[: w.shape[0], : w.shape[1]]


def _pool(values, axis, length, mean):
    number = -(-values.shape[axis] // length)
    missing = number * length - values.shape[axis]
    padding = [(0, 0), (0, 0)]
    padding[axis] = (missing // 2, missing - missing // 2)
    padded = np.pad(values, padding, constant_values=np.nan)
    shape = [*values.shape[:axis], number, length, *values.shape[axis + 1 :]]
    return mean(padded.reshape(shape), axis=axis + 1)


@_register
class PruneLowMagnitude(LayerMethod):
    """What a layer that `prune_low_magnitude` has pruned is under; see there."""

    driver = "keras_dst.tfmot.UpdatePruningStep"

    def __init__(
        self,
        pruning_schedule: PruningSchedule,
        block_size: tuple[int, int] = (1, 1),
        block_pooling_type: str = "AVG",
        sparsity_m_by_n: tuple[int, int] | None = None,
    ):
        self.pruning_schedule = pruning_schedule
        self.block_size = _pair(block_size, "block_size")
        self.block_pooling_type = block_pooling_type
        self.sparsity_m_by_n = sparsity_m_by_n and _pair(sparsity_m_by_n, "sparsity_m_by_n")
        if not isinstance(pruning_schedule, PruningSchedule):
            raise TypeError(
                "pruning_schedule must be a keras_dst.tfmot.PruningSchedule, such as "
                f"ConstantSparsity(0.5, 0). Received: {pruning_schedule!r}"
            )
        if block_pooling_type not in ("AVG", "MAX"):
            raise ValueError(
                f"block_pooling_type must be 'AVG' or 'MAX'. Received: {block_pooling_type!r}"
            )
        if self.sparsity_m_by_n and self.sparsity_m_by_n[0] >= self.sparsity_m_by_n[1]:
            raise ValueError(
                "sparsity_m_by_n=(m, n) zeroes m of n consecutive inputs, m < n. "
                f"Received: {sparsity_m_by_n!r}"
            )

    @property
    def needs_driver(self):
        return True

    def applies_to(self, layout):
        return bool(layout.inputs)  # tfmot prunes no depthwise kernels

    def check(self, shape, layout):
        for what, ranks in (("block_size", (2,)), ("sparsity_m_by_n", (2, 4))):
            asked = getattr(self, what)
            if asked not in (None, (1, 1)) and len(shape) not in ranks:
                raise ValueError(
                    f"{what}={asked} is for weights of {' or '.join(map(str, ranks))} axes, and "
                    f"this one has the shape {tuple(shape)}"
                )

    def build(self, layer, name, variable, layout):
        self.check(variable.shape, layout)
        return super().build(layer, name, variable, layout)

    def apply(self, w, state, layout):
        # w where it is kept, 0 elsewhere, and all of the gradient.
        return w - ops.stop_gradient(ops.where(self.mask(w, state), 0, w))

    def is_turn(self, step: int) -> bool:
        """Whether there are new masks before this step, the first of which is 1."""
        return step == 1 if self.sparsity_m_by_n else bool(self.pruning_schedule(step)[0])

    def new_mask(self, w: np.ndarray, step: int) -> np.ndarray:
        """The mask of a weight at this step."""
        if self.sparsity_m_by_n:
            zeros, of = self.sparsity_m_by_n
            found = masks.n_of_m(ops.abs(ops.convert_to_tensor(w)), of - zeros, of)
            return ops.convert_to_numpy(found)
        sparsity = float(self.pruning_schedule(step)[1])
        check_sparsity(sparsity, f"the sparsity of {self.pruning_schedule!r} at step {step}")
        if self.block_size == (1, 1):
            return magnitude_mask(w, sparsity)
        return block_mask(w, sparsity, self.block_size, self.block_pooling_type)


def _pair(value, name) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(is_integer(n, minimum=1) for n in pair):
        raise ValueError(f"{name} must be two whole numbers >= 1. Received: {value!r}")
    return pair


# -- models and layers ---------------------------------------------------------------------------

_HALF = ConstantSparsity(0.5, 0)


def prune_low_magnitude(
    to_prune,
    pruning_schedule: PruningSchedule = _HALF,
    block_size: tuple[int, int] = (1, 1),
    block_pooling_type: str = "AVG",
    pruning_policy: PruningPolicy | None = None,
    sparsity_m_by_n: tuple[int, int] | None = None,
    **kwargs,
):
    """Have the kernels of a model or layer pruned while it is trained, as tfmot does it.

    In place: what is returned is what was given, and layers that are pruned already stay as they
    are. Fit with `callbacks=[UpdatePruningStep()]`.

    Args:
        to_prune: a built Keras 3 model; a layer, built or not; or a list of layers.
        pruning_schedule: when there are turns, and the sparsity at each. Defaults to
            `ConstantSparsity(0.5, 0)`.
        block_size: rows (inputs) and columns (outputs) of the blocks that are pruned whole, in
            layers whose weights are matrices. Defaults to (1, 1).
        block_pooling_type: what ranks a block: its mean magnitude, `"AVG"` (default), or the
            largest, `"MAX"`.
        pruning_policy: which layers of a model are pruned; by default all.
        sparsity_m_by_n: `(m, n)`: m zeros in every n consecutive inputs, chosen at step 1 whatever
            the schedule. Defaults to None.

    Raises:
        TypeError: for something that is no Keras 3 model or layer.
        ValueError: for a layer that cannot be pruned as asked; nothing is changed then.

    Example:
        >>> model = keras_dst.tfmot.prune_low_magnitude(model)
        >>> model.compile("adam", "mse")
        >>> model.fit(x, y, callbacks=[keras_dst.tfmot.UpdatePruningStep()])
        >>> model = keras_dst.tfmot.strip_pruning(model)

    Source: arXiv 1710.01878; tfmot 0.8.
    """
    if kwargs:
        raise TypeError(
            f"Unexpected arguments {sorted(kwargs)}. The shape of the inputs is given by "
            "keras.Input(shape) before the layer, and whatever else to the layer itself."
        )
    method = PruneLowMagnitude(pruning_schedule, block_size, block_pooling_type, sparsity_m_by_n)
    targets = to_prune if isinstance(to_prune, list) else [to_prune]
    # Check before the first change, so that an error leaves everything as it was.
    plans = [(target, _chosen(target, method, pruning_policy)) for target in targets]
    for target, layers_ in plans:
        become_sparse(target, layers_, method)
    return to_prune


def strip_pruning(model):
    """Leave stock Keras layers with the pruned weights as exact zeros, in place: `strip`.

    Example:
        >>> keras_dst.tfmot.strip_pruning(model).save("model.keras")
    """
    return strip(model)


def _chosen(target, method, policy) -> list:
    """The layers of a model or layer that are to be pruned."""
    if not isinstance(target, keras.Model):
        if not isinstance(target, keras.Layer):
            check_model(target)
        return _prunable_in(target, method)
    check_model(target)
    if policy is not None:
        policy.ensure_model_supports_pruning(target)
    allowed = [x for x in _leaves(target) if policy is None or policy.allow_pruning(x)]
    found = {id(x): x for leaf in allowed for x in _prunable_in(leaf, method)}
    if not found and not any(map(is_pruned, _keras.flatten_layers(target))):
        raise ValueError(
            f"There is nothing to prune in '{target.name}'"
            + (f" that {type(policy).__name__} allows." if policy else ".")
        )
    return list(found.values())


def _leaves(model) -> Iterator:
    """The layers of a model and of the models in it."""
    for layer in model.layers:
        yield from _leaves(layer) if isinstance(layer, keras.Model) else [layer]


def _prunable_in(leaf, method) -> list:
    """The layer itself, or those inside of it, that have weights to prune."""
    found = []
    for layer in _keras.flatten_layers(leaf):
        if is_pruned(layer):
            continue
        if reason := _obstacle(layer, method):
            raise ValueError(
                f"'{layer.name}' cannot be pruned: {reason}. To leave it as it is, prune layer by "
                "layer, or give a pruning_policy."
            )
        cls = sparse_class(type(layer))
        if cls and any(
            method.applies_to(weight.layout_of(layer)) for weight in cls.sparse_weights()
        ):
            found.append(layer)
    return found


def _obstacle(layer, method) -> str | None:
    """Why a layer cannot be pruned, where it has, or may get, weights that could be."""
    if isinstance(layer, SparseMixin):
        return "it is sparse already; call keras_dst.strip(model) first"
    if hasattr(layer, "get_prunable_weights") and not hasattr(layer, "prunable_weights"):
        return (
            "instead of a method get_prunable_weights, its class has to name the weights, such as "
            'prunable_weights = ("kernel",)'
        )
    if layer.built:
        reason = unsupported(layer, method) if has_kernel(layer) else None
    elif sparse_class(type(layer)) or type(layer).build is keras.Layer.build:
        return None
    else:
        reason = "what it will hold is not known before it is built"
    if reason and not sparse_class(type(layer)):
        reason += '; its class can name the weights, such as prunable_weights = ("kernel",)'
    return reason


def is_pruned(layer) -> bool:
    """Whether this layer is under `prune_low_magnitude`."""
    return isinstance(layer, SparseMixin) and isinstance(layer.method, PruneLowMagnitude)


# -- training ------------------------------------------------------------------------------------


class UpdatePruningStep(keras.callbacks.Callback):
    """Prunes the weights of pruned layers before every step, and their masks at every turn.

    In a loop of your own call `set_model`, `on_train_begin`, before every step
    `on_train_batch_begin`, and `on_epoch_end`; the model has to be compiled.

    Raises:
        ValueError: when training begins and nothing in the model is pruned, or with
            `steps_per_execution`, behind which the steps cannot be counted.

    Example:
        >>> model.fit(x, y, epochs=2, callbacks=[keras_dst.tfmot.UpdatePruningStep()])
    """

    def on_train_begin(self, logs=None):
        groups: dict[LayerMethod, list[Any]] = {}
        for layer in _keras.flatten_layers(self.model):
            if is_pruned(layer):
                groups.setdefault(layer.method, []).append(layer)
        if not groups:
            raise ValueError(
                f"UpdatePruningStep found nothing that is pruned in '{self.model.name}'. Call "
                "model = keras_dst.tfmot.prune_low_magnitude(model), and compile it."
            )
        if getattr(self.model, "optimizer", None) is None:
            raise ValueError(
                f"'{self.model.name}' has no optimiser, which counts the steps. Compile it."
            )
        if self.model.steps_per_execution != 1:
            raise ValueError(
                "UpdatePruningStep has to see every step. Compile with steps_per_execution=1, or "
                "use keras_dst.SparseOptimizer. "
                f"Received: steps_per_execution={self.model.steps_per_execution}"
            )
        self._drivers = [_StepDriver(self.model, layers_) for layers_ in groups.values()]
        self._left_out = 0
        guard_step(self.model, self._drivers)

    def on_epoch_begin(self, epoch, logs=None):
        # Batches that were trained before a backup, and are now drawn and left out.
        self._left_out = getattr(self.model, "_initial_batch", 0)

    def on_train_batch_begin(self, batch, logs=None):
        if self._left_out and batch < self._left_out:
            return
        _ = self.model  # on JAX, hands the state of the running fit back to the variables
        for driver in self._drivers:
            driver.before_step()

    def on_epoch_end(self, batch, logs=None):
        _ = self.model
        for driver in self._drivers:
            driver.prune()
            driver.note()

    def on_train_end(self, logs=None):
        for driver in self._drivers:
            driver.drive(False)


class _StepDriver(LayerDriver):
    """Drives the layers that share one `PruneLowMagnitude`, step by step."""

    def __init__(self, model, layers_):
        super().__init__(model, layers_)
        self.schedule = self.method.pruning_schedule
        self.done: int | None = None  # steps; not known before a backup may have been restored
        self.drive(True)

    def before_step(self):
        if self.done is None:
            self.done, _ = self.read_progress()
            self.note()
        self.done += 1
        if self.method.is_turn(self.done):
            for weight, state in zip(self.weights, self.states):
                w = ops.convert_to_numpy(ops.cast(ops.convert_to_tensor(weight), "float32"))
                state["mask"].assign(self.method.new_mask(w, self.done))
        self.prune()

    def prune(self):
        """Zero the weights that the masks prune: a step has moved them."""
        weights, states = self._values()
        for weight, value in zip(self.weights, _pruned()(weights, [s["mask"] for s in states])):
            weight.assign(value)

    def note(self):
        """Keep the number of steps in the layers, from where it goes on to be counted."""
        if self.done is not None:
            self.write_progress(self.done, 1)


@functools.cache
def _pruned():
    return jit(lambda weights, kept: [masks.masked(w, m) for w, m in zip(weights, kept)])


# -- files ---------------------------------------------------------------------------------------

_SCHEDULES = {"ConstantSparsity": ConstantSparsity, "PolynomialDecay": PolynomialDecay}


def load(path: str | os.PathLike) -> keras.Model:
    """A model that was pruned with tfmot and tf_keras, from its `.keras` or `.h5` file.

    With its masks, schedules and steps: it can be trained on where it was left, once it is
    compiled, or stripped. tfmot itself is not needed. A model that is not pruned is loaded too.

    Raises:
        ValueError: for another file, or for a layer that Keras 3 does not have, or has in another
            way. Layers of your own have to be registered.

    Example:
        >>> model = keras_dst.tfmot.load("pruned.h5")
        >>> keras_dst.tfmot.strip_pruning(model)
    """
    model, wrappers = legacy_files.read(path)
    inside = {leaf.name: leaf for leaf in _leaves(model)}
    for wrapper in wrappers:
        method = _method_of(wrapper.config)
        layers_ = _prunable_in(inside[wrapper.layer], method) if wrapper.masks else []
        become_sparse(model, layers_, method)
        members = [member for layer in layers_ for member in layer.masked_weights()]
        for (_, _, state), mask in zip(members, wrapper.masks, strict=True):
            state["mask"].assign(mask != 0)
            state["progress"].assign(np.array([max(wrapper.step, 0), 0, 1], "int32"))
    return model


def _method_of(config: dict) -> PruneLowMagnitude:
    """What a layer is under, from the config of tfmot's wrapper."""
    schedule = config["pruning_schedule"]
    name = schedule["class_name"]
    cls = _SCHEDULES.get(name) or keras.saving.get_registered_object(name)
    if cls is None:
        raise ValueError(
            f"The file holds a schedule {name!r}, which is not known here. Write it as a "
            "keras_dst.tfmot.PruningSchedule with @keras.saving.register_keras_serializable()."
        )
    block = tuple(config["block_size"])
    return PruneLowMagnitude(cls(**schedule["config"]), block, config["block_pooling_type"])


# -- policies ------------------------------------------------------------------------------------


class PruningPolicy:
    """Base of the policies, your own too: which layers of a model are pruned."""

    def allow_pruning(self, layer) -> bool:
        """Whether this layer is pruned."""
        raise NotImplementedError

    def ensure_model_supports_pruning(self, model) -> None:
        """Raise ValueError for a model that the policy does not suit."""
        raise NotImplementedError


class PruneForLatencyOnXNNPack(PruningPolicy):
    """Prune the 1x1 convolutions of a model that XNNPACK can compute in its sparse form.

    Such a model begins with `ZeroPadding2D(1)` and `Conv2D(n, 3, strides=2, padding="valid")` on
    three channels, ends with `GlobalAveragePooling2D`, and has nothing else in between than what
    has a sparse form. `keras_dst.lint` tells the same of a file.

    Example:
        >>> policy = keras_dst.tfmot.PruneForLatencyOnXNNPack()
        >>> keras_dst.tfmot.prune_low_magnitude(model, pruning_policy=policy)

    Source: arXiv 1911.09723.
    """

    def allow_pruning(self, layer):
        return isinstance(layer, layers.Conv2D) and layer.kernel_size == (1, 1)

    def ensure_model_supports_pruning(self, model):
        graph = _keras.graph_of(model)
        if graph is None:
            raise ValueError(
                f"{type(self).__name__} follows the graph of a model, and a call of its own runs "
                f"'{model.name}'. Build it as Sequential or Functional."
            )
        before, after = _neighbours(graph)
        inputs, outputs = _made_by(graph.inputs), _made_by(graph.outputs)
        begin = _reached(inputs, lambda x: _begins(x, before), after)
        end = _reached(outputs, lambda x: isinstance(x, layers.GlobalAveragePooling2D), before)
        if not begin:
            raise ValueError(
                f"Not every branch of '{model.name}' begins as XNNPACK's sparse form does. Begin "
                "with ZeroPadding2D(1) and Conv2D(n, 3, strides=2, padding='valid') on 3 channels, "
                "or prune without the policy."
            )
        if not end:
            raise ValueError(
                f"Not every branch of '{model.name}' ends as XNNPACK's sparse form does. End with "
                "GlobalAveragePooling2D, or prune without the policy."
            )

        def check(operation):
            if operation not in end and not _has_sparse_form(operation, before):
                raise ValueError(
                    f"'{operation.name}' has no sparse form in XNNPACK, as it is configured. "
                    "Replace it, or prune without the policy. "
                    f"Received: {type(operation).__name__}"
                )
            return operation in end

        _reached([x for first in begin for x in after.get(first, [])], check, after)


def _neighbours(graph) -> tuple[dict, dict]:
    """For every operation of a graph, those before it and those after it."""
    before: dict[Any, list] = {}
    after: dict[Any, list] = {}
    for node in _keras.nodes_in_order(graph):
        for producer in _made_by(node.input_tensors):
            before.setdefault(node.operation, []).append(producer)
            after.setdefault(producer, []).append(node.operation)
    return before, after


def _made_by(tensors) -> list:
    return [_keras.operation_of(tensor) for tensor in tensors]


def _reached(starts, stop, following) -> list:
    """On every way from these operations, the first that `stop` is true of; none if one lacks."""
    found, ways = [], list(dict.fromkeys(starts))
    for operation in ways:  # which grows meanwhile
        if stop(operation):
            found.append(operation)
        elif operation not in following:
            return []
        else:
            ways += [x for x in dict.fromkeys(following[operation]) if x not in ways]
    return found


def _begins(layer, before) -> bool:
    return (
        isinstance(layer, layers.Conv2D)
        and tuple(layer.kernel.shape[:3]) == (3, 3, 3)
        and (layer.strides, layer.padding) == ((2, 2), "valid")
        and _padding_before(layer, before) == 1
    )


def _padding_before(layer, before) -> int | None:
    """By how much a ZeroPadding2D before a layer pads on all sides alike."""
    first, *others = before.get(layer, [None])
    if others or not isinstance(first, layers.ZeroPadding2D):
        return None
    width = first.padding[0][0]
    return width if first.padding == ((width, width), (width, width)) else None


def _has_sparse_form(layer, before) -> bool:
    """Whether XNNPACK can compute a layer, or an operation of `keras.ops`, in its sparse form."""
    if isinstance(layer, layers.DepthwiseConv2D):
        (size, width), strides = layer.kernel_size, layer.strides
        padded = _padding_before(layer, before) == size // 2
        return (
            (layer.depth_multiplier, layer.dilation_rate) == (1, (1, 1))
            and size == width
            and size in (3, 5)
            and (
                (layer.padding == "same" and strides == (1, 1))
                or (layer.padding == "valid" and padded and strides in ((1, 1), (2, 2)))
            )
        )
    if isinstance(layer, layers.Conv2D):
        ones = (layer.kernel_size, layer.strides, layer.dilation_rate)
        return layer.groups == 1 and ones == ((1, 1), (1, 1), (1, 1))
    if isinstance(layer, layers.GlobalAveragePooling2D):
        return layer.keepdims
    if isinstance(layer, layers.BatchNormalization):
        return layer.axis in (3, -1)
    if isinstance(layer, layers.UpSampling2D):
        return layer.interpolation == "bilinear"
    if isinstance(layer, layers.Activation):
        return layer.activation.__name__ in _ACTIVATIONS
    # Layers, and operations such as the sum of two tensors.
    return type(layer).__name__ in _SIMPLE


_ACTIVATIONS = ("relu", "relu6", "leaky_relu", "elu", "sigmoid")
_SIMPLE = (
    *("Add", "Multiply", "Identity", "ZeroPadding2D"),
    *("ReLU", "LeakyReLU", "ELU", "Dropout"),
)
