"""Magnitude pruning along a gradual schedule (arXiv 1710.01878), the usual baseline.

```text
s_t = s_f + (s_i - s_f)(1 - (t - t0) / (t1 - t0))**3        score = |w|
```

Other saliency criteria are in `saliency.py`, for example LAMP and the first-order Taylor expansion.

With `revival=True`, the optimizer stores a dense copy of the weights and trains the copy with the
gradients of the masked weights. A later mask update may therefore restore pruned weights (Dynamic
Model Pruning with Feedback, arXiv 2006.07253). `masks.limit_gradient` limits the gradients of
pruned weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import keras
from keras import ops

from keras_dst._utils.validation import check_boolean
from keras_dst.masks import limit_gradient
from keras_dst.methods import saliency
from keras_dst.methods.base import State, UpdateMethod, gradient_limit
from keras_dst.methods.channels import ChannelNames
from keras_dst.schedules import Cubic, Schedule, as_schedule


@keras.saving.register_keras_serializable("keras_dst")
class Magnitude(UpdateMethod):
    """Gradual magnitude pruning: the smallest weights become 0 while the model is trained.

    Args:
        sparsity: Final fraction of zeros, a number in [0, 1) or a `Schedule`. If a number is given,
            the sparsity grows along a cubic ramp over the first three quarters of training.
        allocation: Distribution of the sparsity over the layers, see `keras_dst.allocation`.
            `"global"` ranks the weights of all layers together. `allocation` can also be
            `"uniform"`, `"erk"`, or a dict that maps weight names or regular expressions to
            sparsities. Defaults to `"global"`.
        pattern: Which weights are pruned together, see `masks.Pattern`. `"unstructured"` prunes
            single weights. `"1x4"` prunes blocks of 1 output and 4 inputs. `"2:4"` keeps 2 of every
            4 weights. `"channel"` prunes output channels. The score of a block or channel is the
            mean score of its weights. Defaults to `"unstructured"`.
        revival: If True, pruned weights are still trained, and a later mask update can restore
            them. Defaults to False.
        score: Saliency of a weight. `"magnitude"` is `|w|`. `"lamp"` is `w**2`, divided by the sum
            of the squares of all weights in the layer with a magnitude of at least `|w|`. LAMP
            scores of different layers are comparable, so the score fits `allocation="global"`.
            `"taylor"` is the moving average of `(w dL/dw)**2` over the batches. This score
            estimates how much the loss changes if the weight becomes 0. `"bn_scale"` is the
            magnitude of the scale in the normalization layer that follows the weight. `"bn_scale"`
            needs `pattern="channel"`. Weights that no normalization layer follows are ranked by
            `|w|`. Defaults to `"magnitude"`.
        frequency: Number of training steps from one mask update to the next, or `"epoch"` for one
            update per epoch. Defaults to None, which means 100 steps. In a short training run, the
            default interval is shorter, so that the masks are updated about 20 times.
        min_kept: Minimum number of weights that every layer keeps. With `pattern="channel"`,
            `min_kept` counts channels instead of weights. Defaults to None, which means a minimum
            of 1 weight or channel. With `allocation="global"` and no coupled channels, the default
            minimum is a quarter of the weights that the layer would keep with `allocation="erk"`.
        counted_in: With `pattern="channel"`, the sparsity is the removed fraction of the
            `"channels"`, `"parameters"` or `"flops"`. Defaults to `"channels"`.
        round_to: With `pattern="channel"`, every layer keeps a multiple of `round_to` channels.
            Layers with fewer than `2 * round_to` channels can keep any number of channels. Defaults
            to 8.
        groups: Layers whose channels are removed together, for `pattern="channel"` and a model with
            its own `call` method. Each group is a list of layers. A layer is given by its name, by
            its path, or by a pair: the path of one of its weights, and the channel axis of this
            weight. List the inner layers of an attention layer instead of the attention layer.
            Channels in no group are never pruned. Defaults to None, in which case the groups of
            layers are found in the graph of the model.

    Raises:
        ValueError: If an argument is outside its range, or if `score="taylor"` is combined with a
            schedule that prunes before the first step. The score `"taylor"` needs gradients, which
            do not exist before the first step.

    Example:
        >>> optimizer = keras_dst.SparseOptimizer("adam", keras_dst.methods.Magnitude(0.9))

    Source: arXiv 1710.01878 (schedule), arXiv 2006.07253 (`revival`), arXiv 2010.07611 (`"lamp"`),
    arXiv 1906.10771 (`"taylor"`) and arXiv 1708.06519 (`"bn_scale"`).
    """

    def __init__(
        self,
        sparsity: float | Schedule,
        allocation: str | Mapping[str, float] = "global",
        pattern: str = "unstructured",
        revival: bool = False,
        score: str = "magnitude",
        frequency: int | str | None = None,
        min_kept: int | None = None,
        counted_in: str = "channels",
        round_to: int = 8,
        groups: ChannelNames | None = None,
    ):
        self.sparsity = sparsity
        self.allocation = allocation
        self.pattern = pattern
        self.revival = check_boolean(revival, "revival")
        self.score = score
        self.frequency = frequency
        self.min_kept = min_kept
        self.counted_in = counted_in
        self.round_to = round_to
        self.groups = groups
        self.schedule = as_schedule(sparsity, Cubic)
        self.moves_weights = revival
        self.reads_gradients = score == "taylor" or revival
        self.reads_scales = score == "bn_scale"
        if score not in saliency.CRITERIA:
            raise ValueError(
                f"score must be one of {', '.join(map(repr, saliency.CRITERIA))}. "
                f"Received: score={score!r}"
            )
        if score == "bn_scale" and pattern != "channel":
            raise ValueError(
                "score='bn_scale' ranks whole channels. Pass pattern='channel'. Received: "
                f"pattern={pattern!r}"
            )
        if score == "taylor" and self.schedule.first_sparsity > 0:
            raise ValueError(
                "score='taylor' ranks weights by their gradients, which do not exist before the "
                "first step. Pass a schedule that begins at sparsity 0, such as Cubic(0.9). "
                f"Received: {self.schedule!r}"
            )
        self._check_common()

    def init(self, kernels, steps):
        states: dict[str, tuple[str, str]] = {}
        if self.score == "taylor":
            states["taylor"] = ("zeros", "float32")
        return [
            {**states, **({"dense": ("value", k.dtype)} if self.revival else {})} for k in kernels
        ]

    def scores(self, weights, states):
        weights = self._trained(weights, states)
        if self.score == "lamp":
            return [saliency.lamp(w) for w in weights]
        if self.score == "taylor" and self.revival:
            return [s["taylor"] for s in states]
        if self.score == "taylor":  # The moving average of a pruned weight never decays to 0.
            return [ops.where(s["mask"], s["taylor"], -1.0) for s in states]
        if self.score == "bn_scale":
            return [
                saliency.bn_scale(w, s["scale"]) if "scale" in s else saliency.magnitude(w)
                for w, s in zip(weights, states)
            ]
        return [saliency.magnitude(w) for w in weights]

    def before(self, weights, grads, states):
        weights = self._trained(weights, states)
        averages = None
        if self.score == "taylor":
            averages = [
                saliency.taylor(s["taylor"], w, g) for w, g, s in zip(weights, grads, states)
            ]
        if not self.revival:
            weights, grads, _ = super().before(weights, grads, states)
        return weights, list(grads), averages

    def perturb(self, grads, masks, step, total):
        if not self.revival:
            return grads
        limit = gradient_limit(self.length(total))
        return [
            g if mask is None else limit_gradient(g, mask, limit) for g, mask in zip(grads, masks)
        ]

    def after(self, carry, weights, states):
        changes: list[State] = [{} for _ in weights]
        if carry is not None:
            changes = [{"taylor": average} for average in carry]
        if self.revival:
            changes = [{**c, "dense": w} for c, w in zip(changes, weights)]
        return [self.masked(w, {**s, **c}) for w, s, c in zip(weights, states, changes)], changes

    def masked(self, w, state):
        return super().masked(state["dense"] if self.revival else w, state)

    def _trained(self, weights, states):
        """Return the weights that the optimizer trains: with `revival=True`, the dense copies."""
        return [s["dense"] for s in states] if self.revival else list(weights)
