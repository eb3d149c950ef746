"""Batch normalization with separate variables for the pruned and the full path of DCIL."""

from keras import layers, ops

from keras_dst import _keras
from keras_dst._backend.devices import placed_like
from keras_dst.layers.base import SparseMixin, expose_variables, register
from keras_dst.methods.base import TwoPathMethod, on_full_path


class PathVariable:
    """Descriptor of a variable in a batch normalization layer. A read returns the variable of the
    current path: the pruned path or the full path."""

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, layer, owner=None):
        if layer is None:
            return self
        if on_full_path() and self.name in layer.sparse_state.get("full", {}):
            return layer.sparse_state["full"][self.name]
        if self.name not in layer.__dict__:
            raise AttributeError(f"'{layer.name}' has no {self.name}.")
        return layer.__dict__[self.name]

    def __set__(self, layer, value):
        layer.__dict__[self.name] = value


@register
class SparseBatchNormalization(SparseMixin, layers.BatchNormalization):
    """`keras.layers.BatchNormalization` with a second set of variables, for forward passes without
    masks.

    This layer prunes nothing. The pruned path is the forward pass with masks, and the full path is
    the forward pass without masks. For the full path, the layer has a second scale, a second offset
    and second moving statistics. The second set of variables starts as a copy of the first set.
    Inference uses only the variables of the Keras layer. `strip` removes the scale, offset and
    statistics of the full path.

    Args:
        method: Method that trains a pruned path and a full path, such as `methods.DCIL(0.9)`. All
            other arguments are the arguments of `BatchNormalization`.

    Raises:
        ValueError: If the method trains no full path.

    Example:
        >>> keras_dst.layers.SparseBatchNormalization(method=keras_dst.methods.DCIL(0.9))

    Source: arXiv 2109.04660.
    """

    stock = layers.BatchNormalization
    gamma = PathVariable()
    beta = PathVariable()
    moving_mean = PathVariable()
    moving_variance = PathVariable()
    moving_stddev = PathVariable()
    renorm_mean = PathVariable()
    renorm_stddev = PathVariable()

    def attach_method(self, method):
        if not isinstance(method, TwoPathMethod):
            raise ValueError(
                "Expected a method that trains two paths, such as keras_dst.methods.DCIL(0.9), "
                f"because the layer holds one set of variables for each path. Received: {method!r}"
            )
        super().attach_method(method)

    def _add_states(self):
        if self.sparse_state:
            return
        attributes = vars(SparseBatchNormalization).items()
        names = [name for name, value in attributes if isinstance(value, PathVariable)]
        with _keras.unlocked(self):
            self.sparse_state["full"] = {
                name: self._copy_of(self.__dict__[name], f"full_{name}")
                for name in names
                if self.__dict__.get(name) is not None  # gamma is None if scale=False.
            }
        expose_variables(self)

    def _copy_of(self, variable, name):
        with placed_like(variable):
            copy = self.add_weight(
                name=name,
                shape=variable.shape,
                initializer=lambda shape, dtype=None: ops.copy(ops.convert_to_tensor(variable)),
                dtype=variable.dtype,
                trainable=any(variable is own for own in _keras.trainable_variables_of(self)),
                autocast=False,
                regularizer=variable.regularizer,
                constraint=variable.constraint,
            )
        copy.trainable = variable.trainable  # A frozen layer has no trainable variables.
        return copy

    def load_own_variables(self, store):
        super().load_own_variables(store)
        # The file of a dense model stores no variables for the full path.
        if not any(name in store.keys() for name in self.state_variables()):
            self.copy_stock_weights()

    def copy_stock_weights(self):
        for name, copy in self.sparse_state["full"].items():
            copy.assign(self.__dict__[name].numpy())
