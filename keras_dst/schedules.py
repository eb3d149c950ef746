"""Schedules: how sparsity grows, from the fraction of training that is done to a sparsity."""

import math

import keras
import numpy as np

from keras_dst._utils.config import Configurable
from keras_dst._utils.validation import is_integer

__all__ = ["Constant", "Cubic", "Geometric", "Schedule", "Sigmoid"]


@keras.saving.register_keras_serializable("keras_dst")
class Schedule(Configurable):
    """Base of all schedules: a pure function from a fraction of training to a sparsity.

    Subclasses override `shape`, which maps progress in [0, 1] to the part of the way from
    `initial_sparsity` to `sparsity` that is done.

    Args:
        sparsity: final fraction of zeros, in [0, 1).
        initial_sparsity: sparsity at the beginning, in [0, sparsity].
        begin, end: fractions of training, in [0, 1], between which sparsity changes.
        begin_step, end_step: the same in training steps, instead of `begin` and `end`. They are
            what a custom loop without a `SparseTraining` callback needs.

    Raises:
        ValueError: for a sparsity outside [0, 1), or a beginning that is not before the end.
    """

    def __init__(
        self,
        sparsity: float,
        initial_sparsity: float = 0.0,
        begin: float = 0.0,
        end: float = 0.75,
        begin_step: int | None = None,
        end_step: int | None = None,
    ):
        check_sparsity(sparsity)
        check_sparsity(initial_sparsity, "initial_sparsity")
        if initial_sparsity > sparsity:
            raise ValueError(
                f"initial_sparsity must not exceed sparsity={sparsity}. "
                f"Received: initial_sparsity={initial_sparsity}"
            )
        if not 0 <= begin <= end <= 1:
            raise ValueError(
                "begin and end are fractions of training, 0 <= begin <= end <= 1 (give begin_step "
                f"and end_step for step numbers). Received: begin={begin}, end={end}"
            )
        if (begin_step is None) != (end_step is None):
            raise ValueError(
                "begin_step and end_step go together. "
                f"Received: begin_step={begin_step}, end_step={end_step}"
            )
        if (
            begin_step is not None
            and end_step is not None
            and not (is_integer(begin_step, minimum=0) and is_integer(end_step, begin_step))
        ):
            raise ValueError(
                "Expected whole numbers 0 <= begin_step <= end_step. "
                f"Received: begin_step={begin_step}, end_step={end_step}"
            )
        self.sparsity = sparsity
        self.initial_sparsity = initial_sparsity
        self.begin, self.end = begin, end
        self.begin_step, self.end_step = begin_step, end_step

    def shape(self, progress):
        raise NotImplementedError

    def _at_progress(self, progress):
        done = self.shape(np.clip(progress, 0.0, 1.0))
        value = self.initial_sparsity + (self.sparsity - self.initial_sparsity) * done
        return float(value) if np.ndim(value) == 0 else value

    def __call__(self, fraction):
        """Sparsity when this fraction of training, a number or an array in [0, 1], is done."""
        span = max(self.end - self.begin, np.finfo("float64").eps)
        return self._at_progress((np.asarray(fraction, "float64") - self.begin) / span)

    @property
    def in_steps(self) -> bool:
        """Whether the schedule was given in steps, and so needs no length of training."""
        return self.begin_step is not None

    def span(self, total_steps: int | None) -> tuple[int, int]:
        """First and last step at which sparsity changes, in a training of this many steps."""
        if self.begin_step is not None and self.end_step is not None:
            return self.begin_step, self.end_step
        if total_steps is None:
            raise ValueError(
                f"{self!r} is given in fractions of training, whose length is not known here. Fit "
                "with the SparseTraining callback, "
                "callbacks=[keras_dst.callbacks.SparseTraining()], or give begin_step and end_step."
            )
        return math.floor(self.begin * total_steps), math.floor(self.end * total_steps)

    def jumps(self, total_steps: int | None) -> list[int]:
        """Steps at which sparsity jumps; none where it grows smoothly."""
        return []

    def at(self, step: int, total_steps: int | None = None) -> float:
        """Sparsity after this many steps of a training of `total_steps`."""
        first, last = self.span(total_steps)
        if step >= last:
            return self._at_progress(1.0)
        return self._at_progress((step - first) / max(last - first, 1))


