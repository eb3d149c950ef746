"""Sparsity schedules: functions from the finished fraction of training to a sparsity."""

import math
from collections.abc import Callable

import keras
import numpy as np

from keras_dst._utils.config import Configurable
from keras_dst._utils.validation import is_integer, is_number

__all__ = ["Constant", "Cubic", "Geometric", "Schedule", "Sigmoid"]


@keras.saving.register_keras_serializable("keras_dst")
class Schedule(Configurable):
    """Base class of all schedules: pure functions from a fraction of training to a sparsity.

    A subclass overrides `curve`, which maps progress in [0, 1] to a value in [0, 1]. If `curve`
    returns 0, the sparsity is `initial_sparsity`. If `curve` returns 1, the sparsity is the final
    `sparsity`.

    Args:
        sparsity: Final fraction of zeros, in [0, 1).
        initial_sparsity: Sparsity before the schedule begins, in [0, sparsity]. Defaults to 0.
        begin: Fraction of training, in [0, 1], after which the sparsity begins to change. Defaults
            to None, which means the beginning of training (0).
        end: Fraction of training, in [0, 1], after which the sparsity is final. Defaults to None,
            which means three quarters of training (0.75).
        begin_step: Step after which the sparsity begins to change. A custom loop without the
            `SparseTraining` callback needs `begin_step` and `end_step`, which cannot be combined
            with `begin` and `end`. Defaults to None.
        end_step: Step after which the sparsity is final. Defaults to None.

    Raises:
        ValueError: If a sparsity is outside [0, 1), if the schedule ends before it begins, or if
            both fractions and steps are given.
    """

    # Fraction of training after which the sparsity is final, if `end` is None.
    _default_end = 0.75

    def __init__(
        self,
        sparsity: float,
        initial_sparsity: float = 0.0,
        begin: float | None = None,
        end: float | None = None,
        begin_step: int | None = None,
        end_step: int | None = None,
    ):
        check_sparsity(sparsity)
        check_sparsity(initial_sparsity, "initial_sparsity")
        if initial_sparsity > sparsity:
            raise ValueError(
                f"initial_sparsity must not exceed sparsity={sparsity}. "
                f"Received: initial_sparsity={initial_sparsity}. Pass a smaller initial_sparsity."
            )
        self.begin, self.end = begin, end
        first, last = self._fractions
        if not (is_number(first) and is_number(last) and 0 <= first <= last <= 1):
            raise ValueError(
                "begin and end are fractions of training, 0 <= begin <= end <= 1. Received: "
                f"begin={first}, end={last}. Pass begin_step and end_step for numbers of steps."
            )
        steps = (begin_step, end_step)
        if (begin, end) != (None, None) and steps != (None, None):
            raise ValueError(
                "Expected either begin and end (fractions of training) or begin_step and "
                f"end_step (steps). Received: begin={begin}, end={end}, begin_step={begin_step}, "
                f"end_step={end_step}. Pass only fractions or only steps."
            )
        if (begin_step is None) != (end_step is None):
            raise ValueError(
                f"Expected begin_step and end_step together. Received: begin_step={begin_step}, "
                f"end_step={end_step}. Pass both arguments or neither."
            )
        if begin_step is not None and end_step is not None:
            if not (is_integer(begin_step, minimum=0) and is_integer(end_step, begin_step)):
                raise ValueError(
                    "Expected whole numbers 0 <= begin_step <= end_step. "
                    f"Received: begin_step={begin_step!r}, end_step={end_step!r}"
                )
            begin_step, end_step = int(begin_step), int(end_step)
        self.sparsity = sparsity
        self.initial_sparsity = initial_sparsity
        self.begin_step, self.end_step = begin_step, end_step

    @classmethod
    def from_config(cls, config):
        # Configs from earlier versions may contain both fractions and steps, because the fractions
        # then had default numbers instead of None.
        if config.get("begin_step") is not None:
            config = {name: v for name, v in config.items() if name not in ("begin", "end")}
        return super().from_config(config)

    @property
    def _fractions(self) -> tuple[float, float]:
        """Fractions of training at which the schedule begins and ends, if no steps are given."""
        first = 0.0 if self.begin is None else self.begin
        return first, self._default_end if self.end is None else self.end

    def curve(self, progress):
        """Return which fraction of the change from the initial to the final sparsity is finished.

        Args:
            progress: A number or an array, from 0 (beginning of the schedule) to 1 (end of the
                schedule).
        """
        raise NotImplementedError

    def _at_progress(self, progress):
        done = self.curve(np.clip(progress, 0.0, 1.0))
        value = self.initial_sparsity + (self.sparsity - self.initial_sparsity) * done
        return float(value) if np.ndim(value) == 0 else value

    def __call__(self, fraction):
        """Return the sparsity after a fraction of training, a number or an array in [0, 1]."""
        first, last = self._fractions
        span = max(last - first, np.finfo("float64").eps)
        return self._at_progress((np.asarray(fraction, "float64") - first) / span)

    @property
    def in_steps(self) -> bool:
        """True if the schedule is given in steps, False if it is given in fractions of training."""
        return self.begin_step is not None

    def span(self, total_steps: int | None) -> tuple[int, int]:
        """Return the first and the last step at which the sparsity changes.

        Args:
            total_steps: Number of steps in the training run, or None if the number is unknown.

        Raises:
            ValueError: If the schedule is given in fractions of training, and `total_steps` is
                None.
        """
        if self.begin_step is not None and self.end_step is not None:
            return self.begin_step, self.end_step
        if total_steps is None:
            raise ValueError(
                f"{self!r} is given in fractions of training, but the length of training is "
                "unknown here. Fit with callbacks=[keras_dst.callbacks.SparseTraining()], or "
                "pass begin_step and end_step."
            )
        first, last = self._fractions
        return math.floor(first * total_steps), math.floor(last * total_steps)

    @property
    def first_sparsity(self) -> float:
        """Sparsity before the first training step."""
        return self.at(0) if self.in_steps else self(0.0)

    def jumps(self, total_steps: int | None) -> list[int]:
        """Return the steps at which the sparsity jumps.

        For a schedule without jumps, the returned list is empty.
        """
        return []

    def at(self, step: int, total_steps: int | None = None) -> float:
        """Return the sparsity after `step` steps of a training run with `total_steps` steps."""
        first, last = self.span(total_steps)
        if step >= last:
            return self._at_progress(1.0)
        return self._at_progress((step - first) / max(last - first, 1))


