"""Pruning methods. Each file implements the method of one paper."""

from keras_dst.methods.base import (
    LayerMethod,
    Method,
    ScheduleState,
    TwoPathMethod,
    UnitMethod,
    UpdateMethod,
    full_path,
    on_full_path,
)
from keras_dst.methods.consensus import Consensus
from keras_dst.methods.dcil import DCIL
from keras_dst.methods.dst import DST
from keras_dst.methods.flipout import FlipOut
from keras_dst.methods.magnitude import Magnitude
from keras_dst.methods.optg import OptG
from keras_dst.methods.rigl import RigL
from keras_dst.methods.set import SET
from keras_dst.methods.st3 import ST3

__all__ = [
    "DCIL",
    "DST",
    "SET",
    "ST3",
    "Consensus",
    "FlipOut",
    "LayerMethod",
    "Magnitude",
    "Method",
    "OptG",
    "RigL",
    "ScheduleState",
    "TwoPathMethod",
    "UnitMethod",
    "UpdateMethod",
    "full_path",
    "on_full_path",
]
