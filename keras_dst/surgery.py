"""Functions that make a model sparse, or restore its stock Keras layers, in place.

`sparsify` makes a model sparse, and `strip` restores stock Keras layers.
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import h5py
import keras

from keras_dst import _keras
from keras_dst._backend.devices import placed_like, refresh_torch_parameters
from keras_dst._utils.filters import Filters, is_kernel, select
from keras_dst._utils.html import html_table
from keras_dst.layers import Gate, SparseBatchNormalization
from keras_dst.layers.base import SparseMixin
from keras_dst.layers.classes import (
    SparseContainer,
    container_class,
    frozen_layers_of,
    layouts_of,
    make_sparse,
    prunable_weights_of,
    sparse_class,
)
from keras_dst.masks import KERNEL, Layout, Pattern
from keras_dst.methods.base import (
    LayerMethod,
    Method,
    TwoPathMethod,
    UnitMethod,
    UpdateMethod,
    describe,
)
from keras_dst.optimizers import (
    SparseOptimizer,
    optimizers_of,
    remove_masks,
    sparse_optimizers,
    without_masks,
)

_SPARSE_CLASSES = (SparseMixin, SparseContainer, Gate)
_FROZEN = "frozen (trainable=False)"
_FILTERED = "not selected by filters"
_LORA = "LoRA is enabled; call save_weights, which merges it, and load_weights without LoRA"


@dataclass
class SparsifyReport:
    """Report of `sparsify` on a model: the layers that became sparse, and the skipped layers.

    The fields correspond to the fields of the `QuantizationReport` that `quantize` returns in Keras
    3.16. `print` shows plain text, and a notebook shows a table.

    Attributes:
        method: Method that was applied.
        sparsified: List of `(path, weights)`, with one entry per sparse layer: the path of the
            layer, and the names of its masked weights.
        skipped: List of `(path, reason)`, with one entry per layer that has a kernel and is not
            sparse.
        doubled: Paths of the batch normalizations that received a second set of variables.
            `methods.DCIL` uses the second set of variables in forward passes without masks.
    """

    method: Method
    sparsified: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)

    def __getattr__(self, name):
        raise AttributeError(
            f"A SparsifyReport has no attribute {name!r}. sparsify() changes the model in place "
            "and returns the report. Continue with the model that you passed to sparsify()."
        )

    def __str__(self):
        lines = [f"{self.method!r}: {self._counts()}"]
        lines += [f"  {status:<10} {path}: {detail}" for path, status, detail in self._rows()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the report as an HTML table for notebooks."""
        headings = ("layer", "status", "weights or reason")
        return html_table(headings, self._rows(), f"{self.method!r}: {self._counts()}")

    def _counts(self) -> str:
        doubled = f", {len(self.doubled)} batch normalizations doubled" if self.doubled else ""
        return f"{len(self.sparsified)} layers sparse, {len(self.skipped)} skipped{doubled}"

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        for path, weights in self.sparsified:
            yield path, "sparse", ", ".join(weights)
        for path in self.doubled:
            yield path, "doubled", "second set of variables for the full path"
        for path, reason in self.skipped:
            yield path, "skipped", reason


