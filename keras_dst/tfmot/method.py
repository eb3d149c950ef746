"""Class `PruneLowMagnitude`, the pruning method that `prune_low_magnitude` applies to layers."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_dst import masks
from keras_dst._utils.validation import is_integer
from keras_dst.methods.base import LayerMethod
from keras_dst.schedules import check_sparsity
from keras_dst.tfmot.masks import block_mask, magnitude_mask
from keras_dst.tfmot.schedules import PruningSchedule


@keras.saving.register_keras_serializable("keras_dst.tfmot")
class PruneLowMagnitude(LayerMethod):
    """Magnitude pruning as in tfmot, with one mask per weight tensor.

    ```text
    t = 1, 2, ...  before step t, if the schedule updates at t:
                       m = 1[|w| >= k-th largest |w|],  k = max(1, round(size (1 - s_t))),
                       w = m w
                   in step t: forward with m w, gradient for all of w
    ```

    The entries of each weight tensor are ranked separately. Pruned entries are trained as well, so
    that the next mask update can restore them.

    Args:
        pruning_schedule: Schedule of the mask updates: the step and the sparsity of each update.
        block_size: Number of rows (inputs) and columns (outputs) of a block. Defaults to (1, 1).
        block_pooling_type: `"AVG"` ranks blocks by their mean magnitude, and `"MAX"` ranks blocks
            by their largest magnitude. Defaults to `"AVG"`.
        sparsity_m_by_n: Pair `(m, n)`, which sets m weights to zero for every n consecutive inputs.
            Defaults to None.

    Source: arXiv 1710.01878; tfmot 0.8.
    """

    driver = "keras_dst.tfmot.UpdatePruningStep"

    def __init__(
        self,
        pruning_schedule: PruningSchedule,
        block_size: tuple[int, int] = (1, 1),
        block_pooling_type: str = "AVG",
        sparsity_m_by_n: tuple[int, int] | None = None,
    ):
        self.pruning_schedule = pruning_schedule
        self.block_size = _pair(block_size, "block_size")
        self.block_pooling_type = block_pooling_type
        self.sparsity_m_by_n = None
        if sparsity_m_by_n is not None:
            self.sparsity_m_by_n = _pair(sparsity_m_by_n, "sparsity_m_by_n")
        if not isinstance(pruning_schedule, PruningSchedule):
            raise TypeError(
                "pruning_schedule must be a keras_dst.tfmot.PruningSchedule, such as "
                f"ConstantSparsity(0.5, 0). Received: {pruning_schedule!r}"
            )
        if block_pooling_type not in ("AVG", "MAX"):
            raise ValueError(
                f"block_pooling_type must be 'AVG' or 'MAX'. Received: {block_pooling_type!r}"
            )
        if self.sparsity_m_by_n and self.sparsity_m_by_n[0] >= self.sparsity_m_by_n[1]:
            raise ValueError(
                "sparsity_m_by_n=(m, n) sets m of every n consecutive inputs to zero. Expected "
                f"m < n. Received: {sparsity_m_by_n!r}"
            )

    @property
    def needs_driver(self):
        return True

    def applies_to(self, layout):
        return bool(layout.inputs)  # Depthwise kernels have no input axis, so tfmot skips them.

    def check(self, shape, layout):
        for name, ranks in (("block_size", (2,)), ("sparsity_m_by_n", (2, 4))):
            value = getattr(self, name)
            if value not in (None, (1, 1)) and len(shape) not in ranks:
                raise ValueError(
                    f"{name}={value} needs weights with {' or '.join(map(str, ranks))} axes. "
                    f"Received: a weight of shape {tuple(shape)}"
                )

    def build(self, layer, name, variable, layout):
        self.check(variable.shape, layout)
        return super().build(layer, name, variable, layout)

    def apply(self, w, state, layout):
        # The forward pass uses the masked weight, but every entry of `w` gets a gradient, also if
        # it is pruned.
        return w - ops.stop_gradient(ops.where(self.mask(w, state), 0, w))

    def is_update(self, step: int) -> bool:
        """Return whether the schedule updates masks before the given step. Steps count from 1."""
        return step == 1 if self.sparsity_m_by_n else bool(self.pruning_schedule(step)[0])

    def new_mask(self, w: np.ndarray, step: int) -> np.ndarray:
        """Return the new mask of a weight at the given step."""
        if self.sparsity_m_by_n:
            zeros, group = self.sparsity_m_by_n
            magnitudes = ops.abs(ops.convert_to_tensor(w))
            return ops.convert_to_numpy(masks.n_of_m(magnitudes, group - zeros, group))
        sparsity = float(self.pruning_schedule(step)[1])
        check_sparsity(sparsity, f"the sparsity of {self.pruning_schedule!r} at step {step}")
        if self.block_size == (1, 1):
            return magnitude_mask(w, sparsity)
        return block_mask(w, sparsity, self.block_size, self.block_pooling_type)


def _pair(value, name) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(is_integer(n, minimum=1) for n in pair):
        raise ValueError(f"{name} must be a pair of whole numbers >= 1. Received: {value!r}")
    return int(pair[0]), int(pair[1])
