"""Functions through which keras_dst accesses private attributes of Keras.

Keras may rename a private attribute in any release. Only this module accesses private attributes,
so a renamed attribute affects no other module. `PRIVATE_NAMES` lists the attributes, and
`missing_names` compares the list with the installed Keras. The test `tests/test_keras_names.py`
calls `missing_names`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras.src.backend.common.variables import get_autocast_scope

# Keras exports the ConvLSTM layers, but not their cell.
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell as ConvLSTMCell

# `keras.Model(inputs, outputs)` creates an instance of the class `Functional`, which Keras does not
# export.
from keras.src.models.functional import Functional
from keras.src.utils.tracking import DotNotTrackScope

if TYPE_CHECKING:
    from keras import Layer as _Layer
else:
    _Layer = object

# Names of private attributes, grouped by the kind of object that has the attributes.
# `missing_names` creates one object of each kind and checks that the object has these attributes.
PRIVATE_NAMES = {
    "layer": (
        "_auto_config",
        "_build_shapes_dict",
        "_flatten_layers",
        "_inbound_nodes",
        "_lock_state",
        "_non_trainable_variables",
        "_open_name_scope",
        "_outbound_nodes",
        "_remat_mode",
        "_trainable_variables",
        "_tracker",
        "_untrack_variable",
    ),
    "variable": ("_autocast", "_initializer", "_value"),
    "model": (
        "_compile_loss",
        "_compute_loss_has_training_arg",
        "_initial_epoch",
        "_inputs_struct",
        "_losses_override",
        "_nodes_by_depth",
        "_outputs_struct",
    ),
    "compiled model": ("_compile_config",),
    "sequential": ("_functional",),
    "tensor": ("_keras_history",),
    "attention": ("_key_dense", "_output_dense", "_query_dense", "_value_dense"),
    "masked tensor": ("_keras_mask",),
    "compiled loss": ("_flat_losses", "_y_pred_build_structure"),
    "metric": ("_direction",),
    "optimizer": (
        "_exclude_from_weight_decay",
        "_iterations",
        "_learning_rate",
        "_tracker",
        "_trainable_variables",
        "_trainable_variables_indices",
        "_use_weight_decay",
        "_var_key",
        "_variables",
    ),
    "MultiOptimizer": ("_inner_optimizers", "_optimizer_map"),
    "OptimizerMap": ("_default_optimizer", "_optimizer_map"),
    "optimizer with averages": ("_model_variables_moving_average",),
    "TensorFlow optimizer": ("_distribution_strategy",),
    "JAX model": ("_jax_state", "_jax_state_synced"),
    "torch layer": ("_track_variables",),
}

# -- variables ------------------------------------------------------------------------------------


def has_value(variable) -> bool:
    """Return True if a variable holds a tensor. After a failed training step on JAX, variables may
    hold no tensor."""
    return variable._value is not None


def call_with_weights(layer, weights: list, call: Callable[[], Any]) -> Any:
    """Call a new layer symbolically, and initialize its variables with the given weights.

    In a stateless scope, Keras defers the initializers of new variables. This function replaces the
    initializers, so that Keras never computes random initial values.

    Args:
        layer: Layer that is not built. The function `call` creates the layer's variables.
        weights: Values of all variables of the built layer, as arrays.
        call: Function without arguments that calls the layer on symbolic tensors.

    Returns:
        The result of `call()`.
    """
    # For stateful recurrent layers, Keras does not defer the initializers of the states, even in a
    # stateless scope.
    if getattr(layer, "stateful", False):
        result = call()
        layer.set_weights(weights)
        return result
    with keras.StatelessScope():
        result = call()
        for variable, value in zip(layer.weights, weights, strict=True):
            if variable.shape != value.shape:
                raise ValueError(
                    f"Expected a value of shape {variable.shape} for '{variable.path}'. "
                    f"Received: a value of shape {value.shape}."
                )
            variable._initializer = functools.partial(_copied, value)
    return result


def _copied(value, shape, dtype=None):
    """Return a copy of an array as a tensor. Without the copy, PyTorch would share memory with the
    array."""
    return keras.ops.convert_to_tensor(np.array(value), dtype)


# -- layers --------------------------------------------------------------------------------------


def flatten_layers(layer, include_self: bool = True, recursive: bool = True) -> list:
    """Return a list of a layer and all layers inside it. Outer layers come before their inner
    layers."""
    return list(layer._flatten_layers(include_self=include_self, recursive=recursive))


def attention_projections_of(layer) -> dict[str, Any]:
    """Return the dense layers of a `MultiHeadAttention` or `GroupQueryAttention`, as a dict whose
    keys are `"query"`, `"key"`, `"value"` and `"output"`."""
    return {
        "query": layer._query_dense,
        "key": layer._key_dense,
        "value": layer._value_dense,
        "output": layer._output_dense,
    }


def trainable_variables_of(layer) -> list:
    """Return the list of a layer's own trainable variables, even if the layer is frozen."""
    return layer._trainable_variables