def sparsify(model, method: Method, filters: Filters = None) -> SparsifyReport:
    """Make a model sparse, in place, as `model.quantize()` quantizes a model.

    `sparsify` accepts every method:

    * DST, DCIL, ST-3, OptG and Consensus mask the weights in the forward pass. Each supported layer
      is converted to its sparse class. The model may be compiled or not. Layers inside nested,
      subclassed or wrapping layers are included. Supported layers are `Dense`, `EinsumDense` and
      `Embedding` layers, convolutions, and the cells of recurrent layers. Transposed, depthwise and
      separable convolutions are included, and also the `EinsumDense` layers inside attention
      layers. Subclasses of supported layers are also supported. Custom layers are supported if
      their class lists the names of the weights in `prunable_weights`. If a layer is called several
      times, all calls use the same mask. DCIL also adds a second set of variables to every batch
      normalization, even to layers that `filters` does not select.
    * Magnitude, FlipOut, SET and RigL mask the weights in the optimizer step. The optimizer of a
      compiled model is wrapped in a `SparseOptimizer`, and the layers do not change.

    Weight values, weight names and the graph of the model do not change. A compiled model stays
    compiled. The optimizer keeps its state and all settings. Frozen layers are skipped. A sparse
    layer that is frozen later keeps its current mask.

    Args:
        model: Built Keras 3 model.
        method: Method from `keras_dst.methods`, such as `methods.Magnitude(0.9)`.
        filters: Selection of the layers to make sparse. A string is a name, a path, or a regular
            expression for a whole name or path. The string can name the layer itself, a layer that
            contains it, or one of its weights. A list of strings selects all layers that at least
            one string matches. A callable receives a layer and returns whether the layer is
            selected. Defaults to None, which selects all layers.

    Returns:
        A `SparsifyReport` that lists the sparse layers, and the skipped layers with the reasons.

    Raises:
        TypeError: If the model is not a Keras 3 model, if the method is not a keras_dst method, or
            if `prunable_weights` of a layer is not a tuple of names or a dict.
        ValueError: If the model is not built or is already sparse, if a filter matches nothing, or
            if no layer can be made sparse. A ValueError is also raised if the model is not compiled
            and the method needs a compiled model, or if `prunable_weights` of a layer contains a
            name that the layer lacks.

    Example:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> model.compile("adam", "mse")
        >>> print(keras_dst.sparsify(model, keras_dst.methods.Magnitude(0.9)))
    """
    check_model(model)
    if not isinstance(method, (LayerMethod, UpdateMethod)):
        raise TypeError(
            "Expected a method, such as keras_dst.methods.Magnitude(0.9). "
            f"Received: {describe(method)}"
        )
    sparse_layers = any(isinstance(x, SparseMixin) for x in _keras.flatten_layers(model))
    if sparse_layers or any(map(sparse_optimizers, optimizers_of(model))):
        raise ValueError("The model is already sparse. Call keras_dst.strip(model) first.")
    if isinstance(method, UpdateMethod):
        return _sparsify_optimizer(model, method, filters)
    return _sparsify_model_layers(model, method, filters)


def strip(model):
    """Write the masks into the weights as exact zeros and restore stock Keras layers, in place.

    `strip` works after every method, and also on a model that was never sparse. The predictions of
    the model do not change. A compiled model stays compiled, and its optimizer no longer applies
    masks. The stripped model contains no class of keras_dst.

    Args:
        model: Built Keras 3 model.

    Returns:
        The same model.

    Raises:
        TypeError: If the model is not a Keras 3 model.
        ValueError: If the model is not built, or if a `Gate` is not part of a Sequential or
            Functional model. A ValueError is also raised if a `Gate` has inputs of rank 2 and the
            image data format is "channels_first".

    Example:
        >>> keras_dst.strip(model).save("model.keras")  # loads without keras_dst
    """
    check_model(model)
    found = [x for x in _keras.flatten_layers(model) if isinstance(x, _SPARSE_CLASSES)]
    _check_gates(model, found)
    for layer in found:
        layer.restore_stock()
    for inner in _keras.flatten_layers(model):
        replaced = vars(inner).get("load_weights")
        if getattr(replaced, "__func__", None) is _load_weights:
            del vars(inner)["load_weights"]
    remove_masks(model)
    if getattr(model, "compiled", False):
        compiled = _keras.compile_config(model)
        compiled["optimizer"] = without_masks(compiled["optimizer"])
    if found:
        _refresh(model)
    elif isinstance(model, keras.Model):
        _forget_compiled_steps(model)
    return model


def has_sparse_layers(model) -> bool:
    """Return whether a model contains sparse layers, gates or containers that `strip` replaces."""
    return any(isinstance(x, _SPARSE_CLASSES) for x in _keras.flatten_layers(model))


