"""What all methods share: a config, and pure functions over weights, states and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_dst import allocation as allocations
from keras_dst import masks
from keras_dst._utils.config import Configurable
from keras_dst.masks import KERNEL, Layout, Pattern
from keras_dst.schedules import Schedule

Tensor = Any
State = dict[str, Any]


class ScheduleState(NamedTuple):
    """When in training a periodic update happens, as scalar tensors.

    Attributes:
        step: optimiser steps done, int32.
        progress: fraction of the training done, float32 in [0, 1].
        sparsity: what the schedule asks for now, float32.
    """

    step: Tensor
    progress: Tensor
    sparsity: Tensor


class Method(Configurable):
    """Base of all methods: `score x allocation x schedule x pattern`.

    A method holds numbers and names alone; it never touches a model. Subclass `LayerMethod` when
    the mask is part of the forward pass, `UpdateMethod` when it is part of the update.

    Attributes:
        schedule: how the target sparsity grows, or None where the method has no target.
        allocation: how sparsity is shared out among the weights.
        pattern: the shape in which weights are pruned.
        frequency: steps between updates of the masks by the `SparseTraining` callback, or
            `"epoch"`.
        learned: whether sparsity follows from training instead of from a ranking.
        target_quantity: what the target is a figure of, in the words of a warning.
        driver: the callback that pursues the target.
    """

    schedule: Schedule | None = None
    allocation: str | Mapping[str, float] = "global"
    pattern: str = "unstructured"
    frequency: int | str = 100
    min_kept: int = 1
    learned = False
    target_quantity = "sparsity"
    driver = "keras_dst.callbacks.SparseTraining"

    def schedule_over(self, epochs: float | None) -> Schedule | None:
        """The schedule, for a training of so many epochs (None: not known)."""
        return self.schedule

    def span(self, total_steps: int | None) -> tuple[int, int]:
        """First and last step between which masks change, in a training of this many steps."""
        return self.schedule.span(total_steps) if self.schedule else (0, 0)

    def mask(self, w: Tensor, state: State, layout: Layout = KERNEL) -> Tensor:
        """The mask of one weight, boolean, from its state."""
        return ops.convert_to_tensor(state["mask"])

    def update(
        self,
        weights: Sequence[Tensor],
        states: Sequence[State],
        layouts: Sequence[Layout],
        kept: Tensor,
        when: ScheduleState,
    ) -> list[State]:
        """The parts of the states that a periodic update changes; here, newly ranked masks.

        Args:
            weights, states, layouts: of all the weights under this method.
            kept: how many weights to keep, one count for all or one per weight.
            now: the time of this update.
        """
        new = self.rank(self.scores(weights, states), layouts, kept)
        return [{"mask": mask} for mask in new]

    def scores(self, weights: Sequence[Tensor], states: Sequence[State]) -> list[Tensor]:
        """Saliency of every weight: the higher, the longer it is kept."""
        raise NotImplementedError

    def monitored(self, state: State) -> dict[str, Tensor]:
        """What is worth watching of a weight's state in training, by name: arrays or numbers."""
        return {}

    def kept_counts(
        self,
        shapes: Sequence[Sequence[int]],
        layouts: Sequence[Layout],
        sparsity: float,
        names: Sequence[str],
    ) -> np.ndarray:
        """Counts of weights to keep, as `update` takes them."""
        final = self.schedule.sparsity if self.schedule else None
        pattern = Pattern(self.pattern)
        for shape, layout in zip(shapes, layouts):
            pattern.block(shape, layout)  # raises where a weight lacks an axis for it
        if pattern.n_of_m:
            return np.array([_kept_of_m(*x, *pattern.n_of_m) for x in zip(shapes, layouts)])
        return allocations.kept_counts(self.allocation, shapes, sparsity, names, final)

    def rank(
        self, scores: Sequence[Tensor], layouts: Sequence[Layout], kept: Tensor
    ) -> list[Tensor]:
        """Boolean masks that keep the highest scores, in this method's pattern and allocation."""
        pattern = Pattern(self.pattern)
        if pattern.n_of_m:
            return [
                masks.n_of_m(s, *pattern.n_of_m, axis=layout.inputs[-1])
                for s, layout in zip(scores, layouts)
            ]
        # The best groups of every weight come first of all, so that no layer dies.
        shapes = [tuple(s.shape) for s in scores]
        if pattern.grouped:
            sizes = [pattern.sizes(shape, layout) for shape, layout in zip(shapes, layouts)]
            first = [min(math.prod(n.shape), -(-self.min_kept // int(n.min()))) for n in sizes]
            least = np.array([count * int(n.max()) for count, n in zip(first, sizes)])
        else:
            sizes = None
            first = [min(math.prod(shape), self.min_kept) for shape in shapes]
            least = np.array(first)
        # One count is for all weights together, several are for each by itself.
        kept = ops.maximum(kept, np.sum(least) if kept.shape[0] == 1 else least)
        kept = kept[0] if kept.shape[0] == 1 else kept
        groups = (pattern.scores(s, layout) for s, layout in zip(scores, layouts))
        scores = ()  # as large as the weights: not to be held where the ranking joins them
        found = masks.top_k(groups, kept, sizes, first)
        return [pattern.expand(g, s, layout) for g, s, layout in zip(found, shapes, layouts)]

    def _check_common(self):
        allocations.check(self.allocation)
        pattern = Pattern(self.pattern)
        for name in ("frequency", "min_kept"):
            value = getattr(self, name)
            if name == "frequency" and value == "epoch":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1. Received: {value!r}")
        seed = getattr(self, "seed", 0)
        if not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise ValueError(f"seed must be a whole number in [0, 2**31). Received: {seed!r}")
        if pattern.n_of_m and self.schedule:
            n, m = pattern.n_of_m
            if not math.isclose(self.schedule.sparsity, 1 - n / m):
                raise ValueError(
                    f"pattern={self.pattern!r} fixes the sparsity at {1 - n / m:g}. "
                    f"Received: sparsity={self.schedule.sparsity:g}. "
                    f"Give {1 - n / m:g}, or another pattern."
                )
        if pattern.n_of_m and self.allocation not in ("global", "uniform"):
            raise ValueError(
                f"pattern={self.pattern!r} fixes the sparsity of every weight, so that there is "
                f"nothing to allocate. Received: allocation={self.allocation!r}"
            )


def _kept_of_m(shape: Sequence[int], layout: Layout, n: int, m: int) -> int:
    inputs = shape[layout.inputs[-1]]
    return math.prod(shape) // inputs * (inputs // m * n + min(n, inputs % m))


def describe(value) -> str:
    """What was received in place of a method, for the message of an error."""
    if isinstance(value, type) and issubclass(value, Method):
        return f"the class {value.__name__}. Call it: {value.__name__}(...)"
    return repr(value) if isinstance(value, Method) else f"{value!r} of type {type(value).__name__}"


class LayerMethod(Method):
    """A method whose mask is part of the forward pass; its state lives in the layer.

    Attributes:
        undecayed: names of the states that no weight decay may touch.
        snapshots: names of states that each update leaves as a copy of another one, with its name.
        two_paths: whether a training step also runs the model on its full path (`paths`), where
            every batch normalisation has statistics, scale and offset of its own.
        prunes_units: whether whole output units are pruned, with their bias; not those that are
            the outputs of the model.
        needs_use_counts: whether `join` has to know how often every weight is multiplied.
    """

    undecayed: tuple[str, ...] = ()
    snapshots: Mapping[str, str] = {}
    two_paths = False
    prunes_units = False
    needs_use_counts = False

    @property
    def needs_driver(self) -> bool:
        """Whether training without the callback `driver` would leave out a part of it."""
        return self.schedule is not None

    def applies_to(self, layout: Layout) -> bool:
        """Whether a weight with these axes gets a mask."""
        return True

    def check(self, shape: Sequence[int], layout: Layout) -> None:
        """Raise ValueError where a weight of this shape cannot be pruned as the method asks."""
        Pattern(self.pattern).block(shape, layout)

    def build(self, layer, name: str, variable, layout: Layout) -> State:
        """Add what the mask of `variable` needs to the layer; return it as a dict of variables."""
        raise NotImplementedError

    def build_progress(self, layer, name: str):
        """Where SparseTraining keeps how far a schedule is: step, optimiser's counter, length."""
        return layer.add_weight(
            name=f"{name}_progress", shape=(3,), initializer="zeros", dtype="int32", trainable=False
        )

    def build_mask(self, layer, name: str, variable):
        """A mask that periodic updates rank anew; all ones to begin with."""
        return layer.add_weight(
            name=f"{name}_mask",
            shape=variable.shape,
            initializer="ones",
            dtype="bool",
            trainable=False,
        )

    def apply(self, w: Tensor, state: State, layout: Layout) -> Tensor:
        """The weight that the forward pass sees: `w` masked, with the method's gradient."""
        raise NotImplementedError

    def path_divergence(self, state: State) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What two paths lose by disagreeing, from the logits of both; None where nothing."""
        return None

    def gate(self, state: State, layout: Layout = KERNEL) -> Tensor:
        """The factor, 0 or 1, of every output unit and its bias, where these are pruned whole."""
        raise NotImplementedError

    def bind_layers(self, layers: Sequence, uses: Mapping[int, tuple]) -> None:
        """Tell all the layers under this method of one another, when training begins.

        `uses` has, by the id of a weight, how often an entry of it is multiplied for one sample,
        or None and the reason; it is empty unless `needs_use_counts`.
        """

    def cost_per_entry(self, state: State) -> float | None:
        """How much an entry of a weight counts for the target; None: all count alike."""
        return None


class UpdateMethod(Method):
    """A method whose mask is part of the update; its state lives in `SparseOptimizer`.

    Attributes:
        moves_weights: whether `before` gives the inner optimiser other weights than the model's.
        grows: whether `update` also gives `grown`: a boolean mask of the weights that are newly
            kept and start at 0, with fresh slots in the inner optimiser.
        reads_gradients: whether more is done with gradients than to mask them, so that each replica
            needs those of the whole batch.
    """

    moves_weights = False
    grows = False
    reads_gradients = False

    def init(self, kernels: Sequence, steps: int | None) -> list[dict[str, tuple[str, str]]]:
        """Per weight, the state beside its mask: name to (initial value, dtype).

        The initial value is `"zeros"`, or `"value"` for a copy of the weight. `steps` is the
        length of the training, None while it is not known.
        """
        return [{} for _ in kernels]

    def perturb(
        self, grads: Sequence[Tensor], masks: Sequence[Tensor | None], step: Tensor
    ) -> Sequence[Tensor]:
        """Gradients of all variables, pruned or not, for the inner optimiser; by default as is."""
        return grads

    def before(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Any]:
        """Weights and gradients for the inner optimiser, and what `after` needs of the old weights.

        By default the gradients of pruned weights are 0.
        """
        return weights, [masks.masked(g, s["mask"]) for g, s in zip(grads, states)], None

    def after(
        self, carry: Any, weights: Sequence[Tensor], states: Sequence[State]
    ) -> tuple[list[Tensor], list[State]]:
        """Weights and changed states, once the inner optimiser has moved the weights.

        By default the pruned weights, which momentum or decay may have moved, are 0 again.
        """
        return [self.masked(w, s) for w, s in zip(weights, states)], [{} for _ in weights]

    def masked(self, w: Tensor, state: State) -> Tensor:
        """What the model's weight becomes under a mask, now or when the mask has changed."""
        return masks.masked(w, state["mask"])