def non_trainable_variables_of(layer) -> list:
    """Return the list in which a layer stores its own non-trainable variables."""
    return layer._non_trainable_variables


@contextlib.contextmanager
def unlocked(layer) -> Iterator[None]:
    """Within this context, code can add variables to a built layer. The names of the variables
    begin with the path of the layer."""
    layer._tracker.unlock()
    try:
        with layer._open_name_scope():
            yield
    finally:
        layer._tracker.lock()


def remove_variable(layer, name: str, variable) -> None:
    """Remove a variable, and the attribute that holds it, from a built layer."""
    layer._untrack_variable(variable)
    if name in vars(layer):
        # `delattr(layer, name)` would run the garbage collector. The `__delattr__` of the base
        # class also stops TensorFlow and torch from tracking the attribute.
        super(keras.Layer, layer).__delattr__(name)


def set_autocast(variable, autocast: bool) -> None:
    """Choose whether Keras casts a variable to the compute dtype of the layer that reads it."""
    _require(variable, "_autocast")
    variable._autocast = autocast


def autocast(tensor):
    """Cast a tensor to the compute dtype of the layer that Keras is currently calling."""
    scope = get_autocast_scope()
    return tensor if scope is None else scope.maybe_cast(tensor)


def build_shapes(layer) -> dict[str, Any] | None:
    """Return the shapes that were passed to a layer's `build`, by argument name.

    The result is None if the shapes are unknown.
    """
    return layer._build_shapes_dict


def is_plain_stock(layer) -> bool:
    """Return True if the class of a layer is part of Keras and the layer's only state is its
    variables.

    Preprocessing layers have other state, such as vocabularies, boundaries and statistics.
    """
    module = type(layer).__module__
    return module.startswith("keras.src.layers.") and ".preprocessing." not in module


def is_rematerialized(layer) -> bool:
    """Return whether a layer was created within a `keras.RematScope`."""
    return bool(layer._remat_mode)


class BuildHook(_Layer):
    """Mixin that calls `after_build` when Keras has built a layer. `build` may have any
    signature."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Keras calls `_lock_state` after `build`. If Keras renamed this method, `after_build` would
        # never run.
        _require(keras.Layer, "_lock_state")

    def after_build(self) -> None:
        """Subclasses override this method to run code on a layer that Keras has just built.

        The method may change the class of the layer.
        """
        raise NotImplementedError

    def _lock_state(self):
        super()._lock_state()
        self.after_build()


def refresh_torch_parameters(layer) -> None:
    """Register a layer's variables with torch again, after variables were added or removed."""
    layer._track_variables()


# -- graphs --------------------------------------------------------------------------------------


def graph_of(model):
    """Return the Functional graph of a model, or None if the model has its own `call` method."""
    if type(model).call not in (keras.Sequential.call, Functional.call):
        return None
    graph = model._functional if isinstance(model, keras.Sequential) else model
    return graph if isinstance(graph, Functional) else None


def nodes_in_order(graph) -> list:
    """Return the nodes of a Functional graph in the order in which they run."""
    by_depth = graph._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]


def operation_of(tensor):
    """Return the operation that created a symbolic tensor."""
    return tensor._keras_history.operation


def mask_of(tensor):
    """Return the Keras mask (of padded time steps) that is attached to a tensor, or None."""
    return getattr(tensor, "_keras_mask", None)