def check_model(model) -> None:
    """Raise an error unless the argument is a built Keras 3 model or layer."""
    if isinstance(model, keras.Layer):
        if not model.built:
            raise ValueError(
                f"'{model.name}' has no weights yet. Give the model an Input, call "
                "model.build(shape), or call it once on data."
            )
        return
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, keras.KerasTensor):
        fix = "This is the output of a layer. Build keras.Model(inputs, outputs)."
    elif any(
        b.__module__.startswith(("tf_keras", "tensorflow.python.keras"))
        for b in type(model).__mro__
    ):
        fix = "This is a Keras 2 model. Build or load it with `keras` 3 instead of tf_keras."
    elif any(b.__module__.startswith("torch.nn") for b in type(model).__mro__):
        fix = "This is a torch module. Build a Keras model, which can run on torch."
    elif isinstance(model, str) or hasattr(model, "__fspath__"):
        fix = "Load it first with keras.saving.load_model(path)."
    else:
        fix = "Build a model with keras.Model or keras.Sequential."
    raise TypeError(f"Expected a Keras 3 model. Received: {kind}. {fix}")


# -- masks in the layers -------------------------------------------------------------------------


def _sparsify_model_layers(model, method: LayerMethod, filters: Filters) -> SparsifyReport:
    inner = [x for x in _keras.flatten_layers(model) if not isinstance(x, keras.Model)]
    report = SparsifyReport(method)
    chosen, norms = [], []
    excluded = _excluded_layers(model, method, filters)
    names = _names_of(model, inner)
    selection = select(inner, filters, [(*names[id(x)], *_kernel_paths(x)) for x in inner])
    for layer, selected in zip(inner, selection):
        path = layer.path or layer.name
        if isinstance(layer, SparseBatchNormalization.stock):
            if isinstance(method, TwoPathMethod) and layer.built:
                norms.append(layer)
                report.doubled.append(path)
            continue
        reason = excluded.get(id(layer)) if selected else _FILTERED
        reason = reason or why_unsupported(layer, method)
        if reason is None:
            chosen.append(layer)
            weights = [v.name for layout, v in prunable_weights_of(layer)]
            report.sparsified.append((path, tuple(weights)))
        elif has_kernel(layer):
            report.skipped.append((path, reason))
    _check_not_empty(model, report)
    sparsify_layers(model, chosen + norms, method)
    return report


def sparsify_layers(model, layers, method: LayerMethod) -> None:
    """Make the given layers of a model sparse. The model need not be built."""
    _check_ties(layers)
    for layer in layers:
        make_sparse(layer, method)
    _record_recipes(model)
    _refresh(model)
    if isinstance(model, keras.Model):
        vars(model)["load_weights"] = types.MethodType(_load_weights, model)


def why_unsupported(layer, method: LayerMethod) -> str | None:
    """Return the reason why a layer cannot become sparse, or None if the layer can become
    sparse."""
    cls = sparse_class(type(layer))
    if cls is None:
        return f"{type(layer).__name__} is not supported"
    if not layer.built:
        return "the layer is not built"
    if getattr(layer, "quantization_mode", None):
        return "the layer is quantized; make it sparse, call strip, then quantize"
    if getattr(layer, "lora_enabled", False):
        return _LORA
    if isinstance(method, UnitMethod) and not cls.has_units():
        return f"{type(method).__name__} prunes whole units; {type(layer).__name__} has no units"
    for weight in cls.sparse_weights():
        weight.check(layer)
        if reason := weight.why_computed(layer):
            return reason
    for layout, variable in prunable_weights_of(layer):
        if not variable.trainable:
            return f"its weight '{variable.name}' is {_FROZEN}"
        if 0 in variable.shape:
            return f"its weight '{variable.name}' has no entries"
        try:
            method.check(variable.shape, layout)
        except ValueError as error:
            return str(error)
    return None


def has_kernel(layer) -> bool:
    """Return whether a layer itself has a kernel. The kernels of its inner layers do not count."""
    quantized = getattr(layer, "quantization_mode", None)
    own = [
        *_keras.trainable_variables_of(layer),
        *(_keras.non_trainable_variables_of(layer) if quantized else []),
    ]
    return any(map(is_kernel, own))


def _check_not_empty(model, report: SparsifyReport) -> None:
    if not report.sparsified:
        raise ValueError(f"There is nothing to make sparse in '{model.name}'.\n{report}")


