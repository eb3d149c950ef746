"""Gates on channels and residual branches. `methods.Consensus` trains the gates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import keras
from keras import layers, ops

from keras_dst import _keras
from keras_dst._utils.validation import check_boolean, check_integer, check_number, is_number
from keras_dst.layers.base import check_method, expose_variables, require_driver
from keras_dst.masks import Layout
from keras_dst.methods.base import State
from keras_dst.methods.consensus import Consensus, binary


@keras.saving.register_keras_serializable("keras_dst")
class Gate(_keras.BuildHook, layers.Layer):
    """Layer that multiplies channels or a residual branch by gates.

    A gate of 1 is open, and a gate of 0 is closed.

    The method `methods.Consensus`, which needs the `SparseTraining` callback, trains the gates. In
    inference, the gates are constants. A gate with a trainable logit is open if the logit is 0 or
    more. A gate of a gating module is open if its running mean is 0.5 or more (the consensus of the
    paper). `strip` replaces a `Gate` layer by a `keras.layers.Rescaling` with the constant gates.
    After `strip`, layers that compute only the context of gates are still part of the model.
    `shrink` removes these layers.

    Args:
        axis: Axis of the channels. Defaults to -1.
        structure: `"channel"` for one gate per channel, or `"branch"` for a single gate that
            multiplies the whole tensor. `Consensus` keeps at least one channel gate open, but it
            may close a branch gate. Defaults to `"channel"`.
        dependent: If True, a gating module computes separate gates for every input. The gating
            module consists of global average pooling, dense, batch normalization, ReLU, dense and
            sigmoid. If False, every gate has one trainable logit for all inputs. Defaults to False.
        units: Number of units in the first dense layer of the gating module. Defaults to 16.
        momentum: Momentum with which the gating module updates the running mean of its gates.
            Defaults to 0.9.
        cost: Cost of one channel or branch, in FLOPs or in parameters, as selected by
            `Consensus(cost=)`. Defaults to 1.
        method: Method that trains the gates. All gates and layers whose methods are equal share one
            target cost. Defaults to None, which means `methods.Consensus()`.

    Call arguments:
        x: Tensor to multiply by the gates.
        context: Input of the gating module, with its channels on the axis `axis`. In the paper, the
            gating module reads the input of the layer whose output is gated. Defaults to None, in
            which case the gating module reads `x`.

    Raises:
        ValueError: If the structure is unknown or the cost is not positive.
        TypeError: If the method is not `Consensus`.

    Example:
        >>> y = keras.layers.Conv2D(8, 3, padding="same")(x)
        >>> x = x + keras_dst.layers.Gate(structure="branch", dependent=True)(y, context=x)

    Source: arXiv 2302.10798.
    """

    method: Consensus
    driver_active = False  # True while a callback such as SparseTraining runs.

    def __init__(
        self,
        axis: int = -1,
        structure: str = "channel",
        dependent: bool = False,
        units: int = 16,
        momentum: float = 0.9,
        cost: float = 1.0,
        method=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        if structure not in ("channel", "branch"):
            raise ValueError(f"structure must be 'channel' or 'branch'. Received: {structure!r}")
        if not (is_number(cost) and cost > 0):
            raise ValueError(f"cost must be a number above 0. Received: {cost!r}")
        self.axis = check_integer(axis, "axis", minimum=None)
        self.structure = structure
        self.dependent = check_boolean(dependent, "dependent")
        self.units = check_integer(units, "units")
        check_number(momentum, "momentum", maximum=1)
        self.momentum = momentum
        self.cost = cost
        method = check_method(Consensus() if method is None else method)
        if not isinstance(method, Consensus):
            raise TypeError(f"Expected keras_dst.methods.Consensus. Received: {method!r}")
        self.method = method
        # Keras must not track the variables in this dict again, see `SparseMixin.attach_method`.
        self.__dict__["sparse_state"] = {}
        # If the gates close channels, each channel is an output unit, and `Consensus` keeps at
        # least one gate open. If the gate closes a whole branch, the layout has no output units, so
        # `Consensus` may close the only gate.
        self._layout = Layout((-1,) if structure == "channel" else (), ())

    def build(self, x_shape, context_shape=None):
        channels = self.structure == "channel"
        rank = len(x_shape)
        if not -rank <= self.axis < rank or self.axis % rank == 0:
            raise ValueError(
                "axis must be an axis of the input, but not the axis of the batch. The input has "
                f"the shape {tuple(x_shape)}. Received: axis={self.axis}"
            )
        read = {"x": x_shape} if channels else {}
        if self.dependent:
            read["context"] = context_shape or x_shape
        for argument, shape in read.items():
            if shape[self.axis] is None:
                raise ValueError(
                    f"The axis {self.axis} of `{argument}` must have a fixed size. Received: the "
                    f"shape {tuple(shape)}. Pass the size to keras.Input."
                )
        self._shape = tuple(n if i == self.axis % rank else 1 for i, n in enumerate(x_shape))
        self._shape = self._shape if channels else (1,) * rank
        gates = (math.prod(self._shape),) if channels else ()
        if self.dependent:
            pooled = (None, read["context"][self.axis])
            # Gates are computed in float32 under every dtype policy.
            self.hidden = layers.Dense(self.units, use_bias=False, dtype="float32", name="hidden")
            self.norm = layers.BatchNormalization(dtype="float32", name="norm")
            # A bias of ones opens all gates at the beginning.
            self.out = layers.Dense(
                math.prod(gates), "sigmoid", bias_initializer="ones", dtype="float32", name="out"
            )
            self.hidden.build(pooled)
            self.norm.build((None, self.units))
            self.out.build((None, self.units))
            pi = self.add_weight(
                name="mean",
                shape=gates,
                initializer="ones",
                trainable=False,
                aggregation="mean",
                autocast=False,
            )
        else:
            pi = self.add_weight(
                name="logit",
                shape=gates,
                autocast=False,
                initializer=keras.initializers.Constant(self.method.start),
            )
        own = {"mean" if self.dependent else "logit": pi}
        self.sparse_state["gate"] = {**own, **self.method.build_budget(self, "gate")}

    def after_build(self):
        if self.sparse_state:
            expose_variables(self)
            require_driver(self)

    def call(self, x, context=None, training=False):
        state = self.sparse_state["gate"]
        if not self.dependent:
            z = self.method.gate(state, self._layout)
        elif training and self.trainable:
            z = self._module(x if context is None else context)
            mean = ops.reshape(ops.mean(z, axis=0), state["mean"].shape)
            # Later in the same training step, the penalties on the gates read the batch mean.
            self.__dict__["_batch_mean"] = mean
            old = ops.convert_to_tensor(state["mean"])
            mean = ops.stop_gradient(mean)
            state["mean"].assign(self.momentum * old + (1 - self.momentum) * mean)
        else:
            z = ops.cast(self.is_open(), "float32")
        return x * ops.cast(ops.reshape(z, (-1, *self._shape[1:])), x.dtype)

    def _module(self, context):
        """Return one set of gates for every input in the batch, computed by the gating module."""
        context = ops.cast(context, "float32")
        places = {*range(1, len(context.shape))} - {self.axis % len(context.shape)}
        pooled = ops.mean(context, axis=tuple(places)) if places else context
        pi = self.out(ops.relu(self.norm(self.hidden(pooled), training=True)))
        return binary(pi, pi >= 0.5)

    def is_open(self):
        """Return which gates are open in inference, as a boolean tensor."""
        return self.method.is_open(self.sparse_state["gate"], self._layout)

    def masked_weights(self) -> Iterator[tuple[Layout, Any, State]]:
        """Yield `(layout, variable, state)` of the gates, like the method `masked_weights` of a
        sparse layer."""
        for state in self.sparse_state.values():
            yield self._layout, state["mean" if self.dependent else "logit"], state

    def state_variables(self) -> dict[str, Any]:
        """Return all variables of the layer and of its gating module, as a dict whose keys are
        paths."""
        return {variable.path: variable for variable in self.variables}

    def batch_mean(self, layout: Layout, state: State):
        """Return the gates of the last forward pass, averaged over the batch."""
        if not self.dependent:
            return self.method.gate(state, layout)
        mean = self.__dict__.pop("_batch_mean", None)
        return ops.cast(self.is_open(), "float32") if mean is None else mean

    @staticmethod
    def first_argument(args, kwargs):
        """Return the call argument `x` from the arguments of a call."""
        return args[0] if args else kwargs["x"]

    def check_stock(self) -> None:
        """Raise ValueError if a `Rescaling` layer cannot apply the constant gates.

        With the image data format "channels_first", `Rescaling` appends axes to a scale of rank 1
        or 2.
        """
        rank = len(self._shape)
        channels_first = keras.config.image_data_format() == "channels_first"
        if self.structure == "channel" and rank < 3 and channels_first:
            raise ValueError(
                "With the image data format 'channels_first', a Gate that is replaced by "
                "keras.layers.Rescaling must have inputs of rank 3 or more. Received: "
                f"'{self.name}' with inputs of rank {rank}. Call "
                "keras.config.set_image_data_format('channels_last') before you strip or load the "
                "model. Existing layers keep their own data format."
            )

    def restore_stock(self) -> None:
        """Convert the layer, in place, to a `Rescaling` layer with the constant gates."""
        self.check_stock()
        on = ops.convert_to_numpy(self.is_open()).astype("float32")
        # A scalar also fits inputs of rank 2 with the data format "channels_first".
        scale = on.reshape(self._shape).tolist() if on.ndim else float(on)
        stock = layers.Rescaling(scale, name=self.name, dtype=self.dtype_policy)
        stock.build(self._shape)
        nodes = _keras.nodes_of(self)
        for node in nodes[0]:  # `Rescaling` has no argument `context`.
            arguments = node.arguments
            node.arguments = type(arguments)(self.first_argument(arguments.args, arguments.kwargs))
        self.__dict__.clear()
        self.__class__ = layers.Rescaling
        self.__dict__.update(stock.__dict__)
        _keras.set_nodes_of(self, *nodes)

    def compute_output_shape(self, x_shape, context_shape=None):
        return x_shape

    def get_config(self):
        names = ("axis", "structure", "dependent", "units", "momentum", "cost")
        own = {name: getattr(self, name) for name in names}
        method = keras.saving.serialize_keras_object(self.method)
        return {**super().get_config(), **own, "method": method}