def node_of(tensor):
    """Return the node (one call of an operation) that created a symbolic tensor."""
    operation, index = tensor._keras_history[:2]
    return operation._inbound_nodes[index]


def output_index_of(tensor) -> int:
    """Return the position of a symbolic tensor among the outputs of the call that created it."""
    return tensor._keras_history.tensor_index


def nodes_of(operation) -> tuple[list, list]:
    """Return the lists in which Keras stores the inbound and outbound nodes of an operation."""
    return operation._inbound_nodes, operation._outbound_nodes


def set_nodes_of(operation, inbound: list, outbound: list) -> None:
    """Set the inbound and outbound nodes of an operation that replaces another operation."""
    _require(operation, "_inbound_nodes")
    _require(operation, "_outbound_nodes")
    operation.__dict__["_inbound_nodes"] = inbound
    operation.__dict__["_outbound_nodes"] = outbound


def declares_input(model) -> bool:
    """Return True if a Sequential model starts with an Input that the user added.

    Keras adds an input layer to every built Sequential model. The config of the input layer has a
    `dtype` other than None only if a call on data built the model. `declares_input` also returns
    False for a model that was loaded from a file.
    """
    config = operation_of(model.inputs[0])._auto_config
    return config is not None and config.config["dtype"] is None


def structures_of(graph) -> tuple[Any, Any]:
    """Return the nested structures of symbolic inputs and outputs of a Functional graph."""
    return graph._inputs_struct, graph._outputs_struct


def inputs_of_call(graph, args: tuple, kwargs: dict[str, Any]) -> list:
    """Return the tensors that a call passes to a Functional graph, in the order of
    `graph.inputs`."""
    given = args[0] if args else kwargs["inputs"]
    # Keras matches the entries of a dict to the input names, also if the graph expects a list.
    if isinstance(given, dict) and not isinstance(graph._inputs_struct, dict):
        return [given[x.name] for x in graph.inputs]
    return keras.tree.flatten(given)


# -- training ------------------------------------------------------------------------------------


def compile_config(model) -> dict[str, Any]:
    """Return the arguments of `compile` that `model.save` stores in a file.

    If the returned dict is changed, `model.save` stores the changed arguments.
    """
    return model._compile_config.config


def flat_losses(model) -> list[tuple]:
    """Return a tuple (path, loss, weight) for every compiled loss. If the loss has no weight,
    `weight` is None."""
    compiled = model._compile_loss
    losses = compiled._flat_losses if compiled is not None else ()
    return [(path, loss, weight) for path, loss, weight, *_ in losses]


def output_structure(model):
    """Return the nested structure of model outputs for which the compiled loss was built."""
    return model._compile_loss._y_pred_build_structure


# Keras sets this attribute of a model if its `compute_loss` takes the argument `training`.
TAKES_TRAINING = "_compute_loss_has_training_arg"


def takes_training(model) -> bool:
    """Return whether a model's own `compute_loss` takes the argument `training`."""
    return getattr(model, TAKES_TRAINING)


@contextlib.contextmanager
def without_additional_losses(model) -> Iterator[None]:
    """Within this context, compute losses without regularizers and without `add_loss`."""
    before = model._losses_override
    vars(model)["_losses_override"] = [keras.ops.zeros(())]
    try:
        yield
    finally:
        vars(model)["_losses_override"] = before


def is_validation(evaluate_options: dict[str, Any]) -> bool:
    """Return True if the keyword arguments of `evaluate` show that `fit` called `evaluate`."""
    return bool(evaluate_options.get("_use_cached_eval_dataset"))


def set_initial_epoch(model, epoch: int | None) -> None:
    """Set the epoch at which `fit` begins."""
    _require(model, "_initial_epoch")
    model._initial_epoch = epoch


def restore_jax_state(model, *step_arguments) -> None:
    """On JAX, restore the variables of a model from the state that a training step received.

    On JAX, the variables have no values during `fit`. Instead, the training step receives the
    values in its first argument.
    """
    if keras.backend.backend() == "jax":
        _require(model, "_jax_state")
        _require(model, "_jax_state_synced")
        names = ("trainable", "non_trainable", "optimizer", "metrics")
        model._jax_state = {f"{n}_variables": v for n, v in zip(names, step_arguments[0])}
        model._jax_state_synced = False
        model.jax_state_sync()


