"""The pruning API of TensorFlow Model Optimization (tfmot) on Keras 3.

Names, arguments and masks equal `tfmot.sparsity.keras` 0.8, on every backend. The layers hold the
masks, as after `sparsify`. For this reason, `report`, `shrink` and `export_tflite` can read a
pruned model directly.
"""

from keras_dst.tfmot.callbacks import UpdatePruningStep
from keras_dst.tfmot.files import load
from keras_dst.tfmot.method import PruneLowMagnitude
from keras_dst.tfmot.policies import PruneForLatencyOnXNNPack, PruningPolicy
from keras_dst.tfmot.pruning import is_pruned, prune_low_magnitude, strip_pruning
from keras_dst.tfmot.schedules import ConstantSparsity, PolynomialDecay, PruningSchedule

__all__ = [
    "ConstantSparsity",
    "PolynomialDecay",
    "PruneForLatencyOnXNNPack",
    "PruneLowMagnitude",
    "PruningPolicy",
    "PruningSchedule",
    "UpdatePruningStep",
    "is_pruned",
    "load",
    "prune_low_magnitude",
    "strip_pruning",
]


def __dir__():
    return __all__