@keras.saving.register_keras_serializable("keras_dst")
class Constant(Schedule):
    """Schedule that jumps to the final sparsity in a single step.

    Args:
        sparsity: Fraction of zeros, in [0, 1).
        begin: Fraction of training after which the weights are pruned. Defaults to None, which
            means the beginning of training (0).
        begin_step: Step after which the weights are pruned. `begin_step` cannot be combined with
            `begin`. Defaults to None.

    Example:
        >>> keras_dst.schedules.Constant(0.9)(0.3)
        0.9
    """

    _default_end = 0.0

    def __init__(self, sparsity, begin=None, begin_step=None):
        super().__init__(sparsity, 0.0, begin, begin, begin_step, begin_step)

    def curve(self, progress):
        return np.ones_like(progress)

    def _at_progress(self, progress):
        # `begin` and `end` are equal, because the sparsity jumps from 0 to its final value.
        value = np.where(np.asarray(progress) >= 0, self.sparsity, 0.0)
        return float(value) if np.ndim(value) == 0 else value


@keras.saving.register_keras_serializable("keras_dst")
class Cubic(Schedule):
    """Schedule that prunes fast at first and slowly at the end.

    The sparsity is `s_f + (s_i - s_f)(1 - progress)**3`, from the initial sparsity `s_i` to the
    final sparsity `s_f`.

    Example:
        >>> keras_dst.schedules.Cubic(0.8, end=1.0)(0.5)
        0.7

    Source: arXiv 1710.01878, equation 1.
    """

    def curve(self, progress):
        return 1.0 - (1.0 - progress) ** 3