def discard_jax_state(model) -> None:
    """On JAX, discard the variable values that an interrupted `evaluate` moved out of a model.

    Afterwards, the caller must assign values to all weights of the model.
    """
    if keras.backend.backend() == "jax":
        _require(model, "_jax_state")
        _require(model, "_jax_state_synced")
        model._jax_state = None
        model._jax_state_synced = True


def metric_direction(metric) -> str | None:
    """Return the direction, "up" or "down", in which a metric improves.

    The result is None if the metric does not say whether smaller or larger values are better.
    """
    return getattr(metric, "_direction", None)


# -- optimizers ----------------------------------------------------------------------------------


def own_variables_of(optimizer) -> list:
    """Return the list of variables that an optimizer created, such as its momentum."""
    return optimizer._variables


def trained_variables_of(optimizer) -> list:
    """Return the model variables that an optimizer was built to train."""
    return optimizer._trainable_variables


def delete_counters(optimizer) -> None:
    """Delete the step counter and learning rate of an optimizer that wraps another optimizer."""
    for name in ("_iterations", "_learning_rate"):
        delattr(optimizer, name)
    set_own_variables(optimizer, [])


def set_trained_variables(optimizer, variables) -> None:
    """Set the variables that an optimizer trains, as `Optimizer.build` does."""
    vars(optimizer)["_trainable_variables"] = variables
    for index, variable in enumerate(variables):
        optimizer._trainable_variables_indices[optimizer._var_key(variable)] = index


def step_counter_of(optimizer):
    """Return the variable in which an optimizer counts the calls of its `apply` method."""
    return optimizer._iterations


def is_multi_optimizer(optimizer) -> bool:
    """Return whether an optimizer is a `MultiOptimizer`, which older versions of Keras lack."""
    return isinstance(optimizer, getattr(keras.optimizers, "MultiOptimizer", ()))


def replace_optimizers(optimizer, replace) -> None:
    """Replace every optimizer inside a `MultiOptimizer` by the result of `replace(optimizer)`."""
    optimizer._inner_optimizers[:] = [replace(inner) for inner in optimizer._inner_optimizers]
    by_path = optimizer._optimizer_map
    if isinstance(by_path, keras.optimizers.OptimizerMap):
        by_path._default_optimizer = replace(by_path._default_optimizer)
        for path, inner in by_path._optimizer_map.items():
            by_path._optimizer_map[path] = replace(inner)


def _index_of(optimizer, variable) -> int | None:
    """Return the position of a variable among the variables that an optimizer was built for."""
    return optimizer._trainable_variables_indices.get(optimizer._var_key(variable))


def moving_average_of(optimizer, variable):
    """Return the exponential moving average of a trained variable, or None if it has no average."""
    index = _index_of(optimizer, variable)
    return None if index is None else optimizer._model_variables_moving_average[index]


def slots_of(optimizer, variable) -> list:
    """Return the slots of a trained variable: variables of its optimizer with the same shape.

    For example, the momentum of a variable is a slot. Keras keeps slots in lists, in the order of
    the trained variables, or in dicts whose keys are variable paths.
    """
    index = _index_of(optimizer, variable)
    if index is None:
        return []
    trained = optimizer._trainable_variables
    found: list[Any] = []
    for value in vars(optimizer).values():
        if value is trained:
            continue
        if isinstance(value, dict):
            found.append(value.get(getattr(variable, "path", None)))
        elif isinstance(value, list) and len(value) == len(trained):
            found.append(value[index])
    own, shape = optimizer._variables, tuple(variable.shape)
    slots = [s for s in found if any(s is v for v in own) and tuple(s.shape) == shape]
    if not slots and shape and any(tuple(v.shape) == shape for v in own):
        raise RuntimeError(
            f"Expected {type(optimizer).__name__} to keep its variables in lists in the order of "
            f"the trained variables. Found no list with a variable for '{variable.path}', "
            "although the optimizer has variables of its shape. Use a method that does not grow "
            "weights, such as Magnitude."
        )
    return slots


def distribution_strategy_of(optimizer):
    """Return the `tf.distribute` strategy under which an optimizer was created, or None."""
    return optimizer._distribution_strategy