@keras.saving.register_keras_serializable("keras_dst")
class Constant(Schedule):
    """The final sparsity from the beginning on.

    Example:
        >>> keras_dst.schedules.Constant(0.9)(0.3)
        0.9
    """

    def __init__(self, sparsity, begin=0.0, begin_step=None):
        super().__init__(sparsity, 0.0, begin, begin, begin_step, begin_step)

    def shape(self, progress):
        return np.ones_like(progress)

    def _at_progress(self, progress):
        # There is no way to go between begin and end: before it nothing, from it on everything.
        value = np.where(np.asarray(progress) >= 0, self.sparsity, 0.0)
        return float(value) if np.ndim(value) == 0 else value


@keras.saving.register_keras_serializable("keras_dst")
class Cubic(Schedule):
    """Fast at first, slow at the end: `s_f + (s_i - s_f)(1 - progress)**3`.

    Example:
        >>> keras_dst.schedules.Cubic(0.8, end=1.0)(0.5)
        0.7

    Source: arXiv 1710.01878, equation 1.
    """

    def shape(self, progress):
        return 1.0 - (1.0 - progress) ** 3


@keras.saving.register_keras_serializable("keras_dst")
class Geometric(Schedule):
    """Density falls by the same factor in equal times, so each update removes an equal share.

    Args:
        rate: where it is given, sparsity grows in equally spaced jumps, each of which removes this
            fraction of the weights still kept; the last removes what the target leaves. Defaults
            to None: smooth.

    Example:
        >>> keras_dst.schedules.Geometric(0.75, end=1.0)(0.5)
        0.5

    Source: arXiv 2009.02594, section 3.
    """

    def __init__(
        self,
        sparsity,
        initial_sparsity=0.0,
        begin=0.0,
        end=0.75,
        begin_step=None,
        end_step=None,
        rate=None,
    ):
        super().__init__(sparsity, initial_sparsity, begin, end, begin_step, end_step)
        if rate is not None and not 0 < rate < 1:
            raise ValueError(f"rate must be a number in (0, 1). Received: rate={rate!r}")
        self.rate = rate

    def shape(self, progress):
        progress = np.asarray(progress)
        left = (1.0 - self.sparsity) / (1.0 - self.initial_sparsity)
        if left == 1.0:
            return progress
        if self.rate is None:
            return (1.0 - left**progress) / (1.0 - left)
        # The first jump comes a step after the beginning, the last one at the end.
        done = np.floor(progress * self.number + 1e-9)
        density = np.where(done < self.number, (1.0 - self.rate) ** done, left)
        return (1.0 - density) / (1.0 - left)

    @property
    def number(self) -> int:
        """How many jumps there are, with a rate."""
        left = (1.0 - self.sparsity) / (1.0 - self.initial_sparsity)
        return max(1, math.ceil(math.log(left) / math.log(1.0 - self.rate) - 1e-9))

    def jumps(self, total_steps):
        if self.rate is None:
            return []
        first, last = self.span(total_steps)
        way = (last - first) / self.number
        return [first + math.ceil(way * i - 1e-9) for i in range(1, self.number + 1)]


@keras.saving.register_keras_serializable("keras_dst")
class Sigmoid(Schedule):
    """Slow, fast, slow: a logistic curve around the middle between begin and end.

    The paper's curve `sigmoid(steepness * (progress - 1/2))` is stretched to begin at 0 and end
    at 1 exactly.

    Args:
        steepness: slope parameter over the whole way; the paper's `beta` times its epochs.

    Example:
        >>> keras_dst.schedules.Sigmoid(0.9)(0.5)
        0.45

    Source: arXiv 2201.12826, equation 9.
    """

    def __init__(
        self,
        sparsity,
        initial_sparsity=0.0,
        begin=0.0,
        end=1.0,
        begin_step=None,
        end_step=None,
        steepness=20.0,
    ):
        super().__init__(sparsity, initial_sparsity, begin, end, begin_step, end_step)
        self.steepness = steepness

    def shape(self, progress):
        curve = np.tanh(self.steepness / 2 * (np.asarray(progress) - 0.5))
        return 0.5 + 0.5 * curve / np.tanh(self.steepness / 4)


def check_sparsity(value, name: str = "sparsity") -> None:
    """Raise unless `value` is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(
            f"{name} is the fraction of zeros, a Python number in [0, 1) such as 0.9 for 90 %. "
            f"Received: {name}={value!r}"
        )
