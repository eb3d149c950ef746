"""Changing models in place: `sparsify` makes layers sparse, `strip` makes them stock again."""

from __future__ import annotations

from dataclasses import dataclass, field

import keras

from keras_dst import _keras
from keras_dst._backend.devices import placed_like, refresh_torch_parameters
from keras_dst._utils.filters import Filters, is_kernel, select
from keras_dst.layers import (
    Gate,
    SparseBatchNormalization,
    SparseComposite,
    SparseMixin,
    check_method,
    composite_class,
    make_sparse,
    prunable,
    sparse_class,
)
from keras_dst.methods.base import LayerMethod, TwoPathMethod, UnitMethod
from keras_dst.optimizers import remove_masks, without_masks

_OURS = (SparseMixin, SparseComposite, Gate)


@dataclass
class SparsifyReport:
    """What `sparsify` did.

    Attributes:
        method: the method that was applied.
        sparse: paths of the layers that are sparse now.
        skipped: path of every other layer with weights to prune, and why it was left alone.
        doubled: paths of the batch normalisations that have a second set of variables now, for a
            method with two paths.
    """

    method: LayerMethod
    sparse: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    doubled: list[str] = field(default_factory=list)

    def __getattr__(self, name):
        raise AttributeError(
            f"A SparsifyReport has no {name!r}. sparsify() changes the model in place and returns "
            "what it did: go on with the model that it was given."
        )

    def __str__(self):
        doubled = f", {len(self.doubled)} doubled" if self.doubled else ""
        counts = f"{len(self.sparse)} layers sparse, {len(self.skipped)} skipped{doubled}"
        lines = [f"{self.method!r}: {counts}"]
        lines += [f"  sparse   {path}" for path in self.sparse]
        lines += [f"  doubled  {path}" for path in self.doubled]
        lines += [f"  skipped  {path}: {reason}" for path, reason in self.skipped.items()]
        return "\n".join(lines)


def sparsify(model, method: LayerMethod, filters: Filters = None) -> SparsifyReport:
    """Make the layers of a model sparse, in place, as `model.quantize()` works.

    Every supported layer becomes its sparse class, however deep inside nested, subclassed or
    wrapping layers: dense, convolutional (also transposed, depthwise, separable), `EinsumDense` (so
    attention), `Embedding`, the cells of recurrent layers, subclasses of them, and layers of your
    own whose class names its weights in `prunable_weights`. It keeps its weights, its name and its
    place in the graph; a shared layer keeps one mask. A compiled model
    stays compiled; an optimiser that has been built keeps its slots. A method with two paths gives
    every batch normalisation a second set of variables, whatever the filters.

    Args:
        model: a built Keras 3 model.
        method: a method whose mask is part of the forward pass, such as `methods.DST()`.
        filters: which layers: None for all; the name or path of a layer, or of one that it is
            inside of, or a regular expression for these; a list of them; or
            `callable(layer) -> bool`.

    Returns:
        A `SparsifyReport`: what was made sparse and what was skipped, with the reason.

    Raises:
        TypeError: for a model that is not a Keras 3 model, or a method of the other family.
        ValueError: for an unbuilt model, a filter that fits nothing, a model that is sparse
            already, or when nothing supported was found.

    Example:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> print(keras_dst.sparsify(model, keras_dst.methods.DST()))
    """
    check_model(model)
    method = check_method(method)
    inner = [layer for layer in _keras.flatten_layers(model) if not _is_container(layer)]
    names = _names(model, inner)
    # Check before the first change, so that an error leaves the model as it was.
    if any(isinstance(layer, SparseMixin) for layer in inner):
        raise ValueError("The model is sparse already. Call keras_dst.strip(model) first.")
    report = SparsifyReport(method)
    chosen, norms = [], []
    exempt = _exempt(model, method, filters)
    for layer, selected in zip(inner, select(inner, filters, names)):
        if isinstance(layer, SparseBatchNormalization.stock):
            if isinstance(method, TwoPathMethod) and layer.built:
                norms.append(layer)
                report.doubled.append(layer.path or layer.name)
            continue
        reason = exempt.get(id(layer)) if selected else "not selected by filters"
        reason = reason or unsupported(layer, method)
        if reason is None:
            chosen.append(layer)
            report.sparse.append(layer.path or layer.name)
        elif has_kernel(layer):
            report.skipped[layer.path or layer.name] = reason
    if not chosen:
        raise ValueError(f"There is nothing to make sparse in '{model.name}'.\n{report}")
    become_sparse(model, chosen + norms, method)
    return report


