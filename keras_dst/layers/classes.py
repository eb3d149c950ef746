"""Which sparse class a layer becomes: ours, or one derived for a class of the user's own."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import keras
from keras import layers

from keras_dst import _keras
from keras_dst.layers.base import SparseMixin, SparseWeight, check_method
from keras_dst.layers.normalization import SparseBatchNormalization
from keras_dst.layers.stock import STOCK_LAYERS
from keras_dst.masks import KERNEL, Layout
from keras_dst.methods.base import LayerMethod

if TYPE_CHECKING:
    from keras import Layer as _Layer  # what the mixins are mixed into
else:
    _Layer = object

SPARSE_LAYERS: tuple[type[SparseMixin], ...] = (*STOCK_LAYERS, SparseBatchNormalization)


@keras.saving.register_keras_serializable("keras_dst")
class SparseSubclass(SparseMixin):
    """A user's layer, made sparse; a file names the user's class.

    It is a subclass of a supported layer, or declares what of it can be pruned:

        class Mixer(keras.layers.Layer):
            prunable_weights = ("mix",)  # or {"mix": keras_dst.masks.Layout(outputs=(-2,), ...)}
    """

    def get_config(self):
        return {**super().get_config(), "stock_class": _name_of(self.stock)}

    @classmethod
    def from_config(cls, config):
        layer, config = _stock_instance(config, ("method",))
        layer.__class__ = sparse_class(type(layer))
        layer.attach_method(check_method(config["method"]))
        return layer


@keras.saving.register_keras_serializable("keras_dst")
class SparseComposite(_Layer):
    """A layer or model that makes layers of its own, some of which are sparse.

    Its config rebuilds plain layers, so it carries the recipe: which of the layers inside, by
    their order, takes which method.
    """

    stock: type
    recipe: dict[str, Any]

    def get_config(self):
        own = {"stock_class": _name_of(self.stock), "recipe": self.__dict__["recipe"]}
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config):
        layer, config = _stock_instance(config, ("recipe",))
        layer.__class__ = composite_class(type(layer))
        layer.__dict__["recipe"] = config["recipe"]
        if layer.built:  # as a Functional model is
            layer.apply_recipe()
        return layer

    def build_from_config(self, config):
        super().build_from_config(config)
        self.apply_recipe()

    def apply_recipe(self) -> None:
        """Make the layers inside sparse, as the recipe says."""
        inner = _keras.flatten_layers(self, include_self=False)
        for index, layer in enumerate(inner):
            if str(index) in self.recipe and not isinstance(layer, SparseMixin):
                make_sparse(layer, check_method(self.recipe[str(index)]))

    def record_recipe(self) -> None:
        """Take down the methods of the sparse layers inside."""
        inner = _keras.flatten_layers(self, include_self=False)
        self.__dict__["recipe"] = {
            str(index): keras.saving.serialize_keras_object(layer.method)
            for index, layer in enumerate(inner)
            if isinstance(layer, SparseMixin)
        }

    def restore_stock(self) -> None:
        """Become the stock class again."""
        del self.__dict__["recipe"]
        self.__class__ = self.stock


def sparse_class(stock: type) -> type[SparseMixin] | None:
    """The sparse class of a layer class: ours, or one made for a class of the user's own."""
    for cls in SPARSE_LAYERS:
        if stock is cls.stock:
            return cls
    ours = next((cls for cls in SPARSE_LAYERS if issubclass(stock, cls.stock)), None)
    if ours is None and not _declared(stock):
        return None
    return _derive((SparseSubclass, *([ours] if ours else []), stock))


def prunable(layer) -> Iterator[tuple[Layout, Any]]:
    """Every weight of a layer, sparse yet or not, that can take a mask: its axes, its variable."""
    cls = type(layer) if isinstance(layer, SparseMixin) else sparse_class(type(layer))
    for weight in cls.sparse_weights() if cls else ():
        if (variable := weight.raw(layer)) is not None:
            yield weight.layout_of(layer), variable


def layouts_of(model) -> dict[int, Layout]:
    """The axes of every weight of a model that can take a mask, by the id of its variable."""
    return {
        id(variable): layout
        for layer in _keras.flatten_layers(model)
        for layout, variable in prunable(layer)
    }


def _declared(stock: type) -> dict[str, Layout]:
    """The weights that a user's layer class declares as prunable, and their axes."""
    weights = getattr(stock, "prunable_weights", ())
    return dict(weights) if isinstance(weights, Mapping) else dict.fromkeys(weights, KERNEL)


def composite_class(stock: type) -> type:
    """The class that a layer of this class becomes when layers inside it are sparse."""
    return _derive((SparseComposite, stock))


@functools.cache
def _derive(bases: tuple[type, ...]) -> type:
    # One class per stock class, so that two layers of a class stay of one class. All of them are
    # saved under the name of the base, whose `from_config` finds the user's class.
    stock = bases[-1]
    weights = {name: SparseWeight(layout) for name, layout in _declared(stock).items()}
    derived = type(f"Sparse{stock.__name__}", bases, {"stock": stock, **weights})
    return keras.saving.register_keras_serializable("keras_dst", bases[0].__name__)(derived)


def _name_of(stock: type) -> str:
    return keras.saving.get_registered_name(stock)


def _stock_instance(config: dict, ours: tuple[str, ...]) -> tuple[Any, dict]:
    """A layer of the class that a config names, and what of the config is ours."""
    config = dict(config)
    own = {name: config.pop(name) for name in ours}
    name = config.pop("stock_class")
    stock: Any = keras.saving.get_registered_object(name) or _of_keras(name)
    if stock is None:
        raise TypeError(
            f"The file holds a sparse layer made from the class {name!r}, which is not known here. "
            "Import it, and decorate it with `@keras.saving.register_keras_serializable()`."
        )
    return stock.from_config(config), own


def _of_keras(name: str) -> type | None:
    """Keras's own layer of a class name, which it may export under another."""
    found = (x for x in vars(layers).values() if isinstance(x, type) and x.__name__ == name)
    return next(found, None)


def make_sparse(layer, method: LayerMethod) -> None:
    """Turn a layer of a supported class, built or not, into its sparse class, in place."""
    layer.__class__ = sparse_class(type(layer))
    layer.attach_method(method)
