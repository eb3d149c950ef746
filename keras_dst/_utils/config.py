"""Base class of objects whose config, equality and repr follow from constructor arguments."""

import inspect
from inspect import Parameter
from typing import Any

import keras


class Configurable:
    """Base class of objects that store every constructor argument in an attribute of the same name.

    The config consists of the constructor arguments. Two objects of the same class are equal if
    their arguments are equal. A class without a constructor has no arguments. If a constructor has
    `**kwargs`, it must pass them to the constructor of its base class.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        arguments_of(cls)  # Raise an error now if a config cannot store the arguments.

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments, serialized by Keras."""
        return {
            name: keras.saving.serialize_keras_object(self._argument(name))
            for name in arguments_of(type(self))
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]):
        """Create an object from a config that `get_config` returned."""
        values = {name: keras.saving.deserialize_keras_object(v) for name, v in config.items()}
        positional = [
            values.pop(name)
            for name, argument in arguments_of(cls).items()
            if argument.kind is Parameter.POSITIONAL_ONLY and name in values
        ]
        return cls(*positional, **values)

    def _argument(self, name):
        try:
            return getattr(self, name)
        except AttributeError:
            cls = type(self).__name__
            raise AttributeError(
                f"{cls}.__init__ has the argument {name!r}, but the object has no attribute "
                f"{name!r}, which get_config and repr need. Assign self.{name} = {name} in "
                "__init__."
            ) from None

    def __eq__(self, other):
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self):
        # Equal objects must have equal hashes. Two objects that were created with the arguments 0
        # and 0.0 are equal. The hash of an object is therefore computed from its class alone.
        return hash(type(self))

    def __repr__(self):
        given = []
        for name, argument in arguments_of(type(self)).items():
            value = self._argument(name)
            if value is not argument.default and value != argument.default:
                keyword = "" if argument.kind is Parameter.POSITIONAL_ONLY else f"{name}="
                given.append(f"{keyword}{value!r}")
        return f"{type(self).__name__}({', '.join(given)})"


def arguments_of(cls: type) -> dict[str, Parameter]:
    """Return the constructor arguments of a class as a dict by name, without `self`.

    The dict includes the arguments that reach the constructor of a base class through `**kwargs`.

    Raises:
        TypeError: If the constructor accepts arguments without names, such as `*args`.
    """
    found: dict[str, Parameter] = {}
    passes_on = ""
    for base in cls.__mro__[:-1]:
        if "__init__" not in vars(base):
            continue
        arguments = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        kinds = {argument.kind: f"{argument}".split(":")[0] for argument in arguments}
        for argument in arguments:
            if argument.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
                found.setdefault(argument.name, argument)
        passes_on = kinds.get(Parameter.VAR_KEYWORD, "")
        if not passes_on:
            passes_on = kinds.get(Parameter.VAR_POSITIONAL, "")
            break
    if passes_on:
        raise TypeError(
            f"All arguments of {cls.__name__}.__init__ must have names, because a config stores "
            f"arguments by name. Received: {passes_on}. Replace {passes_on} by named arguments."
        )
    return found
