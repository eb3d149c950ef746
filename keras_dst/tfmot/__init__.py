"""The pruning API of TensorFlow Model Optimization (tfmot) on Keras 3.

The names, arguments and masks are the same as in `tfmot.sparsity.keras` 0.8, on every backend. As
after `keras_dst.sparsify`, every pruned layer stores its own masks. `report`, `shrink` and
`export_tflite` can therefore read a pruned model directly.
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