def become_sparse(model, layers, method: LayerMethod) -> None:
    """Turn these layers of a model, or of a layer, built or not, into sparse ones."""
    _check_ties(layers)
    for layer in layers:
        make_sparse(layer, method)
    _record_recipes(model)
    _refresh(model)


def strip(model):
    """Bake the masks into the weights as exact zeros and leave stock Keras layers, in place.

    Works after every method, also on a model that was never sparse. The model predicts the same
    as before; no class of ours is left in it, nor in its compiled optimiser. It stays compiled.

    Args:
        model: a built Keras 3 model.

    Returns:
        The same model.

    Example:
        >>> keras_dst.strip(model).save("model.keras")  # loads without keras_dst
    """
    check_model(model)
    found = [x for x in _keras.flatten_layers(model) if isinstance(x, _OURS)]
    _check_gates(model, found)
    for layer in found:
        layer.restore_stock()
    remove_masks(model)
    if model.compiled:
        compiled = _keras.compile_config(model)  # what is saved of it
        compiled["optimizer"] = without_masks(compiled["optimizer"])
    if found:
        _refresh(model)
    else:
        _forget_compiled_steps(model)
    return model


def is_sparse(model) -> bool:
    """Whether a model holds layers of ours, which `strip` would replace."""
    return any(isinstance(x, _OURS) for x in _keras.flatten_layers(model))


def check_model(model) -> None:
    """Raise unless this is a built Keras 3 model or layer."""
    if isinstance(model, keras.Layer):
        if not model.built:
            raise ValueError(
                f"'{model.name}' has no weights yet. Give it an Input, call model.build(shape), or "
                "call it once on data."
            )
        return
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, keras.KerasTensor):
        fix = "That is the output of a layer that was called: build keras.Model(inputs, outputs)."
    elif any(
        b.__module__.startswith(("tf_keras", "tensorflow.python.keras"))
        for b in type(model).__mro__
    ):
        fix = "That is a Keras 2 model: build or load it with `keras` 3 instead of tf_keras."
    elif any(b.__module__.startswith("torch.nn") for b in type(model).__mro__):
        fix = "That is a torch module: keras_dst works on Keras models, with torch as a backend."
    elif isinstance(model, str) or hasattr(model, "__fspath__"):
        fix = "Load it first: keras.saving.load_model(path)."
    else:
        fix = "Build one with keras.Model or keras.Sequential."
    raise TypeError(f"Expected a Keras 3 model. Received: {kind}. {fix}")


def _names(model, inner) -> list[tuple[str, ...]]:
    """What every layer can be called: its name, its path, and those of the layers around it."""
    found = {id(layer): [layer.name, layer.path] for layer in inner}
    for outer in _keras.flatten_layers(model, include_self=False):
        for layer in _keras.flatten_layers(outer, include_self=False):
            if id(layer) in found:
                found[id(layer)] += [outer.name, outer.path]
    return [tuple(name for name in found[id(layer)] if name) for layer in inner]


def _exempt(model, method, filters) -> dict[int, str]:
    """Layers that the method must not touch, by their id, and why."""
    gates = [x for x in _keras.flatten_layers(model) if isinstance(x, Gate)]
    inside = [x for gate in gates for x in _keras.flatten_layers(gate, include_self=False)]
    exempt = {id(x): "it is the gating module of a Gate" for x in inside}
    for layer in _keras.flatten_layers(model):
        if isinstance(layer, keras.layers.SpectralNormalization):
            reason = "SpectralNormalization divides the kernel by its norm without the mask; "
            reason += "prune it with SparseOptimizer"
            exempt[id(layer)] = exempt[id(layer.layer)] = reason
    if not isinstance(method, UnitMethod):
        return exempt
    if _keras.graph_of(model) is None and filters is None:
        raise ValueError(
            f"{type(method).__name__} prunes whole units, and which layers give the outputs of "
            f"'{model.name}' is not known: a call of its own runs it. Name the layers to prune "
            "with filters."
        )
    return {**exempt, **dict.fromkeys(_outputs(model), "its units are the model's outputs")}


def _outputs(model) -> set[int]:
    """Ids of the layers that give a model's outputs: on every way back, the first with kernels."""
    graph = _keras.graph_of(model)
    if graph is None:
        return set()
    found: set[int] = set()
    tensors, seen = list(graph.outputs), set()
    while tensors:
        tensor = tensors.pop()
        operation = _keras.operation_of(tensor)
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if isinstance(operation, keras.Model) and (last := _outputs(operation)):
            found |= last
        elif _has_kernels(operation):
            found |= {id(layer) for layer in _keras.flatten_layers(operation)}
        else:
            tensors += _keras.node_of(tensor).input_tensors
    return found


