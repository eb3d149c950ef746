"""The methods, one paper one file."""

from keras_dst.methods.base import LayerMethod, Method, UpdateMethod
from keras_dst.methods.consensus import Consensus
from keras_dst.methods.dst import DST
from keras_dst.methods.magnitude import Magnitude

__all__ = ["DST", "Consensus", "LayerMethod", "Magnitude", "Method", "UpdateMethod"]
