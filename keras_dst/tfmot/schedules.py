"""Pruning schedules of tfmot, which define the steps and the sparsities of mask updates."""

from __future__ import annotations

import keras
import numpy as np

from keras_dst._utils.config import Configurable
from keras_dst._utils.validation import check_number, is_integer
from keras_dst.schedules import check_sparsity


class PruningSchedule(Configurable):
    """Base class of pruning schedules, including custom schedules.

    A call `schedule(step)` returns a pair `(update, sparsity)`. `update` states whether the masks
    are updated before the step. `sparsity` is the fraction of zeros in the new masks. Steps count
    from 1.

    To save a model with a custom schedule, store every constructor argument in an attribute of the
    same name. Decorate the class with `@keras.saving.register_keras_serializable()`.
    """

    def __call__(self, step: int) -> tuple[bool, float]:
        raise NotImplementedError

    def _should_prune_in_step(self, step, begin_step, end_step, frequency) -> bool:
        in_range = begin_step <= step and (end_step < 0 or step <= end_step)
        return in_range and (step - begin_step) % frequency == 0

    def _set_steps(self, begin_step, end_step, frequency) -> None:
        """Store the arguments as Python integers, or raise ValueError if they are invalid."""
        steps = {"begin_step": begin_step, "end_step": end_step, "frequency": frequency}
        is_range = (
            is_integer(begin_step, minimum=0)
            and is_integer(end_step)
            and (end_step == -1 or begin_step <= end_step)
        )
        if not is_range:
            raise ValueError(
                "Expected whole numbers 0 <= begin_step <= end_step. ConstantSparsity also takes "
                f"end_step=-1, which means no end. Received: {steps}"
            )
        if not is_integer(frequency, minimum=1):
            raise ValueError(f"frequency must be a whole number of steps >= 1. Received: {steps}")
        self.begin_step, self.end_step = int(begin_step), int(end_step)
        self.frequency = int(frequency)


@keras.saving.register_keras_serializable("keras_dst.tfmot")
class ConstantSparsity(PruningSchedule):
    """Schedule with the same sparsity at every update.

    Args:
        target_sparsity: Fraction of zeros, in [0, 1).
        begin_step: Step of the first update. If `begin_step` is 0, the first update is at step
            `frequency`, because steps count from 1.
        end_step: Last step at which masks may be updated. Defaults to -1, which sets no last step.
        frequency: Number of steps from one update to the next. Defaults to 100.

    Example:
        >>> keras_dst.tfmot.ConstantSparsity(0.5, begin_step=2, frequency=10)(12)
        (True, 0.5)
    """

    def __init__(self, target_sparsity, begin_step, end_step=-1, frequency=100):
        self.target_sparsity = target_sparsity
        check_sparsity(target_sparsity, "target_sparsity")
        self._set_steps(begin_step, end_step, frequency)

    def __call__(self, step):
        update = self._should_prune_in_step(step, self.begin_step, self.end_step, self.frequency)
        return update, self.target_sparsity


@keras.saving.register_keras_serializable("keras_dst.tfmot")
class PolynomialDecay(PruningSchedule):
    """Schedule from an initial to a final sparsity: `s_f + (s_i - s_f) (1 - progress)**power`.

    Args:
        initial_sparsity: Fraction of zeros at `begin_step`, in [0, 1).
        final_sparsity: Fraction of zeros at `end_step`, in [0, 1).
        begin_step: Step of the first update.
        end_step: Step at which the final sparsity is reached. No mask is updated after this step.
        power: Exponent of the polynomial. Defaults to 3.
        frequency: Number of steps from one update to the next. Defaults to 100.

    Example:
        >>> keras_dst.tfmot.PolynomialDecay(0.0, 0.8, 0, 200)(100)
        (True, 0.7)

    Source: arXiv 1710.01878, equation 1.
    """

    def __init__(
        self, initial_sparsity, final_sparsity, begin_step, end_step, power=3, frequency=100
    ):
        self.initial_sparsity, self.final_sparsity = initial_sparsity, final_sparsity
        check_number(power, "power")
        self.power = power
        check_sparsity(initial_sparsity, "initial_sparsity")
        check_sparsity(final_sparsity, "final_sparsity")
        self._set_steps(begin_step, end_step, frequency)
        if end_step == -1:
            raise ValueError(
                "PolynomialDecay needs an end_step >= begin_step, at which final_sparsity is "
                "reached. Received: end_step=-1"
            )

    def __call__(self, step):
        update = self._should_prune_in_step(step, self.begin_step, self.end_step, self.frequency)
        length = max(self.end_step - self.begin_step, 1)
        # Compute in float32, as tfmot does, because the rounding can change the number of kept
        # weights.
        progress = np.clip(np.float32(step - self.begin_step) / np.float32(length), 0, 1)
        difference = np.float32(self.initial_sparsity - self.final_sparsity)
        decay = (np.float32(1) - progress) ** np.float32(self.power)
        return update, float(difference * decay + np.float32(self.final_sparsity))
