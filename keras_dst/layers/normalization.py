"""Batch normalisation with variables of its own for each of two paths, as `methods.DCIL` asks."""

import keras
from keras import layers, ops

from keras_dst import _keras
from keras_dst._backend.devices import placed_like
from keras_dst.layers.base import SparseMixin
from keras_dst.methods.base import TwoPathMethod, on_full_path


class PathVariable:
    """Attribute of a batch normalisation: the variable of the path that runs."""

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


@keras.saving.register_keras_serializable("keras_dst")
class SparseBatchNormalization(SparseMixin, layers.BatchNormalization):
    """`keras.layers.BatchNormalization` with a second set of variables for the full path.

    Nothing in it is pruned: scale, offset and moving statistics are doubled. The second set starts
    as a copy of the first, which alone is used in inference and left by `strip`.

    Args:
        method: a method with two paths, such as `methods.DCIL(0.9)`; all others as there.

    Raises:
        ValueError: for a method with one path.

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
                "A batch normalisation has a second set of variables for a method with two paths, "
                f"such as keras_dst.methods.DCIL. Received: {method!r}"
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
                if self.__dict__.get(name) is not None  # as gamma without scale
            }

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
        copy.trainable = variable.trainable  # False in a layer that is frozen
        return copy

    def load_own_variables(self, store):
        super().load_own_variables(store)
        for name, copy in self.sparse_state["full"].items():
            if f"full_{name}" not in store.keys():  # from a dense model
                copy.assign(self.__dict__[name].numpy())
