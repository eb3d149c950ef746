"""FlipOut: prune the weights whose sign keeps flipping (arXiv 2009.02594).

```text
score = |w|^p / (flips + 1)        flips: optimizer steps that changed sign(w)
grad <- grad + lambda ||grad||_2 / sqrt(n) N(0, 1)        for every tensor, n its size
```

Pruned weights stay pruned, and pruning events are equally spaced. Each pruning event ranks the
weights of all tensors together, and prunes the fraction `rate` of the kept weights with the lowest
scores. The last event prunes only as many weights as the target requires. The `n` pruning events
take place after the fractions 1/(n+1), ..., n/(n+1) of training, as in the training runs of the
paper.

Deviations from the paper: the normal random numbers of the noise are read from a precomputed table
(`random.normal`). A training run of fewer than 20 epochs prunes in small steps along a cubic ramp.
If half of the weights were pruned at once, the network could not recover within a few epochs. In a
training run of fewer than 20,000 steps, the noise is multiplied by a factor below 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import keras
from keras import ops

from keras_dst._backend import numbers, random
from keras_dst._backend.jit import divide_in_place, sum_of_squares, where_in_place
from keras_dst._utils.validation import is_number
from keras_dst.masks import masked
from keras_dst.methods.base import SHORT, UpdateMethod, length_factor
from keras_dst.methods.channels import ChannelNames
from keras_dst.schedules import Cubic, Geometric, Schedule, as_schedule


@keras.saving.register_keras_serializable("keras_dst")
class FlipOut(UpdateMethod):
    """Pruning of small weights whose sign keeps flipping, in a few pruning events.

    Args:
        sparsity: Final fraction of zeros, a number in [0, 1) or a `Schedule`. With a number, the
            sparsity grows in equally spaced pruning events. In a training run of fewer than 20
            epochs, the sparsity grows along a cubic ramp over the first three quarters, unless
            `rate` is passed.
        power: Exponent p of the magnitude. Defaults to 2.
        noise: Factor lambda of the gradient noise. A factor of 0 adds no noise. Defaults to None,
            which means a factor of 1, as in the paper, if training has at least 20,000 steps. In a
            shorter training run, the default factor is proportional to the number of steps, but at
            least 0.1.
        rate: Fraction of the kept weights that a pruning event removes, in (0, 1). Do not pass
            `rate` with a `Schedule`, which has its own pruning events. Defaults to None, which
            means half of the kept weights (0.5), as in the paper.
        allocation: Distribution of the sparsity over the layers, see `keras_dst.allocation`.
            `"global"` ranks the weights of all layers together, as in the paper. `allocation` can
            also be `"uniform"`, `"erk"`, or a dict that maps weight names or regular expressions to
            sparsities. Defaults to `"global"`.
        pattern: Which weights are pruned together, see `masks.Pattern`. `"unstructured"` prunes
            single weights, as in the paper. `"1x4"` prunes blocks of 1 output and 4 inputs. `"2:4"`
            keeps 2 of every 4 weights. `"channel"` prunes output channels. The score of a block or
            channel is the mean score of its weights. Defaults to `"unstructured"`.
        frequency: Number of training steps from one mask update to the next, or `"epoch"` for one
            update per epoch. Defaults to None, which means 100 steps. In a short training run, the
            default interval is shorter, so that the masks are updated about 20 times.
        min_kept: Minimum number of weights that every layer keeps. With `pattern="channel"`,
            `min_kept` counts channels instead of weights. Defaults to None, which means a minimum
            of 1 weight or channel. With `allocation="global"` and no coupled channels, the default
            minimum is a quarter of the weights that the layer would keep with `allocation="erk"`.
        counted_in: With `pattern="channel"`, the sparsity is the removed fraction of the
            `"channels"`, `"parameters"` or `"flops"`. Defaults to `"channels"`.
        round_to: With `pattern="channel"`, every layer keeps a multiple of `round_to` channels, see
            `Magnitude`. Defaults to 8.
        groups: Lists of layers whose channels are removed together, see `Magnitude`. Defaults to
            None.
        seed: Seed of the noise. Defaults to 0.

    Raises:
        ValueError: If an argument is outside its range, or if `rate` is passed with a `Schedule`.

    Example:
        >>> optimizer = keras_dst.SparseOptimizer("sgd", keras_dst.methods.FlipOut(0.9))

    Source: arXiv 2009.02594, equation 2 (score) and section 3.
    """

    def __init__(
        self,
        sparsity: float | Schedule,
        power: float = 2.0,
        noise: float | None = None,
        rate: float | None = None,
        allocation: str | Mapping[str, float] = "global",
        pattern: str = "unstructured",
        frequency: int | str | None = None,
        min_kept: int | None = None,
        counted_in: str = "channels",
        round_to: int = 8,
        groups: ChannelNames | None = None,
        seed: int = 0,
    ):
        self.sparsity = sparsity
        self.power = power
        self.noise = noise
        self.rate = rate
        self.allocation = allocation
        self.pattern = pattern
        self.frequency = frequency
        self.min_kept = min_kept
        self.counted_in = counted_in
        self.round_to = round_to
        self.groups = groups
        self.seed = seed
        if not (is_number(power) and power > 0):
            raise ValueError(f"power must be a number > 0. Received: {power!r}")
        if noise is not None and not (is_number(noise) and noise >= 0):
            raise ValueError(f"noise must be a number >= 0. Received: {noise!r}")
        if rate is not None and isinstance(sparsity, Schedule):
            raise ValueError(
                "rate can be used only if sparsity is a number, because a Schedule has its own "
                f"pruning events. Received: sparsity={sparsity!r}, rate={rate!r}. Pass "
                "sparsity as a number, or do not pass rate."
            )
        self.schedule = as_schedule(sparsity, self._events)
        self.reads_gradients = noise != 0
        self._check_common()

    def schedule_over(self, epochs):
        if isinstance(self.sparsity, Schedule) or self.rate is not None:
            return self.schedule
        return Cubic(self.sparsity) if epochs and epochs < SHORT else self.schedule

    def _events(self, sparsity):
        """Return the default schedule of pruning events for a final sparsity."""
        rate = 0.5 if self.rate is None else self.rate
        number = Geometric(sparsity, end=1.0, rate=rate).jump_count
        return Geometric(sparsity, end=number / (number + 1), rate=rate)

    def init(self, kernels, steps):
        # Count the sign flips in the smallest integer type in which `flips + 1` cannot overflow.
        most = 2**31 - 1 if steps is None else steps + 1
        dtype = "int32" if most >= 2**15 else "int16" if most > 255 else "uint8"
        return [{"flips": ("zeros", dtype)} for _ in kernels]

    def scores(self, weights, states):
        found = []
        for w, s in zip(weights, states):
            score = divide_in_place(self._power(w), s["flips"] + 1)
            found.append(where_in_place(s["mask"], score, -1.0, out=score))
        return found

    def _power(self, w):
        """Return |w|^p in float32. For p = 2, the function reads the weights only once."""
        w = ops.cast(w, "float32")
        return ops.square(w) if self.power == 2 else ops.abs(w) ** self.power

    def monitored(self, state):
        flips, kept = ops.convert_to_numpy(state["flips"]), ops.convert_to_numpy(state["mask"])
        return {"flips": flips[kept]}  # Omit the sign flips of pruned weights.

    def perturb(self, grads, masks, step, total):
        if self.noise == 0:
            return grads
        noise = length_factor(self.length(total)) if self.noise is None else self.noise
        known = [i for i, grad in enumerate(grads) if grad is not None]
        grads = list(grads)
        if not known:
            return grads
        shapes = [grads[i].shape for i in known]
        drawn = random.normal(shapes, self.seed, step)
        # Sums of squares overflow in float16.
        squares = ops.stack([sum_of_squares(ops.cast(grads[i], "float32")) for i in known])
        sizes = numbers.constant([math.prod(shape) for shape in shapes], "float32", squares)
        scales = noise * ops.sqrt(squares / sizes)
        for n, (i, values) in enumerate(zip(known, drawn)):
            grad, mask = grads[i], masks[i]
            added = ops.cast(values * scales[n], grad.dtype)
            grads[i] = grad + (added if mask is None else masked(added, mask))
        return grads

    def before(self, weights, grads, states):
        weights, grads, _ = super().before(weights, grads, states)
        return weights, grads, [_sign(w) for w in weights]

    def after(self, carry, weights, states):
        changes = []
        for sign, w, s in zip(carry, weights, states):
            flipped = ops.cast(ops.not_equal(_sign(w), sign), s["flips"].dtype)
            changes.append({"flips": masked(s["flips"] + flipped, s["mask"])})
        return super().after(carry, weights, states)[0], changes


def _sign(w):
    """Return the signs of a weight tensor as int8, because every step reads and writes them."""
    return ops.cast(ops.sign(w), "int8")
