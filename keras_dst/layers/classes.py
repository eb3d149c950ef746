"""Sparse layer classes: the built-in classes of keras_dst, and derived classes for custom
layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import keras
from keras import layers

from keras_dst import _keras
from keras_dst.layers.base import DeclaredWeight, SparseMixin, check_method
from keras_dst.layers.normalization import SparseBatchNormalization
from keras_dst.layers.stock import SPARSE_KERNEL_LAYERS
from keras_dst.masks import KERNEL, Layout
from keras_dst.methods.base import LayerMethod

SPARSE_LAYERS: tuple[type[SparseMixin], ...] = (*SPARSE_KERNEL_LAYERS, SparseBatchNormalization)


@keras.saving.register_keras_serializable("keras_dst")
class SparseSubclass(SparseMixin):
    """Sparse form of a custom layer class. A file stores the name of the custom class.

    The custom class is a subclass of a supported layer, or it declares the weights to prune:

    ```python
    class Mixer(keras.layers.Layer):
        prunable_weights = ("mix",)  # or {"mix": keras_dst.masks.Layout(outputs=(-2,), ...)}
    ```
    """

    def get_config(self):
        return {**super().get_config(), "stock_class": _registered_name(self.stock)}

    @classmethod
    def from_config(cls, config):
        layer, config = _stock_instance(config, ("method",))
        layer.__class__ = sparse_class(type(layer))
        layer.attach_method(check_method(config["method"]))
        return layer


@keras.saving.register_keras_serializable("keras_dst")
class SparseContainer(_keras.BuildHook):
    """Sparse form of a layer or model that creates its inner layers itself.

    The config of the stock class does not describe the inner layers. A layer that Keras creates
    from this config therefore has dense inner layers. For this reason, the config also stores a
    recipe: a dict that maps the position of each sparse inner layer to its method.
    """

    stock: type
    recipe: dict[str, Any]

    def get_config(self):
        own = {"stock_class": _registered_name(self.stock), "recipe": self.__dict__["recipe"]}
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config):
        layer, config = _stock_instance(config, ("recipe",))
        layer.__class__ = container_class(type(layer))
        layer.__dict__["recipe"] = config["recipe"]
        if layer.built:  # The constructor already built a Functional model.
            layer.apply_recipe()
        return layer

    def build_from_config(self, config):
        super().build_from_config(config)
        self.apply_recipe()  # When Keras loads a model, it may not call `build`.

    def after_build(self):
        self.apply_recipe()

    def apply_recipe(self) -> None:
        """Make the inner layers sparse, with the methods that the attribute `recipe` stores."""
        inner = _keras.flatten_layers(self, include_self=False)
        for index, layer in enumerate(inner):
            if str(index) in self.recipe and not isinstance(layer, SparseMixin):
                make_sparse(layer, check_method(self.recipe[str(index)]))

    def record_recipe(self) -> None:
        """Store the method of each sparse inner layer in the attribute `recipe`."""
        inner = _keras.flatten_layers(self, include_self=False)
        self.__dict__["recipe"] = {
            str(index): keras.saving.serialize_keras_object(layer.method)
            for index, layer in enumerate(inner)
            if isinstance(layer, SparseMixin)
        }

    def restore_stock(self) -> None:
        """Convert the layer back to its stock Keras class, in place."""
        del self.__dict__["recipe"]
        self.__class__ = self.stock


def make_sparse(layer, method: LayerMethod) -> None:
    """Convert a layer of a supported class, built or not, to its sparse class, in place."""
    layer.__class__ = sparse_class(type(layer))
    layer.attach_method(method)


def sparse_class(stock: type) -> type[SparseMixin] | None:
    """Return the sparse class of a layer class, or None if the class is not supported.

    For a custom layer class, this function creates the sparse class.
    """
    for cls in SPARSE_LAYERS:
        if stock is cls.stock:
            return cls
    base = next((cls for cls in SPARSE_LAYERS if issubclass(stock, cls.stock)), None)
    if base is None and not _declared_weights(stock):
        return None
    return _derive((SparseSubclass, *([base] if base else []), stock))


def container_class(stock: type) -> type:
    """Return the `SparseContainer` class of a stock class, for layers with sparse inner layers."""
    return _derive((SparseContainer, stock))


def prunable_weights_of(layer) -> Iterator[tuple[Layout, Any]]:
    """Yield a `(layout, variable)` pair for every prunable weight in a layer."""
    cls = type(layer) if isinstance(layer, SparseMixin) else sparse_class(type(layer))
    for weight in cls.sparse_weights() if cls else ():
        if (variable := weight.raw(layer)) is not None:
            yield weight.layout_of(layer), variable


def layouts_of(model) -> dict[int, Layout]:
    """Return a dict that maps the id of every prunable variable in a model to the variable's
    axes."""
    return {
        id(variable): layout
        for layer in _keras.flatten_layers(model)
        for layout, variable in prunable_weights_of(layer)
    }


def frozen_layers_of(model) -> set[int]:
    """Return the ids of the layers that have trainable weights, but none in
    `model.trainable_variables`."""
    trained = set(map(id, model.trainable_variables))
    frozen = set()
    for layer in _keras.flatten_layers(model):
        inside = _keras.flatten_layers(layer)
        own = [id(v) for inner in inside for v in _keras.trainable_variables_of(inner)]
        if own and trained.isdisjoint(own):
            frozen.add(id(layer))
    return frozen


def _declared_weights(stock: type) -> dict[str, Layout]:
    """Return the weights that a custom layer class declares as prunable, with their axes."""
    weights = getattr(stock, "prunable_weights", ())
    if isinstance(weights, str) or not all(isinstance(name, str) for name in weights):
        raise TypeError(
            f"{stock.__name__}.prunable_weights must be a tuple of names such as ('kernel',), or a "
            f"dict of names and layouts. Received: {weights!r}"
        )
    return dict(weights) if isinstance(weights, Mapping) else dict.fromkeys(weights, KERNEL)


@functools.cache
def _derive(bases: tuple[type, ...]) -> type:
    # The cache ensures that two layers of the same stock class also have the same sparse class. All
    # derived classes are registered with Keras under the name of their first base class. When Keras
    # loads a model, `from_config` of the first base class looks up the custom class. The derived
    # classes have the `__name__` of the stock class, see `base.register`.
    stock = bases[-1]
    weights = {name: DeclaredWeight(layout) for name, layout in _declared_weights(stock).items()}
    own = {"stock": stock, "__qualname__": f"Sparse{stock.__name__}", **weights}
    derived = type(stock.__name__, bases, own)
    return keras.saving.register_keras_serializable("keras_dst", bases[0].__name__)(derived)


def _registered_name(stock: type) -> str:
    return keras.saving.get_registered_name(stock)


def _stock_instance(config: dict, own_keys: tuple[str, ...]) -> tuple[Any, dict]:
    """Return the stock layer that `config` describes, and a dict of the config entries whose keys
    are in `own_keys`."""
    config = dict(config)
    own = {name: config.pop(name) for name in own_keys}
    name = config.pop("stock_class")
    stock: Any = keras.saving.get_registered_object(name) or _keras_class(name)
    if stock is None:
        raise TypeError(
            f"The file holds a sparse layer made from the class {name!r}, which Keras cannot find. "
            "Import the class, and decorate it with "
            "`@keras.saving.register_keras_serializable()`."
        )
    return stock.from_config(config), own


def _keras_class(name: str) -> type | None:
    """Return the Keras layer class whose `__name__` is `name`, or None."""
    found = (x for x in vars(layers).values() if isinstance(x, type) and x.__name__ == name)
    return next(found, None)