def _names_of(model, inner) -> dict[int, list[str]]:
    """Return a dict that maps the id of each layer to the names and paths of the layer and of the
    layers that contain it."""
    found = {id(layer): [layer.name, layer.path] for layer in inner}
    for outer in _keras.flatten_layers(model, include_self=False):
        for layer in _keras.flatten_layers(outer, include_self=False):
            if id(layer) in found:
                found[id(layer)] += [outer.name, outer.path]
    return {key: [name for name in names if name] for key, names in found.items()}


def _kernel_paths(layer) -> list[str]:
    return [v.path for v in _keras.trainable_variables_of(layer) if is_kernel(v)]


def _excluded_layers(model, method: LayerMethod, filters: Filters) -> dict[int, str]:
    """Return the reasons why layers must not be pruned, as a dict whose keys are layer ids."""
    excluded = dict.fromkeys(frozen_layers_of(model), _FROZEN)
    excluded.update(_gating_modules(model))
    for layer in _keras.flatten_layers(model):
        if isinstance(layer, keras.layers.SpectralNormalization):
            reason = (
                "SpectralNormalization divides the kernel by its norm without the mask; prune it "
                "with a method that masks the weights in the optimizer step, such as Magnitude"
            )
            excluded[id(layer)] = excluded[id(layer.layer)] = reason
    excluded.update(_excluded_outputs(model, method, filters))
    return excluded


def _excluded_outputs(model, method: Method, filters: Filters) -> dict[int, str]:
    """Return the reasons why output layers are not pruned, as a dict whose keys are layer ids."""
    if method.pattern != "channel":
        return {}
    if isinstance(method, UnitMethod) and _keras.graph_of(model) is None and filters is None:
        raise ValueError(
            f"{type(method).__name__} prunes whole output units, except in layers that compute the "
            f"outputs of the model. The output layers of '{model.name}' are unknown, because the "
            "model runs its own `call` method. Pass filters that select the layers to prune."
        )
    return dict.fromkeys(_output_layers(model), "its units are the model's outputs")


def _gating_modules(model) -> dict[int, str]:
    gates = [x for x in _keras.flatten_layers(model) if isinstance(x, Gate)]
    inside = [x for gate in gates for x in _keras.flatten_layers(gate, include_self=False)]
    return {id(x): "it is the gating module of a Gate" for x in inside}


def _output_layers(model) -> set[int]:
    """Return the ids of the output layers, which are the last layers with a kernel on each path to
    an output of the model."""
    graph = _keras.graph_of(model)
    return set() if graph is None else _last_layers(graph.outputs)[0]


def _last_layers(tensors) -> tuple[set[int], set[int]]:
    """Return the ids of the last layers with a kernel on each path to the given tensors, and the
    ids of the tensors after these layers."""
    found: set[int] = set()
    tensors, seen = list(tensors), set()
    while tensors:
        tensor = tensors.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        operation, node = _keras.operation_of(tensor), _keras.node_of(tensor)
        nested = _graph_or_none(operation)
        if nested is not None:
            output = nested.outputs[_keras.output_index_of(tensor)]
            last, after = _last_layers([output])
            found |= last
            given = _keras.inputs_of_call(nested, node.arguments.args, node.arguments.kwargs)
            pairs = zip(nested.inputs, given)
            tensors += [outer for inner, outer in pairs if id(inner) in after]
        elif _holds_kernels(operation):
            found |= {id(layer) for layer in _keras.flatten_layers(operation)}
        else:
            tensors += node.input_tensors
    return found, seen


def _holds_kernels(operation) -> bool:
    if isinstance(operation, Gate) or not isinstance(operation, keras.Layer):
        return False
    return any(map(is_kernel, operation.weights))


def _check_gates(model, layers) -> None:
    """Raise ValueError if a Gate cannot be replaced: it is not part of a graph, or no stock layer
    computes the same outputs."""
    graphs = [g for x in _keras.flatten_layers(model) if (g := _graph_or_none(x)) is not None]
    placed = {id(operation) for graph in graphs for operation in graph.operations}
    for layer in layers:
        if isinstance(layer, Gate) and id(layer) not in placed:
            raise ValueError(
                f"'{layer.name}' is a Gate that a custom layer or model creates and calls. strip() "
                "cannot replace the Gate, because the custom code would create the Gate again in "
                "a loaded model. To strip the model, build it as Sequential or Functional. You "
                "can also use the model without strip(), because its gates are constants in "
                "inference."
            )
        if isinstance(layer, Gate):
            layer.check_stock()