@keras.saving.register_keras_serializable("keras_dst")
class Geometric(Schedule):
    """Schedule with exponential decay: the density falls by the same factor in equal time spans.

    Args:
        rate: Fraction of the kept weights that are pruned when the sparsity jumps, in (0, 1). Jumps
            are equally spaced. The last jump is smaller if a full jump would exceed the target
            sparsity. Defaults to None, which means that the density falls smoothly, without jumps.

    Example:
        >>> keras_dst.schedules.Geometric(0.75, end=1.0)(0.5)
        0.5

    Source: arXiv 2009.02594, section 3.
    """

    def __init__(
        self,
        sparsity,
        initial_sparsity=0.0,
        begin=None,
        end=None,
        begin_step=None,
        end_step=None,
        rate=None,
    ):
        super().__init__(sparsity, initial_sparsity, begin, end, begin_step, end_step)
        if rate is not None and not (is_number(rate) and 0 < rate < 1):
            raise ValueError(f"rate must be a number in (0, 1). Received: rate={rate!r}")
        self.rate = rate

    def curve(self, progress):
        progress = np.asarray(progress)
        left = (1.0 - self.sparsity) / (1.0 - self.initial_sparsity)
        if left == 1.0:
            return progress
        if self.rate is None:
            return (1.0 - left**progress) / (1.0 - left)
        # The jumps of the sparsity are equally spaced. The last jump is at the end of the schedule,
        # and no jump is at the beginning of the schedule.
        done = np.floor(progress * self.jump_count + 1e-9)
        density = np.where(done < self.jump_count, (1.0 - self.rate) ** done, left)
        return (1.0 - density) / (1.0 - left)

    @property
    def jump_count(self) -> int:
        """Number of steps at which the sparsity jumps, or 0 if `rate` is None."""
        if self.rate is None:
            return 0
        left = (1.0 - self.sparsity) / (1.0 - self.initial_sparsity)
        return max(1, math.ceil(math.log(left) / math.log(1.0 - self.rate) - 1e-9))

    def jumps(self, total_steps):
        if self.rate is None:
            return []
        first, last = self.span(total_steps)
        interval = (last - first) / self.jump_count
        return [first + math.ceil(interval * i - 1e-9) for i in range(1, self.jump_count + 1)]


@keras.saving.register_keras_serializable("keras_dst")
class Sigmoid(Schedule):
    """Schedule along a logistic curve: slow at the beginning and at the end.

    The paper's curve `sigmoid(steepness * (progress - 1/2))` is stretched so that it begins at
    exactly 0 and ends at exactly 1. By default, the sparsity is final at the end of training
    (`end=1`).

    Args:
        steepness: Steepness of the curve: the paper's `beta` times its number of epochs. Defaults
            to 20.

    Example:
        >>> keras_dst.schedules.Sigmoid(0.9)(0.5)
        0.45

    Source: arXiv 2201.12826, equation 9.
    """

    _default_end = 1.0

    def __init__(
        self,
        sparsity,
        initial_sparsity=0.0,
        begin=None,
        end=None,
        begin_step=None,
        end_step=None,
        steepness=20.0,
    ):
        super().__init__(sparsity, initial_sparsity, begin, end, begin_step, end_step)
        self.steepness = steepness
        if not (is_number(steepness) and steepness > 0):
            raise ValueError(f"steepness must be a number > 0. Received: {steepness!r}")

    def curve(self, progress):
        curve = np.tanh(self.steepness / 2 * (np.asarray(progress) - 0.5))
        return 0.5 + 0.5 * curve / np.tanh(self.steepness / 4)


def as_schedule(sparsity, ramp: Callable[[float], Schedule]) -> Schedule:
    """Convert the `sparsity` argument of a method to a `Schedule`.

    Args:
        sparsity: A number in [0, 1), or a `Schedule`, which is returned unchanged.
        ramp: Function that takes the final sparsity and returns the method's default schedule.

    Raises:
        ValueError: If `sparsity` is neither a number in [0, 1) nor a `Schedule`.

    Example:
        >>> keras_dst.schedules.as_schedule(0.9, keras_dst.schedules.Cubic)
        Cubic(sparsity=0.9)
    """
    if isinstance(sparsity, Schedule):
        return sparsity
    check_sparsity(sparsity, alternative=", or a Schedule such as schedules.Cubic(0.9)")
    return ramp(sparsity)


def check_sparsity(value, name: str = "sparsity", alternative: str = "") -> None:
    """Raise ValueError unless `value` is a Python number in [0, 1).

    Args:
        value: Argument to check. Booleans are not accepted.
        name: Name of the argument for the error message.
        alternative: Text about other allowed values, which is added to the error message. Defaults
            to an empty text.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(
            f"{name} is the fraction of zeros, a Python number in [0, 1) such as 0.9 for 90 %"
            f"{alternative}. Received: {name}={value!r}"
        )
