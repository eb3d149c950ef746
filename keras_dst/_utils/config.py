"""Objects that are their constructor's arguments: config, equality and repr from the signature."""

import inspect

import keras


class Configurable:
    """Keeps every constructor argument as an attribute of that name, and nothing else matters."""

    def get_config(self) -> dict:
        """The constructor's arguments, serialised."""
        names = inspect.signature(type(self).__init__).parameters
        return {
            name: keras.saving.serialize_keras_object(getattr(self, name))
            for name in names
            if name != "self"
        }

    @classmethod
    def from_config(cls, config: dict):
        """The object whose `get_config` gave this."""
        return cls(**{name: keras.saving.deserialize_keras_object(v) for name, v in config.items()})

    def __eq__(self, other):
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self):
        return hash(type(self))  # equal numbers, such as 0 and 0.0, have to hash alike

    def __repr__(self):
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(type(self).__init__).parameters.items()
            if name != "self"
        }
        given = (
            f"{name}={getattr(self, name)!r}"
            for name, default in defaults.items()
            if getattr(self, name) is not default and getattr(self, name) != default
        )
        return f"{type(self).__name__}({', '.join(given)})"