def _graph_or_none(layer):
    return _keras.graph_of(layer) if isinstance(layer, keras.Model) else None


def _check_ties(layers) -> None:
    """Raise an error if two layers hold the same weight, because a weight can have only one
    mask."""
    owners: dict[int, str] = {}
    for layer in layers:
        for _, variable in prunable_weights_of(layer):
            if id(variable) in owners:
                raise ValueError(
                    f"'{layer.name}' and '{owners[id(variable)]}' hold the same weight "
                    f"'{variable.path}', which can have only one mask. Fix: call a single layer "
                    "twice, or create the weight in only one layer and read it in `call` of the "
                    "other layer. Alternatively, use a method that masks the weights in the "
                    "optimizer step, such as Magnitude."
                )
            owners[id(variable)] = layer.name


def _config_holds_layers(layer) -> bool:
    """Return whether the config of a layer contains the configs of its inner layers."""
    if not isinstance(layer, keras.Model):
        return False
    # The config of a Sequential or Functional model always contains the inner layers. Do not call
    # `get_config` here, because it would import TensorFlow on every backend, if TensorFlow is
    # installed. This import takes seconds.
    if type(layer) in (keras.Sequential, _keras.Functional):
        return True
    try:
        return "layers" in layer.get_config()
    except NotImplementedError:
        return False


def _record_recipes(layer) -> None:
    """Convert a layer to a `SparseContainer` if it contains sparse layers that are not part of its
    config. For any other layer, apply this function to the inner layers."""
    if not any(
        isinstance(x, SparseMixin) for x in _keras.flatten_layers(layer, include_self=False)
    ):
        return
    if _config_holds_layers(layer):
        for inner in _keras.flatten_layers(layer, include_self=False, recursive=False):
            _record_recipes(inner)
    else:
        if not isinstance(layer, SparseContainer):
            layer.__class__ = container_class(type(layer))
        layer.record_recipe()


def _load_weights(model, filepath, skip_mismatch=False, **kwargs):
    """Load weights like `Model.load_weights`, also from a legacy `.h5` file of the dense model.

    When Keras loads a legacy file, Keras checks the number of weights of each layer. A legacy file
    of the dense model lacks the variables of the pruning method. While Keras loads such a file,
    each sparse layer therefore exposes only the weights of its stock Keras layer.
    """
    layers = [x for x in _keras.flatten_layers(model) if isinstance(x, SparseMixin)]
    dense = _is_dense_legacy_file(str(filepath), layers)
    with contextlib.ExitStack() as loading:
        for layer in layers if dense else ():
            loading.enter_context(layer.as_stock())
        type(model).load_weights(model, filepath, skip_mismatch=skip_mismatch, **kwargs)
    for layer in layers if dense else ():
        layer.copy_stock_weights()


def _is_dense_legacy_file(path: str, layers) -> bool:
    """Return whether `path` is a legacy `.h5` file that contains no variables of a pruning
    method."""
    if not path.endswith((".h5", ".hdf5")) or path.endswith(".weights.h5"):
        return False
    states = {name for layer in layers for name in layer.state_variables()}
    found: list[str] = []
    with h5py.File(path, "r") as file:
        file.get("model_weights", file).visit(found.append)
    return states.isdisjoint(name.split("/")[-1].removesuffix(":0") for name in found)


# -- masks in the optimizer ----------------------------------------------------------------------