def exempt_from_decay(optimizer, variables) -> None:
    """Exempt variables from weight decay, in addition to the variables that the user exempted.

    The Keras method `exclude_from_weight_decay` would overwrite the exemptions of the user.
    `exclude_from_weight_decay` also raises an error for an optimizer that is already built.
    """
    exempt = set(vars(optimizer).get("_exclude_from_weight_decay", ()))
    exempt.update(optimizer._var_key(variable) for variable in variables)
    optimizer._exclude_from_weight_decay = exempt
    _decide_decay_again(optimizer)
    if decayed := [v.path for v in variables if optimizer._use_weight_decay(v)]:
        raise RuntimeError(
            "The installed version of Keras decays variables that keras_dst has exempted from "
            f"weight decay: {', '.join(decayed)}. Expected Keras to read the attribute "
            "`Optimizer._exclude_from_weight_decay`. Install a version of Keras that keras_dst "
            "supports."
        )


def rebuild_optimizer(optimizer, variables) -> None:
    """Rebuild an optimizer in place for another list of variables, and keep the optimizer's state.

    The optimizer and the optimizers inside it remain the same objects and keep all attributes that
    the user set. Variables that the optimizer trained before the call and still trains keep their
    slots.
    """
    every = all_optimizers(optimizer)
    before = [
        (list(each._variables), list(each._trainable_variables), dict(vars(each))) for each in every
    ]
    for each in every:
        set_own_variables(each, [])
        each._trainable_variables_indices = {}
        each.built = False
    optimizer.build(list(variables))
    for each, (own, trained, attributes) in zip(every, before):
        _restore_variables(each, own, attributes)
        _forget_decay_exemptions(each, trained)


def inner_optimizers(optimizer) -> list:
    """Return the optimizers that `optimizer` wraps directly, or an empty list."""
    if is_multi_optimizer(optimizer):
        return list(optimizer.optimizers)
    inner = vars(optimizer).get("inner_optimizer")
    return [] if inner is None else [inner]


def all_optimizers(optimizer) -> list:
    """Return an optimizer and all optimizers inside it."""
    inside = (each for inner in inner_optimizers(optimizer) for each in all_optimizers(inner))
    return [optimizer, *inside]


def _restore_variables(optimizer, before: list, attributes: dict[str, Any]) -> None:
    """Add the variables that an optimizer created in its constructor to its list of variables, and
    restore the values of all variables."""
    present = vars(optimizer)
    kept = [v for v in before if any(v is value for value in present.values())]
    own = [*kept, *optimizer._variables]
    set_own_variables(optimizer, own)
    pairs = [(present.get(name), old) for name, old in attributes.items()]
    old_names = dict(zip(_numbered_names(before), before))
    pairs += [(v, old_names.get(name)) for name, v in zip(_numbered_names(own), own)]
    for variable, old in pairs:
        both = isinstance(variable, keras.Variable) and isinstance(old, keras.Variable)
        if both and variable is not old and variable.shape == old.shape:
            variable.assign(old.numpy())


def set_own_variables(optimizer, variables: list) -> None:
    """Replace the list in which an optimizer stores the variables that it created.

    The function replaces the list instead of changing it, because TensorFlow cannot save a tracked
    list whose items were removed or exchanged.
    """
    with DotNotTrackScope():
        optimizer._variables = variables
    tracker = optimizer._tracker
    tracker.config["variables"] = (tracker.config["variables"][0], optimizer._variables)
    tracker.stored_ids["variables"] = set(map(id, variables))


def _numbered_names(variables) -> list[tuple[str, int]]:
    """Return a pair of a name and a number for each variable. Variables with the same name get the
    numbers 0, 1, 2 and so on."""
    seen: Counter[str] = Counter()
    names = []
    for variable in variables:
        names.append((variable.name, seen[variable.name]))
        seen[variable.name] += 1
    return names


def _forget_decay_exemptions(optimizer, trained_before) -> None:
    """Delete the exemption from weight decay for each variable that an optimizer no longer trains.

    Keras stores the exemptions as ids of variables, and Python may give the id of a deleted
    variable to a new variable.
    """
    exempt = vars(optimizer).get("_exclude_from_weight_decay")
    if exempt:
        trained = {optimizer._var_key(v) for v in optimizer._trainable_variables}
        exempt.difference_update({optimizer._var_key(v) for v in trained_before} - trained)
    _decide_decay_again(optimizer)


