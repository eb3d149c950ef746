"""SET: sparse evolutionary training (arXiv 1707.04780), sparse from the first step.

Every `frequency` steps, SET drops a fraction of the kept weights in each weight tensor, namely the
weights with the smallest magnitudes. SET then grows the same number of weights at random positions.
Grown weights start at 0, and their momentum is reset to 0. The drop fraction decreases during
training:

```text
drop(t) = drop_fraction / 2 (1 + cos(pi t / t_stop))
```

Deviation from the paper: the drop fraction is not constant. The drop fraction decreases along a
cosine curve until three quarters of training. The cosine curve and the Erdős-Rényi-Kernel densities
come from the RigL paper (arXiv 1911.11134). Extension of the paper: if channels are coupled, the
weights of a grown channel start at random values. A channel whose weights are all 0 may get no
gradient, for example if a ReLU follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

from keras_dst._backend import numbers, random
from keras_dst._backend.jit import where_in_place
from keras_dst._utils.validation import check_integer, is_number
from keras_dst.masks import Pattern
from keras_dst.methods import channels
from keras_dst.methods.base import UpdateMethod
from keras_dst.methods.channels import ChannelNames
from keras_dst.schedules import Constant, check_sparsity

# With `"uniform"`, the first weight tensor stays dense if its size is at most a quarter of the
# number of weights that the model keeps.
_FIRST = 4


@keras.saving.register_keras_serializable("keras_dst")
class SET(UpdateMethod):
    """Dynamic sparse training that drops small weights and grows other weights at random.

    The model is sparse from the first step. The initial values of the kept weights are chosen for a
    dense model, and are too small for a sparse model. Deep models without normalization may not
    learn at extreme sparsities. Add batch normalization, or use a method that starts dense.

    Args:
        sparsity: Fraction of zeros, a number in [0, 1). The sparsity is constant during training.
        allocation: Distribution of the sparsity over the layers, see `keras_dst.allocation`:
            `"erk"`, `"uniform"`, or a dict that maps weight names or regular expressions to
            sparsities. With `"uniform"`, the first weight tensor stays dense if its size is at most
            a quarter of the number of weights that the model keeps. All other weight tensors are
            then pruned more, so that the total sparsity does not change. Defaults to `"erk"`.
        pattern: Which weights are pruned together, see `masks.Pattern`. `"unstructured"` prunes
            single weights. `"1x4"` prunes blocks of 1 output and 4 inputs. `"channel"` prunes
            output channels. Defaults to `"unstructured"`.
        drop_fraction: Fraction of the kept weights that the first update replaces, in [0, 1). The
            fraction decreases to 0 along a cosine curve. Defaults to 0.3.
        stop: Fraction of training after which the masks do not change. Defaults to None, which
            means three quarters of training (0.75).
        stop_step: Step after which the masks do not change. Do not pass `stop_step` together with
            `stop`. `stop_step` is required for training without the `SparseTraining` callback.
            Defaults to None.
        frequency: Number of training steps from one mask update to the next, or `"epoch"` for one
            update per epoch. Defaults to None, which means 100 steps. In a short training run, the
            default interval is shorter, so that the masks are updated about 20 times.
        min_kept: Minimum number of weights that every layer keeps. With `pattern="channel"`,
            `min_kept` counts channels instead of weights. Defaults to None, which means a minimum
            of 1 weight or channel.
        counted_in: With `pattern="channel"`, the sparsity is the removed fraction of the
            `"channels"`, `"parameters"` or `"flops"`. Defaults to `"channels"`.
        round_to: With `pattern="channel"`, every layer keeps a multiple of `round_to` channels, see
            `Magnitude`. Defaults to 8.
        groups: Lists of layers whose channels are removed together, see `Magnitude`. Defaults to
            None.
        seed: Seed of the random numbers that choose the weights to keep. Defaults to 0.

    Raises:
        ValueError: If an argument is outside its range, if `pattern` is N:M, or if `allocation` is
            `"global"`. A global ranking is not possible before training.

    Example:
        >>> optimizer = keras_dst.SparseOptimizer("sgd", keras_dst.methods.SET(0.9))

    Source: arXiv 1707.04780, algorithm 1; arXiv 1911.11134, section 3.
    """

    grows = True

    def __init__(
        self,
        sparsity: float,
        allocation: str | Mapping[str, float] = "erk",
        pattern: str = "unstructured",
        drop_fraction: float = 0.3,
        stop: float | None = None,
        stop_step: int | None = None,
        frequency: int | str | None = None,
        min_kept: int | None = None,
        counted_in: str = "channels",
        round_to: int = 8,
        groups: ChannelNames | None = None,
        seed: int = 0,
    ):
        self.sparsity = sparsity
        self.allocation = allocation
        self.pattern = pattern
        self.drop_fraction = drop_fraction
        self.stop = stop
        self.stop_step = stop_step
        self.frequency = frequency
        self.min_kept = min_kept
        self.counted_in = counted_in
        self.round_to = round_to
        self.groups = groups
        self.seed = seed
        name = type(self).__name__
        check_sparsity(sparsity, alternative=f"; {name} keeps it constant and takes no Schedule")
        if not (is_number(drop_fraction) and 0 <= drop_fraction < 1):
            raise ValueError(f"drop_fraction must be in [0, 1). Received: {drop_fraction!r}")
        if not (is_number(self._stop) and 0 < self._stop <= 1):
            raise ValueError(
                "stop is a fraction of training, in (0, 1]. "
                f"Received: stop={stop!r}. Pass stop_step for a number of steps."
            )
        if stop_step is not None:
            self.stop_step = check_integer(stop_step, "stop_step")
            if stop is not None:
                raise ValueError(
                    f"Expected only one of stop and stop_step. Received: stop={stop!r}, "
                    f"stop_step={stop_step!r}. Pass one of them."
                )
        self.schedule = Constant(sparsity, begin_step=None if stop_step is None else 0)
        if Pattern(pattern).n_of_m:
            raise ValueError(
                f"{name} does not support N:M patterns, because a mask update would change how "
                f"many weights of a group are kept. Received: pattern={pattern!r}. Use Magnitude "
                "for N:M."
            )
        if allocation == "global":
            raise ValueError(
                f"{name} fixes the density of every layer before training, when weights cannot be "
                "ranked yet. Received: allocation='global'. Use 'erk', 'uniform' or a dict."
            )
        self._check_common()

    @classmethod
    def from_config(cls, config):
        # Configs from earlier versions may contain both `stop` and `stop_step`. In earlier
        # versions, the default of `stop` was a number instead of None.
        if config.get("stop_step") is not None:
            config = {name: value for name, value in config.items() if name != "stop"}
        return super().from_config(config)

    @property
    def _stop(self) -> float:
        """Fraction of training after which the masks do not change, if `stop_step` is None."""
        return 0.75 if self.stop is None else self.stop

    def span(self, total_steps):
        if self.stop_step is not None:
            return 0, self.stop_step
        first, _ = super().span(total_steps)
        return first, math.floor(self._stop * (total_steps or 0))

    def followers_settled(self, step, total):
        # Until the last mask update, SET may restore a pruned channel. Do not set the normalization
        # scale of a pruned channel to 0, because a restored channel would then get no gradient.
        if self.stop_step is not None:
            return step >= self.stop_step
        known = ops.cast(total, "float32")
        last = ops.floor(self._stop * known)
        return ops.logical_and(known > 0, ops.cast(step, "float32") >= last)

    def kept_counts(self, shapes, layouts, sparsity, names):
        counts = super().kept_counts(shapes, layouts, sparsity, names)
        if channels.groups_of(layouts):
            return counts
        first = math.prod(shapes[0])
        if self.allocation != "uniform" or len(shapes) == 1 or _FIRST * first > counts.sum():
            return counts
        left = sum(math.prod(shape) for shape in shapes[1:])
        density = (counts.sum() - first) / left
        others = super().kept_counts(shapes[1:], layouts[1:], 1 - density, names[1:])
        return np.array([first, *others])

    def growth_scores(self, stay, began, states, now):
        """Return scores that rank the kept weights first, and all other weights after them.

        Args:
            stay: Boolean masks of the kept weights that this mask update does not drop.
            began: One boolean scalar per weight tensor, which is false until the first mask update.
            states: One dict per weight, with the mask and other tensors that SET stores for the
                weight.
            now: Step, training progress and target sparsity of the mask update.
        """
        drawn = (
            random.uniform(s["mask"].shape, self.seed, now.step, i) for i, s in enumerate(states)
        )
        return rank_first(stay, drawn)

    def update(self, weights, states, layouts, kept, now):
        # Before the first update, every mask is all ones. The first update draws a random mask, and
        # the kept weights retain their initial values.
        began = [ops.logical_not(ops.all(s["mask"])) for s in states]
        drop = ops.cast(ops.round(self._drop(now) * ops.cast(kept, "float32")), "int32")
        # Compute the magnitudes in a generator, so that this function keeps no reference to them
        # and `rank` can free their memory. The magnitudes need as much memory as the whole model.
        magnitudes = (ops.abs(ops.cast(w, "float32")) for w in weights)
        magnitudes = (
            where_in_place(s["mask"], magnitude, -1.0, out=magnitude)
            for magnitude, s in zip(magnitudes, states)
        )
        stay = self.rank(list(magnitudes), layouts, kept - drop)
        stay = [ops.logical_and(b, mask) for b, mask in zip(began, stay)]
        new = self.rank(self.growth_scores(stay, began, states, now), layouts, kept)
        # A weight has grown if the new mask keeps the weight, but the mask in `stay` does not.
        # In the first update, `began` and all masks in `stay` are False, so no weight counts as
        # grown.
        changes = [
            {"mask": m, "grown": ops.logical_and(m, ops.not_equal(s, b))}
            for m, s, b in zip(new, stay, began)
        ]
        if channels.groups_of(layouts):
            for i, (w, s, change) in enumerate(zip(weights, states, changes)):
                change["start"] = self._start(w, s["mask"], now, len(weights) + i)
        return changes

    def _start(self, w, mask, now, stream):
        """Return random weights that have the same root mean square as the kept weights."""
        kept = ops.cast(mask, "float32")
        square = ops.sum(kept * ops.square(ops.cast(w, "float32")))
        size = ops.sqrt(square / numbers.at_least(ops.sum(kept), 1.0))
        drawn = random.uniform(w.shape, self.seed, now.step, stream)
        return (drawn - 0.5) * (math.sqrt(12) * size)

    def _drop(self, now):
        """Return the fraction of the kept weights to replace in a mask update."""
        if self.stop_step is not None:
            done = ops.cast(now.step, "float32") / self.stop_step
        else:
            done = now.progress / self._stop
        return self.drop_fraction / 2 * (1 + ops.cos(math.pi * numbers.at_most(done, 1.0)))


def rank_first(masks, scores):
    """Return float32 scores in which all weights that the masks keep rank above all other weights.

    On torch, the returned scores overwrite the scores that the caller passes.
    """
    scores = (ops.cast(s, "float32") for s in scores)
    return [
        where_in_place(mask, ops.max(score) + 1.0, score, out=score)
        for mask, score in zip(masks, scores)
    ]