def _sparsify_optimizer(model, method: UpdateMethod, filters: Filters) -> SparsifyReport:
    """Wrap the optimizer of a compiled model in a `SparseOptimizer`."""
    if getattr(model, "optimizer", None) is None:
        raise ValueError(
            f"{type(method).__name__} masks the weights in the optimizer step, but '{model.name}' "
            "is not compiled. Call model.compile(...) first, or compile with "
            f"keras_dst.SparseOptimizer(optimizer, {method!r})."
        )
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    inner = model.optimizer.inner_optimizer if scaled else model.optimizer
    report, kernels, complete = _choose_kernels(model, method, filters, inner)
    _check_not_empty(model, report)
    # Pass the paths of the selected kernels instead of `filters`, because a SparseOptimizer selects
    # variables by path. The paths are joined to one regular expression, which stays valid if some
    # of the variables are frozen before the optimizer is built.
    paths = None if complete else "|".join(re.escape(kernel.path) for kernel in kernels)
    with placed_like(kernels[0]):
        wrapper = SparseOptimizer(inner, method, paths)
        if inner.built:
            wrapper.build(_keras.trained_variables_of(inner))
    compiled = _keras.compile_config(model)
    given = compiled["optimizer"]
    if scaled:
        model.optimizer.inner_optimizer = wrapper
    else:
        model.optimizer = wrapper
    # A LossScaleOptimizer that `compile` added is not stored, because `compile` adds it again when
    # a file is loaded.
    compiled["optimizer"] = given if given is model.optimizer else wrapper
    _forget_compiled_steps(model)
    return report


def _choose_kernels(
    model, method: UpdateMethod, filters: Filters, optimizer
) -> tuple[SparsifyReport, list[Any], bool]:
    """Return a `SparsifyReport`, the kernels to prune, and whether a `SparseOptimizer` would select
    the same kernels by default."""
    layers = _keras.flatten_layers(model)
    owners: dict[int, tuple[Any, Any]] = {}
    for layer in layers:
        for variable in _keras.trainable_variables_of(layer):
            if is_kernel(variable):
                owners.setdefault(id(variable), (layer, variable))
    pairs = list(owners.values())
    names = _names_of(model, layers)
    selection = select(
        [layer for layer, _ in pairs],
        filters,
        [(variable.path, *names[id(layer)]) for layer, variable in pairs],
    )
    trained = optimizer.built and set(map(id, _keras.trained_variables_of(optimizer)))
    frozen, layouts = frozen_layers_of(model), layouts_of(model)
    excluded = {**_gating_modules(model), **_excluded_outputs(model, method, filters)}
    sparse: dict[str, list[str]] = {}
    report = SparsifyReport(method)
    kernels, pattern_fits = [], True
    for (layer, variable), selected in zip(pairs, selection):
        default = KERNEL if len(variable.shape) > 1 else Layout(inputs=())
        misfit = _pattern_misfit(method, variable, layouts.get(id(variable), default))
        if getattr(layer, "lora_enabled", False):
            reason: str | None = _LORA
        elif id(layer) in frozen or not variable.trainable:
            reason = _FROZEN
        elif not selected:
            reason = _FILTERED
        elif trained and id(variable) not in trained:
            reason = "the optimizer was built without it; compile the model again"
        else:
            reason = excluded.get(id(layer)) or misfit
            pattern_fits = pattern_fits and reason is None
        path = layer.path or layer.name
        if reason is None:
            kernels.append(variable)
            sparse.setdefault(path, []).append(variable.name)
        else:
            report.skipped.append((path, reason))
    report.sparsified = [(path, tuple(weights)) for path, weights in sparse.items()]
    report.skipped = list(dict.fromkeys(report.skipped))
    return report, kernels, filters is None and pattern_fits


def _pattern_misfit(method: UpdateMethod, variable, layout: Layout) -> str | None:
    """Return the reason why the method's pattern does not fit a weight, or None if the pattern
    fits."""
    try:
        Pattern(method.pattern).block(variable.shape, layout)
    except ValueError as error:
        return str(error)
    return None


# -- compiled models -----------------------------------------------------------------------------


def _forget_compiled_steps(model) -> None:
    model.train_function = model.test_function = model.predict_function = None


def _refresh(model) -> None:
    """Update a model after variables of its layers were added or removed. The model need not be
    compiled."""
    refresh_torch_parameters(model)
    if not isinstance(model, keras.Model):
        return
    _forget_compiled_steps(model)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and optimizer.built:
        variables = model.trainable_variables
        with placed_like(variables[0]):
            _keras.rebuild_optimizer(optimizer, variables)