def _decide_decay_again(optimizer) -> None:
    """Clear or recompute an optimizer's stored decisions about which variables get weight decay.

    Up to version 3.15, Keras decides in a training step which variables to decay, and caches the
    decision. In version 3.16, Keras decides in `Optimizer.build` which variables to decay.
    """
    if "_weight_decay_by_var_key" in vars(optimizer):
        optimizer._weight_decay_by_var_key = {
            optimizer._var_key(v): not optimizer._is_excluded_from_weight_decay(v)
            for v in optimizer._trainable_variables
        }
    elif "_exclude_from_weight_decay_cache" in vars(optimizer):
        optimizer._exclude_from_weight_decay_cache = {}


# -- devices -------------------------------------------------------------------------------------


def distribution_like(variable):
    """Return a copy of the current Keras distribution that gives new variables the layout of a
    given variable.

    New variables of the same shape are sharded like the given variable. New variables of other
    shapes are replicated on every device. The function does not look up the paths of new variables
    in a layout map. The path pattern for a kernel may also match the path of the kernel's mask.
    """
    present = keras.distribution.distribution()

    def layout_of(new):
        if tuple(new.shape) == tuple(variable.shape):
            return present.get_variable_layout(variable)
        return keras.distribution.TensorLayout([None] * len(new.shape), present.device_mesh)

    # Keras asks the distribution object for the layout of every new variable.
    like = copy.copy(present)
    like.get_variable_layout = layout_of
    return like


# -- the check -----------------------------------------------------------------------------------


def _require(target, name: str) -> None:
    """Raise AttributeError if Keras has renamed a private attribute that keras_dst writes."""
    if not hasattr(target, name):
        raise AttributeError(
            f"Keras {keras.__version__} has no private attribute `{name}` where keras_dst "
            "expects it. Install a version of Keras that keras_dst supports."
        )


def _objects_to_check() -> dict[str, Any]:
    """Return a dict that maps each kind of object in `PRIVATE_NAMES` to an example object. Kinds of
    objects that the installed version of Keras lacks are omitted."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    optimizer = keras.optimizers.SGD()
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.compile(optimizer, "mse", metrics=["mae"])
    model.train_on_batch(keras.ops.ones((2, 2)), keras.ops.ones((2, 1)))
    attention = keras.layers.MultiHeadAttention(1, 1)
    attention.build((1, 1, 1), (1, 1, 1))
    averaging = keras.optimizers.SGD(use_ema=True)
    averaging.build(model.trainable_variables)
    objects = {
        "layer": model.layers[0],
        "variable": model.layers[0].kernel,
        "model": keras.Model(model.inputs, model.outputs),
        "compiled model": model,
        "sequential": model,
        "tensor": model.outputs[0],
        "masked tensor": keras.layers.Masking()(keras.Input((2, 1))),
        "attention": attention,
        "compiled loss": model._compile_loss,
        "metric": keras.metrics.MeanAbsoluteError(),
        "optimizer": optimizer,
        "optimizer with averages": averaging,
    }
    if hasattr(keras.optimizers, "MultiOptimizer"):
        optimizer_map = keras.optimizers.OptimizerMap(keras.optimizers.SGD())
        objects["OptimizerMap"] = optimizer_map
        objects["MultiOptimizer"] = keras.optimizers.MultiOptimizer(optimizer_map)
    if keras.backend.backend() == "tensorflow":
        objects["TensorFlow optimizer"] = model.optimizer
    if keras.backend.backend() == "jax":
        objects["JAX model"] = model
    if keras.backend.backend() == "torch":
        objects["torch layer"] = model.layers[0]
    return objects


def missing_names() -> list[str]:
    """Return the entries of `PRIVATE_NAMES` that the installed Keras lacks, as strings
    "kind.name"."""
    return [
        f"{kind}.{name}"
        for kind, found in _objects_to_check().items()
        for name in PRIVATE_NAMES[kind]
        if not hasattr(found, name)
    ]