def _has_kernels(operation) -> bool:
    if isinstance(operation, Gate) or not isinstance(operation, keras.Layer):
        return False
    return any(map(is_kernel, operation.weights))


def _check_gates(model, layers) -> None:
    """Raise for a Gate that is part of no graph, where it could not become a stock layer."""
    graphs = [g for x in _keras.flatten_layers(model) if (g := _graph_or_none(x)) is not None]
    placed = {id(operation) for graph in graphs for operation in graph.operations}
    for layer in layers:
        if isinstance(layer, Gate) and id(layer) not in placed:
            raise ValueError(
                f"'{layer.name}' is a Gate that a layer or model of your own makes and calls, "
                "which would make a Gate again. Build the model as Sequential or Functional to "
                "strip it; in inference its gates are constants as it is."
            )


def _graph_or_none(layer):
    return _keras.graph_of(layer) if isinstance(layer, keras.Model) else None


def _is_container(layer) -> bool:
    return isinstance(layer, keras.Model)


def unsupported(layer, method) -> str | None:
    """Why a layer cannot be made sparse, or None."""
    cls = sparse_class(type(layer))
    if cls is None:
        return f"{type(layer).__name__} is not supported"
    if not layer.built:
        return "the layer is not built"
    if getattr(layer, "quantization_mode", None):
        return "the layer is quantised; make it sparse, strip, then quantise"
    if getattr(layer, "lora_enabled", False):
        return "LoRA is enabled; save and load the model, which merges it, then make it sparse"
    if isinstance(method, UnitMethod) and not cls.has_units():
        return f"{type(method).__name__} prunes whole units, which {type(layer).__name__} has not"
    for layout, variable in prunable(layer):
        try:
            method.check(variable.shape, layout)
        except ValueError as error:
            return str(error)
    return None


def has_kernel(layer) -> bool:
    """Whether a layer itself trains a weight that could be pruned, or has quantised one."""
    quantised = getattr(layer, "quantization_mode", None)
    own = [
        *_keras.trainable_variables_of(layer),
        *(_keras.non_trainable_variables_of(layer) if quantised else []),
    ]
    return any(map(is_kernel, own))


def _check_ties(layers) -> None:
    """Raise where two layers hold one weight, which can have but one mask."""
    owners: dict[int, str] = {}
    for layer in layers:
        for _, variable in prunable(layer):
            if id(variable) in owners:
                raise ValueError(
                    f"'{layer.name}' and '{owners[id(variable)]}' hold the same weight "
                    f"'{variable.path}', which can have but one mask. Call one layer twice, read "
                    "the weight from the other layer where it is used, or prune it with "
                    "SparseOptimizer."
                )
            owners[id(variable)] = layer.name


def _carries_its_layers(layer) -> bool:
    """Whether a layer's config holds the layers inside: then each of them saves itself."""
    if not isinstance(layer, keras.Model):
        return False
    try:
        return "layers" in layer.get_config()
    except NotImplementedError:
        return False


def _record_recipes(layer) -> None:
    """Give every outermost layer that rebuilds plain layers inside the recipe to sparsify them."""
    if not any(
        isinstance(x, SparseMixin) for x in _keras.flatten_layers(layer, include_self=False)
    ):
        return
    if _carries_its_layers(layer):
        for inner in _keras.flatten_layers(layer, include_self=False, recursive=False):
            _record_recipes(inner)
    else:
        if not isinstance(layer, SparseComposite):
            layer.__class__ = composite_class(type(layer))
        layer.record_recipe()


def _forget_compiled_steps(model) -> None:
    model.train_function = model.test_function = model.predict_function = None


def _refresh(model) -> None:
    """Make a model, compiled or not, ready for its new variables."""
    refresh_torch_parameters(model)
    if not isinstance(model, keras.Model):
        return
    _forget_compiled_steps(model)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and optimizer.built:
        with placed_like(model.trainable_variables[0]):
            model.optimizer = _rebuilt(optimizer, model.trainable_variables)


def _rebuilt(optimizer, variables):
    """An optimiser of the same config for other variables; what fits of the old state is kept."""
    new = type(optimizer).from_config(optimizer.get_config())
    new.build(variables)
    old = {v.path: v for v in optimizer.variables}
    for variable in new.variables:
        source = old.get(variable.path)
        if source is not None and source.shape == variable.shape:
            variable.assign(source.numpy())
    return new
