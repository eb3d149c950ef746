"""`prune_low_magnitude` and `strip_pruning`: prune layers in place, and restore stock layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import keras

from keras_dst import _keras
from keras_dst._utils.filters import is_kernel
from keras_dst.layers.base import SparseMixin
from keras_dst.layers.classes import sparse_class
from keras_dst.surgery import check_model, has_kernel, sparsify_layers, strip, why_unsupported
from keras_dst.tfmot.method import PruneLowMagnitude
from keras_dst.tfmot.policies import PruningPolicy
from keras_dst.tfmot.schedules import ConstantSparsity, PruningSchedule

_DEFAULT_SCHEDULE = ConstantSparsity(0.5, 0)


def prune_low_magnitude(
    to_prune,
    pruning_schedule: PruningSchedule = _DEFAULT_SCHEDULE,
    block_size: tuple[int, int] = (1, 1),
    block_pooling_type: str = "AVG",
    pruning_policy: PruningPolicy | None = None,
    sparsity_m_by_n: tuple[int, int] | None = None,
    **kwargs,
):
    """Prepare a model or layer so that `UpdatePruningStep` prunes its kernels during training.

    The model or layer is changed in place and returned. Layers that are already pruned keep their
    schedule. Frozen layers of a model stay dense. Fit with `callbacks=[UpdatePruningStep()]`.

    Args:
        to_prune: A built Keras 3 model, a layer (built or not), or a list of layers.
        pruning_schedule: Schedule of the mask updates: the step and the sparsity of each update.
            Defaults to `ConstantSparsity(0.5, 0)`.
        block_size: Number of rows (inputs) and columns (outputs) of the blocks that are pruned as a
            whole, in the same order as in tfmot. Only matrices can be pruned in blocks larger than
            (1, 1). The argument `pattern` of `keras_dst.methods` has the opposite order, so
            `pattern="1x4"` corresponds to `block_size=(4, 1)`. Defaults to (1, 1).
        block_pooling_type: `"AVG"` ranks blocks by their mean magnitude, and `"MAX"` ranks blocks
            by their largest magnitude. Defaults to `"AVG"`.
        pruning_policy: Policy that chooses which layers of a model are pruned. Defaults to None,
            which allows all layers.
        sparsity_m_by_n: Pair `(m, n)`, which sets m weights to zero for every n consecutive inputs.
            The mask is computed once, at step 1, regardless of the schedule. Defaults to None.

    Returns:
        `to_prune`.

    Raises:
        TypeError: If `to_prune` is not a Keras 3 model, a layer or a list of layers, or if
            `pruning_policy` is not a `PruningPolicy`.
        ValueError: If a layer cannot be pruned with the given arguments. If this function raises a
            ValueError, all layers are unchanged.

    Example:
        >>> model = keras_dst.tfmot.prune_low_magnitude(model)
        >>> model.compile("adam", "mse")
        >>> model.fit(x, y, callbacks=[keras_dst.tfmot.UpdatePruningStep()])
        >>> model = keras_dst.tfmot.strip_pruning(model)

    Source: arXiv 1710.01878; tfmot 0.8.
    """
    if kwargs:
        raise TypeError(
            f"Unexpected arguments {sorted(kwargs)}. Set the input shape with keras.Input(shape) "
            "before the layer, and pass arguments of the layer to the constructor of the layer."
        )
    if pruning_policy is not None and not isinstance(pruning_policy, PruningPolicy):
        raise TypeError(
            "Expected a keras_dst.tfmot.PruningPolicy, such as PruneForLatencyOnXNNPack(). "
            f"Received: {pruning_policy!r}"
        )
    method = PruneLowMagnitude(pruning_schedule, block_size, block_pooling_type, sparsity_m_by_n)
    targets = to_prune if isinstance(to_prune, list) else [to_prune]
    targets = list({id(target): target for target in targets}.values())
    # Check all layers before the first change, so that an error leaves all layers unchanged.
    plans = [(target, _layers_to_prune(target, method, pruning_policy)) for target in targets]
    for target, layers_ in plans:
        if layers_ == [target] and _is_unbuilt_composite(target):
            target.__class__ = _pruned_on_build(type(target))  # type: ignore[arg-type]
            target.__dict__["method"] = method
        else:
            # A layer may be part of several targets.
            sparsify_layers(target, [x for x in layers_ if not is_pruned(x)], method)
    return to_prune


def strip_pruning(model):
    """Set masked weights to exact zeros and restore stock Keras layers, in place.

    This function is `keras_dst.strip` under the name that tfmot uses.

    Example:
        >>> keras_dst.tfmot.strip_pruning(model).save("model.keras")
    """
    return strip(model)


def is_pruned(layer) -> bool:
    """Return whether `prune_low_magnitude` has pruned a layer.

    Raises:
        TypeError: If `layer` is not a Keras 3 layer.
    """
    if not isinstance(layer, keras.Layer):
        raise TypeError(f"Expected a Keras 3 layer. Received: {layer!r}")
    return isinstance(layer, SparseMixin) and isinstance(layer.method, PruneLowMagnitude)


def leaf_layers(model) -> Iterator:
    """Yield all layers of a model and of its nested models, except the nested models themselves."""
    for layer in model.layers:
        yield from leaf_layers(layer) if isinstance(layer, keras.Model) else [layer]


def prunable_layers(layers, method: PruneLowMagnitude) -> list:
    """Return the given layers that the method prunes, except layers that are already pruned.

    Raises:
        ValueError: If a layer has weights that cannot be pruned.
    """
    found = []
    for layer in layers:
        if is_pruned(layer):
            continue
        if reason := _obstacle(layer, method):
            raise ValueError(
                f"'{layer.name}' cannot be pruned: {reason}. To leave the layer dense, prune the "
                "other layers one by one, or pass a pruning_policy."
            )
        cls = sparse_class(type(layer))
        if cls and any(
            method.applies_to(weight.layout_of(layer)) for weight in cls.sparse_weights()
        ):
            found.append(layer)
    return found


class _PrunedOnBuild(_keras.BuildHook):
    """Mixin for layers, such as `LSTM`, that are prepared for pruning before they are built.

    When the layer is built, `after_build` prepares its inner layers for pruning.
    """

    stock: type
    method: PruneLowMagnitude

    def after_build(self):
        method = self.__dict__.pop("method")
        self.__class__ = self.stock
        sparsify_layers(self, _inner_layers_to_prune(self, method), method)

    def get_config(self):
        raise ValueError(
            f"'{self.name}' has no config yet, because prune_low_magnitude takes effect only when "
            "the layer is built. Build the layer first: add it to a model with keras.Input, or "
            "call it on data. To prune a layer inside a wrapper such as Bidirectional, prune the "
            "wrapper."
        )


@functools.cache
def _pruned_on_build(stock) -> type:
    return type(stock.__name__, (_PrunedOnBuild, stock), {"stock": stock})


def _is_unbuilt_composite(layer) -> bool:
    """Return whether the prunable weights of a layer are created only when the layer is built."""
    return (
        not isinstance(layer, keras.Model)
        and not layer.built
        and sparse_class(type(layer)) is None
        and type(layer).build is not keras.Layer.build
        and not _lacks_weight_names(layer)
    )


def _layers_to_prune(target, method, policy) -> list:
    """Return the layers to prune in `to_prune`, which is a model or a layer."""
    if not isinstance(target, keras.Model):
        if not isinstance(target, keras.Layer):
            check_model(target)
        if isinstance(target, _PrunedOnBuild):
            return []
        return [target] if _is_unbuilt_composite(target) else _inner_layers_to_prune(target, method)
    check_model(target)
    if policy is not None:
        policy.ensure_model_supports_pruning(target)
    allowed = [x for x in leaf_layers(target) if policy is None or policy.allow_pruning(x)]
    inside = {id(x): x for leaf in allowed for x in _keras.flatten_layers(leaf)}.values()
    found = prunable_layers([x for x in inside if not _is_frozen(x)], method)
    if not found and not any(map(is_pruned, _keras.flatten_layers(target))):
        raise ValueError(
            f"There is nothing to prune in '{target.name}'"
            + (f" that {type(policy).__name__} allows" if policy else "")
            + (": its layers are frozen." if any(map(_is_frozen, inside)) else ".")
        )
    return found


def _inner_layers_to_prune(layer, method) -> list:
    """Return the layers to prune among the given layer and its inner layers."""
    inside = _keras.flatten_layers(layer)
    found = prunable_layers([x for x in inside if not _is_frozen(x)], method)
    if not found and any(map(_is_frozen, inside)):
        raise ValueError(
            f"'{layer.name}' is frozen, so it is neither trained nor pruned. Set layer.trainable = "
            "True first, or exclude the layer."
        )
    return found


def _is_frozen(layer) -> bool:
    """Return whether all kernels of a layer are frozen, and the layer is not pruned yet."""
    if is_pruned(layer):
        return False
    if not layer.built:
        return not layer.trainable and sparse_class(type(layer)) is not None
    kernels = [x for x in _keras.trainable_variables_of(layer) if is_kernel(x)]
    return bool(kernels) and not any(kernel.trainable for kernel in kernels)


def _lacks_weight_names(layer) -> bool:
    """Return whether a layer defines `get_prunable_weights` for tfmot, but not `prunable_weights`
    for keras_dst."""
    return hasattr(layer, "get_prunable_weights") and not hasattr(layer, "prunable_weights")


def _obstacle(layer, method) -> str | None:
    """Return the reason why the weights of a layer cannot be pruned, or None if pruning is
    possible."""
    if isinstance(layer, SparseMixin):
        return "it is sparse already; call keras_dst.strip(model) first"
    if _lacks_weight_names(layer):
        return (
            "its class has a method get_prunable_weights. Name the weights in the class instead, "
            'such as prunable_weights = ("kernel",)'
        )
    if layer.built:
        reason = why_unsupported(layer, method) if has_kernel(layer) else None
    elif sparse_class(type(layer)) or type(layer).build is keras.Layer.build:
        return None
    else:
        return "it is not built. Call the model or layer that contains it once on data first"
    is_own = not type(layer).__module__.startswith("keras.")
    if reason and is_own and not sparse_class(type(layer)):
        reason += '; name its weights in the class, such as prunable_weights = ("kernel",)'
    return reason
