"""Base classes of all pruning methods.

A pruning method is a small object that stores the arguments of its constructor. The functions of a
method are pure functions of weights, states and gradients. A pruning method never changes a model.
The base classes differ in where the mask is applied:

```text
UpdateMethod     in the optimizer step; the layers stay plain (Magnitude, FlipOut, SET, RigL)
LayerMethod      in the forward pass; the layers hold the mask's state (DST, ST-3, OptG)
TwoPathMethod    in the forward pass, which runs with and without the mask (DCIL)
UnitMethod       in the forward pass, on whole output units and their biases (Consensus)
```

Three kinds of objects call the functions of a pruning method. Sparse layers call `build` when their
variables are created, and `apply` in the forward pass. `SparseOptimizer` calls `init`, `before`,
`perturb` and `after` in every step. The training callback, such as `SparseTraining`, calls `update`
at every mask update. If the method learns its sparsity, the callback also calls `project` at the
end of training.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_dst import allocation as allocations
from keras_dst import masks
from keras_dst._backend import guesses, numbers
from keras_dst._backend.jit import count_all_true
from keras_dst._utils.config import Configurable
from keras_dst._utils.validation import check_integer, is_integer
from keras_dst.masks import KERNEL, Layout, Pattern
from keras_dst.methods import channels
from keras_dst.schedules import Schedule

Tensor = Any
State = dict[str, Any]

# In training runs of fewer epochs, FlipOut and OptG use a cubic schedule by default.
SHORT = 20
# A training run with at least this number of steps uses the settings of the papers unchanged.
_LONG = 20_000
# Maximum gradient of a pruned weight in a long training run, relative to the root mean square of
# the gradients of the kept weights. `masks.limit_gradient` explains why a limit is needed.
_LARGEST_RATIO = 10.0


class ScheduleState(NamedTuple):
    """Step, progress and target sparsity at a mask update, as scalar tensors.

    Attributes:
        step: Number of finished optimizer steps, int32.
        progress: Finished fraction of the training run, float32 in [0, 1].
        sparsity: Current target sparsity of the schedule, float32.
    """

    step: Tensor
    progress: Tensor
    sparsity: Tensor


class Method(Configurable):
    """Base class of all pruning methods.

    A pruning method combines a score, an allocation, a schedule and a pattern. A method stores only
    numbers and strings, no arrays. Subclass `LayerMethod` if the mask is part of the forward pass.
    Subclass `UpdateMethod` if the mask is part of the optimizer step.

    The arguments `weights`, `states` and `layouts` are lists with one entry per weight. A weight is
    a tensor with the shape of its Keras variable. The state of a weight is a dict of tensors, such
    as the mask of the weight. The layout of a weight names its input axes and its output axes.

    Attributes:
        schedule: Schedule of the target sparsity, or None if the method has no target.
        allocation: Distribution of the sparsity over the weights.
        pattern: Which weights are pruned together, see `masks.Pattern`.
        frequency: Number of training steps from one mask update to the next, or `"epoch"` for one
            update per epoch. None means `default_frequency`, or a shorter interval in a short
            training run.
        default_frequency: Value of `frequency` in the paper of the method.
        min_kept: Minimum number of weights that every layer keeps. With `pattern="channel"`,
            `min_kept` counts channels instead of weights.
        counted_in: With `pattern="channel"`, the sparsity is the removed fraction of the
            `"channels"`, `"parameters"` or `"flops"`.
        round_to: With `pattern="channel"`, every layer keeps a multiple of `round_to` channels.
            Layers with fewer than `2 * round_to` channels can keep any number of channels.
        groups: Groups of layers whose channels are removed together, for a model with its own
            `call` method. If `groups` is None, the groups of layers are found in the graph of the
            model.
        learned: True if training determines the sparsity, and False if a ranking determines the
            sparsity. If True, the method must define `project`, and `update` receives the target
            sparsity of the next update.
        exact_from: Fraction of training after which every mask update calls `project`. The method
            must have `learned = True`, and the schedule must have reached its final target. The
            default of 1 means that `project` is called only after the last step.
        couples_channels: True if a method with `learned = True` prunes a channel in all layers that
            compute the channel. False if the method prunes each layer separately.
        target_quantity: Name of the quantity that has a target, such as `"sparsity"`. Warnings use
            this name.
        driver: Import path of the callback that updates the masks during training.
    """

    schedule: Schedule | None = None
    allocation: str | Mapping[str, float] = "global"
    pattern: str = "unstructured"
    frequency: int | str | None = None
    default_frequency: int | str = 100
    min_kept: int | None = None
    counted_in: str = "channels"
    round_to: int = 8
    groups: channels.ChannelNames | None = None
    learned = False
    exact_from = 1.0
    couples_channels = False
    target_quantity = "sparsity"
    driver = "keras_dst.callbacks.SparseTraining"

    def schedule_over(self, epochs: float | None) -> Schedule | None:
        """Return the schedule for a training run with `epochs` epochs.

        The training callback calls this function when training begins. By default, the schedule
        does not depend on the number of epochs.

        Args:
            epochs: Number of epochs, or None if the number is unknown.
        """
        return self.schedule

    def length(self, total: Tensor) -> Tensor | int:
        """Return the length of training in steps. Settings such as the gradient limit depend on
        this length.

        If the schedule is given in steps, this function returns the last step of the schedule and
        ignores `total`. A custom training loop does not know the length of training.

        Args:
            total: Number of steps in the training run, or 0 if the number is unknown.
        """
        if self.schedule is not None and self.schedule.in_steps:
            return self.schedule.span(None)[1]
        return total

    def span(self, total_steps: int | None) -> tuple[int, int]:
        """Return the first and the last step at which masks may change.

        Args:
            total_steps: Number of steps in the training run, or None if the number is unknown.
        """
        return self.schedule.span(total_steps) if self.schedule else (0, 0)

    def mask(self, w: Tensor, state: State, layout: Layout = KERNEL) -> Tensor:
        """Return the boolean mask of one weight, in the shape of the weight.

        Callbacks, reports, plots and `strip` call this function. By default, the mask is
        `state["mask"]`.
        """
        return ops.convert_to_tensor(state["mask"])

    def update(
        self,
        weights: Sequence[Tensor],
        states: Sequence[State],
        layouts: Sequence[Layout],
        kept: Tensor,
        now: ScheduleState,
    ) -> list[State]:
        """Return the changed states, as one dict of new values per weight.

        The training callback compiles this function and calls it at every mask update. By default,
        this function ranks the weights by their `scores` and returns new masks.

        Args:
            weights: All weights that the method prunes.
            states: One dict per weight, with the mask and other tensors that the method stores for
                the weight.
            layouts: Input and output axes of each weight.
            kept: Number of weights to keep, as an int32 vector with one entry per weight tensor. If
                all weight tensors are ranked together, the vector has a single entry: the total.
            now: Step, training progress and target sparsity of the mask update.
        """
        new = self.rank(self.scores(weights, states), layouts, kept)
        return [{"mask": mask} for mask in new]

    def scores(self, weights: Sequence[Tensor], states: Sequence[State]) -> list[Tensor]:
        """Return one saliency tensor per weight, with the shape of the weight.

        The weights with the highest scores are kept.

        `update` calls this function. Every method that ranks its weights must define this function.
        """
        raise NotImplementedError

    def project(
        self,
        weights: Sequence[Tensor],
        states: Sequence[State],
        layouts: Sequence[Layout],
        kept: Tensor,
    ) -> list[State]:
        """Return changed states with which the masks meet the final target exactly.

        If `learned` is True, the training callback calls this function after the last step of the
        schedule. After the fraction `exact_from` of training, mask updates can also call this
        function. Every method with `learned = True` and a schedule must define this function.

        Args:
            weights: All weights that the method prunes.
            states: One dict per weight, with the mask and other tensors that the method stores for
                the weight.
            layouts: Input and output axes of each weight.
            kept: Number of weights to keep after training: the total of the model, or one number
                per weight tensor (see `update`).
        """
        raise NotImplementedError

    def least_units(self, units: int) -> int:
        """Return the minimum number of channels that a group of coupled channels keeps.

        Args:
            units: Number of channels in the group.
        """
        return min(self.min_kept or 1, units)

    def followers_settled(self, step: Tensor | int, total: Tensor | int) -> bool | Tensor:
        """Return whether biases and normalization scales of pruned channels must be 0 at a step.

        For a model with coupled channels, this function is called in every optimizer step, or at
        every mask update of a `LayerMethod`. By default, this function returns True.

        Args:
            step: Number of finished optimizer steps: an int32 tensor, or an integer for a
                `LayerMethod`.
            total: Number of steps in the training run, with the type of `step`, or 0 if the number
                is unknown.
        """
        return True

    def monitored(self, state: State) -> dict[str, Tensor]:
        """Return the tensors of one weight that are logged to TensorBoard, as a dict by name."""
        return {}

    def kept_counts(
        self,
        shapes: Sequence[Sequence[int]],
        layouts: Sequence[Layout],
        sparsity: float,
        names: Sequence[str],
    ) -> np.ndarray:
        """Return how many weights to keep: the total of the model, or one number per weight tensor.

        For a model with coupled channels, the function returns numbers of channels instead of
        numbers of weights (see `methods.channels`).

        Args:
            shapes: Shapes of all weights that the method prunes.
            layouts: Input and output axes of each weight.
            sparsity: Fraction of zeros over all weights.
            names: Variable paths of the weights, needed only if the allocation is a dict.
        """
        final = self.schedule.sparsity if self.schedule else None
        pattern = Pattern(self.pattern)
        for shape, layout in zip(shapes, layouts):
            # This call raises an error if the weight lacks an axis that the pattern needs.
            pattern.block(shape, layout)
        if channels.groups_of(layouts):
            return channels.kept_counts(self, shapes, layouts, sparsity, names)
        if pattern.n_of_m:
            if sparsity == 0:
                return np.array([math.prod(shape) for shape in shapes])
            return np.array([_kept_of_m(*x, *pattern.n_of_m) for x in zip(shapes, layouts)])
        return allocations.kept_counts(self.allocation, shapes, sparsity, names, final)

    def rank(
        self, scores: Sequence[Tensor], layouts: Sequence[Layout], kept: Tensor
    ) -> list[Tensor]:
        """Return boolean masks that keep the weights with the highest scores.

        With a pattern, the masks keep the blocks or channels with the highest scores.

        Args:
            scores: One saliency tensor per weight, with the shape of the weight.
            layouts: Input and output axes of each weight.
            kept: Number of weights to keep: the total of the model, or one number per weight tensor
                (see `update`).
        """
        pattern = Pattern(self.pattern)
        if channels.groups_of(layouts):
            return channels.rank(self, scores, layouts, kept)
        if pattern.n_of_m:
            # Remove each tensor of scores from the list, so that `n_of_m` can free its memory.
            left, scores, (n, m) = [*scores], (), pattern.n_of_m
            dense = [count >= math.prod(s.shape) for count, s in zip(ops.unstack(kept), left)]
            return [
                ops.logical_or(masks.n_of_m(left.pop(0), n, m, axis=layout.inputs[-1]), whole)
                for whole, layout in zip(dense, layouts)
            ]
        shapes = [tuple(s.shape) for s in scores]
        together = kept.shape[0] == 1  # A single entry is the total of all weight tensors.
        ranges = [pattern.size_range(*of_weight) for of_weight in zip(shapes, layouts)]
        smallest, largest = np.array(ranges).T
        floors = self._floors(shapes, layouts, smallest, largest, together)
        sizes = None
        ranked = largest[:1] if together else largest
        if (smallest != largest).any() or (together and (largest != ranked).any()):
            sizes = [pattern.sizes(*of_weight) for of_weight in zip(shapes, layouts)]
        elif pattern.grouped:
            # All groups that are ranked together have the same size, so count groups, not weights.
            kept = kept // numbers.constant(ranked, "int32", kept)
            largest = np.ones_like(largest)
        # `kept` counts weights, but `floors` counts groups of weights, such as blocks. The groups
        # of a tensor can differ in size, and the ranking may select only the largest groups. `kept`
        # is therefore raised to at least the minimum number of groups times the size of the largest
        # group.
        least = largest * (floors if self.min_kept else 1)
        if together:
            kept = numbers.at_least(kept, int(least.sum()))[0]
        else:
            kept = ops.maximum(kept, numbers.constant(least, "int32", kept))
        # Scores are cast to float32 before they are pooled, so that equal weights have equal scores
        # in every precision.
        groups = [
            pattern.scores(ops.cast(s, "float32"), layout) for s, layout in zip(scores, layouts)
        ]
        scores = ()  # Free the scores during the ranking, because they are as large as the weights.
        found = masks.top_k(groups, kept, sizes, [1] * len(groups))
        if together and floors.max() > 1:
            # This ranking keeps at least one group of weights in every tensor. If a tensor then
            # keeps fewer groups than its minimum, rank all groups again, and keep at least the
            # minimum in every tensor.
            counts = ops.stack([count_all_true(mask) for mask in found])
            too_few = ops.any(counts < numbers.constant(floors, "int32", counts))
            found = guesses.cond(
                ops.logical_not(too_few & (kept >= int(np.dot(largest, floors)))),
                lambda: found,
                lambda: masks.top_k(groups, kept, sizes, floors.tolist()),
            )
        return [pattern.expand(g, s, layout) for g, s, layout in zip(found, shapes, layouts)]

    def _floors(self, shapes, layouts, smallest, largest, together) -> np.ndarray:
        """Return the minimum number of groups, such as blocks, to keep in every weight tensor.

        `smallest` and `largest` are arrays with the sizes of the smallest and the largest group of
        every weight tensor.
        """
        if self.min_kept is None and together and self.schedule is not None:
            # Round each minimum down to whole groups, so that all minimums together are at most a
            # quarter of the kept weights.
            floors = allocations.floor_counts(shapes, self.schedule.sparsity) // largest
        else:
            floors = -(-np.array([self.min_kept or 1] * len(shapes)) // smallest)
        pattern = Pattern(self.pattern)
        groups = [math.prod(pattern.groups(*of_weight)) for of_weight in zip(shapes, layouts)]
        return np.clip(floors, 1, groups)

    def _check_common(self):
        allocations.check(self.allocation)
        pattern = Pattern(self.pattern)
        for name in ("frequency", "min_kept", "round_to"):
            value = getattr(self, name)
            if (name != "round_to" and value is None) or (name, value) == ("frequency", "epoch"):
                continue
            setattr(self, name, check_integer(value, name))
        if self.counted_in == "latency":
            raise ValueError(
                "counted_in must be 'channels', 'parameters' or 'flops'. Received: 'latency', "
                "which differs between machines and runs. Fix: call "
                "keras_dst.sparsity_at_latency(model, ratio) before training, and pass the "
                "returned sparsity with counted_in='flops'."
            )
        if self.counted_in not in channels.COUNTED_IN:
            raise ValueError(
                f"counted_in must be one of {', '.join(map(repr, channels.COUNTED_IN))}. "
                f"Received: counted_in={self.counted_in!r}"
            )
        if pattern.name != "channel" and (self.counted_in, self.round_to) != ("channels", 8):
            raise ValueError(
                "counted_in and round_to can be used only with pattern='channel'. Received: "
                f"pattern={self.pattern!r}, counted_in={self.counted_in!r}, "
                f"round_to={self.round_to!r}. Pass pattern='channel', or omit both arguments."
            )
        if self.groups is not None and pattern.name != "channel":
            raise ValueError(
                "groups can be used only with pattern='channel'. Received: "
                f"pattern={self.pattern!r}. Pass pattern='channel', or omit groups."
            )
        if self.groups is not None and self.counted_in != "channels":
            raise ValueError(
                "groups can be combined only with counted_in='channels'. The groups do not name "
                "the weights that read a channel, so keras_dst cannot count the parameters and "
                "FLOPs that are removed with the channel. Received: "
                f"counted_in={self.counted_in!r}. Omit counted_in, or build a Functional model and "
                "omit groups."
            )
        self.groups = channels.checked_names(self.groups)
        seed = getattr(self, "seed", 0)
        if not is_integer(seed, minimum=0) or seed >= 2**31:
            raise ValueError(f"seed must be a whole number in [0, 2**31). Received: {seed!r}")
        if hasattr(self, "seed"):
            self.seed = int(seed)
        if pattern.n_of_m and self.schedule:
            n, m = pattern.n_of_m
            if not math.isclose(self.schedule.sparsity, 1 - n / m):
                raise ValueError(
                    f"pattern={self.pattern!r} fixes the sparsity at {1 - n / m:g}. "
                    f"Received: sparsity={self.schedule.sparsity:g}. "
                    f"Pass sparsity={1 - n / m:g}, or another pattern."
                )
        if pattern.n_of_m and self.min_kept is not None:
            raise ValueError(
                f"pattern={self.pattern!r} fixes how many weights every layer keeps. Received: "
                f"min_kept={self.min_kept}. Omit min_kept, or use another pattern."
            )
        if pattern.n_of_m and self.allocation not in ("global", "uniform"):
            raise ValueError(
                f"pattern={self.pattern!r} fixes the sparsity of every weight, so it cannot be "
                f"combined with an allocation. Received: allocation={self.allocation!r}. Do not "
                "pass allocation, or use another pattern."
            )


def length_factor(total: Tensor | int) -> Tensor | float:
    """Return a factor in [0.1, 1] that grows with the number of training steps.

    The factor is 1 for 20,000 steps or more, and 0.1 for 2,000 steps or fewer. In the papers, some
    settings, such as the gradient noise of FlipOut, are chosen for long training runs. Methods
    multiply these settings by the factor.

    Args:
        total: Number of steps in the training run, or 0 if the number is unknown. If `total` is 0,
            this function returns 1.
    """
    # For an integer, compute a float. On torch, a tensor would be copied to the device in every
    # step.
    if is_integer(total):
        return float(np.clip(np.float32(total) / np.float32(_LONG), 0.1, 1.0)) if total else 1.0
    steps = ops.cast(total, "float32")
    return numbers.where(steps > 0, numbers.clip(steps / _LONG, 0.1, 1.0), 1.0)


def gradient_limit(total: Tensor | int) -> Tensor | float:
    """Return the argument `limit` of `masks.limit_gradient` for a training run with `total`
    steps."""
    return _LARGEST_RATIO * length_factor(total)


def _kept_of_m(shape: Sequence[int], layout: Layout, n: int, m: int) -> int:
    inputs = shape[layout.inputs[-1]]
    return math.prod(shape) // inputs * (inputs // m * n + min(n, inputs % m))


def describe(value) -> str:
    """Describe a value that is not a valid method, for an error message."""
    if isinstance(value, type) and issubclass(value, Method):
        return f"the class {value.__name__}. Call it: {value.__name__}(...)"
    return repr(value) if isinstance(value, Method) else f"{value!r} of type {type(value).__name__}"


# -- methods that mask the forward pass ----------------------------------------------------------


class LayerMethod(Method):
    """Base class of methods whose mask is part of the forward pass.

    The sparse layer owns the mask and all other variables of the method. Pass a `LayerMethod` to
    `sparsify` or to a `Sparse*` layer. By default, the layer stores one mask per weight, `update`
    returns new masks, and the forward pass uses `w * mask`.

    Attributes:
        undecayed: Names of the trainable states to which the optimizer applies no weight decay.
        snapshots: Dict that maps the name of a state to the name of the state that it copies. With
            `{"a": "b"}`, the state `"a"` becomes a copy of the state `"b"` after every mask update.
    """

    undecayed: tuple[str, ...] = ()
    snapshots: Mapping[str, str] = {}

    @property
    def needs_driver(self) -> bool:
        """Whether training needs the callback given by `driver`.

        By default, a method needs the callback if the method has a schedule.
        """
        return self.schedule is not None

    def applies_to(self, layout: Layout) -> bool:
        """Return whether a weight with the given axes gets a mask. Other weights stay dense."""
        return True

    def check(self, shape: Sequence[int], layout: Layout) -> None:
        """Raise ValueError if a weight of the given shape cannot be pruned in the method's pattern.

        `sparsify` calls this function for every weight. If the function raises an error, `sparsify`
        skips the layer and reports the error message as the reason.
        """
        Pattern(self.pattern).block(shape, layout)

    def build(self, layer, name: str, variable, layout: Layout) -> State:
        """Create the variables of the method for one weight of the layer, and return them as a
        dict.

        The layer calls this function once, after its weights are created. If the method has a
        schedule, the dict must contain an entry `"progress"`, which `build_progress` creates.

        Args:
            layer: Sparse layer that owns the weight. `layer.add_weight` creates the variables.
            name: Name of the weight in the layer. Use `name` as the prefix of the names of new
                variables.
            variable: Keras variable of the weight.
            layout: Input and output axes of the weight.
        """
        return {
            "mask": self.build_mask(layer, name, variable),
            "progress": self.build_progress(layer, name),
        }

    def build_progress(self, layer, name: str):
        """Add the variable in which `SparseTraining` saves the position in the schedule.

        The variable has three entries: the current step in the schedule, the optimizer's step
        counter at that step, and the length of the schedule in steps.
        """
        return layer.add_weight(
            name=f"{name}_progress", shape=(3,), initializer="zeros", dtype="int32", trainable=False
        )

    def build_mask(self, layer, name: str, variable):
        """Add a boolean mask of ones in the shape of a weight."""
        return layer.add_weight(
            name=f"{name}_mask",
            shape=variable.shape,
            initializer="ones",
            dtype="bool",
            trainable=False,
        )

    def apply(self, w: Tensor, state: State, layout: Layout) -> Tensor:
        """Return the masked weight for the forward pass, with the gradient that the method defines.

        The layer calls this function in every forward pass. By default, only kept weights get a
        gradient.

        Args:
            w: The weight, in the precision of its variable.
            state: Variables that the method stores for the weight, as a dict.
            layout: Input and output axes of the weight.
        """
        return masks.masked(w, self.mask(w, state, layout))

    def limited(self, effective: Tensor, mask: Tensor, state: State) -> Tensor:
        """Return a masked weight unchanged, and limit the gradients of its pruned entries.

        A method calls this function if it trains pruned weights, scores or thresholds with the
        gradient of the masked weight. The limit is 10 times the root mean square of the gradients
        of kept weights. The gradient limit is lower in a training run of fewer than 20,000 steps.

        Args:
            effective: Masked weight that the forward pass uses.
            mask: Boolean mask in the shape of the weight.
            state: Variables that the method stores for the weight, as a dict.
        """
        return masks.with_limited_gradient(effective, mask, self.limit(state))

    def limit(self, state: State) -> Tensor | float:
        """Return the `limit` of `masks.limit_gradient` for one weight.

        Args:
            state: State of the weight, as a dict of variables.
        """
        if "progress" not in state:
            return gradient_limit(self.length(0))
        return numbers.stored_result(self._limit, ops.convert_to_tensor(state["progress"]))

    def _limit(self, progress: Tensor) -> Tensor | float:
        return gradient_limit(self.length(progress[2]))


_full_path = ContextVar("full_path", default=False)


def on_full_path() -> bool:
    """Return whether layers are currently called on the full path of a `TwoPathMethod`."""
    return _full_path.get()


@contextlib.contextmanager
def full_path() -> Iterator[None]:
    """Run all layers that are called within this context on the full path, without their masks.

    Layers choose the path while Keras traces the training step, so the compiled step contains no
    conditional operation.

    Example:
        >>> with keras_dst.methods.full_path():
        ...     dense_output = model(x)
    """
    token = _full_path.set(True)
    try:
        yield
    finally:
        _full_path.reset(token)


class TwoPathMethod(LayerMethod):
    """Base class of methods that train the model on a pruned path and a full path in every step.

    The pruned path and the full path use the same weights. Every batch normalization has separate
    statistics, scales and offsets for each path. The training loss is the loss of the pruned path
    plus the loss of the full path. In inference, the masked weights are used. A model can be pruned
    with only one `TwoPathMethod`.

    By default, the pruned path trains the kept weights, and the full path trains the pruned
    weights.
    """

    def apply(self, w: Tensor, state: State, layout: Layout) -> Tensor:
        """Return the weight for the path that is being computed: the pruned path, or the full path
        if `on_full_path()` is True.

        By default, the pruned path uses `w * mask`. The full path uses `w`, and its loss sends no
        gradient to kept weights.
        """
        mask = self.mask(w, state, layout)
        if on_full_path():
            return masks.stop_gradient_where(mask, w)
        return masks.masked(w, mask)

    def path_divergence(self, state: State) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Return a function that penalizes differences between the outputs of the pruned path and
        the full path.

        The training callback calls this function once when training begins. The returned function
        takes the logits of the pruned path and of the full path, with the classes on the last axis.
        The returned function computes one penalty per sample, in the shape of the logits without
        the class axis. Every training step calls the returned function for each model output whose
        loss is a cross-entropy. Sample weights and the reduction of the loss apply to the penalties
        in the same way as to the cross-entropy. Return None to train without a penalty, as this
        base class does.

        Args:
            state: Variables that the method stores for the first pruned weight, as a dict.
        """
        return None


class UnitMethod(LayerMethod):
    """Base class of methods that prune whole output units together with their biases.

    A gate of 0 or 1 multiplies all weights of an output unit. Layers that compute the outputs of
    the model are not pruned. If the output units differ in cost, the target sparsity is the removed
    fraction of the total cost. By default, the method stores one gate per output unit. Every
    `update` opens the gates of the units with the highest mean scores.

    Attributes:
        needs_use_counts: True if `bind_layers` needs to know in how many multiplications each
            weight is used.
    """

    pattern = "channel"
    couples_channels = True
    needs_use_counts = False

    @staticmethod
    def gate_shape(shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
        """Return the shape of a weight's gates. Gates of this shape broadcast to the weight.

        Args:
            shape: Shape of the weight.
            layout: Input and output axes of the weight.

        Example:
            >>> keras_dst.methods.UnitMethod.gate_shape((3, 3, 16, 8), keras_dst.masks.KERNEL)
            (8,)
        """
        outputs = {axis % len(shape) for axis in layout.outputs}
        kept = [n if axis in outputs else 1 for axis, n in enumerate(shape)]
        return tuple(kept[min(outputs) :]) if outputs else ()

    def build(self, layer, name: str, variable, layout: Layout) -> State:
        """Create open gates for all output units of the layer, and a variable for the schedule
        position."""
        gate = layer.add_weight(
            name=f"{name}_gate",
            shape=self.gate_shape(variable.shape, layout),
            initializer="ones",
            trainable=False,
            autocast=False,
        )
        return {"gate": gate, "progress": self.build_progress(layer, name)}

    def update(self, weights, states, layouts, kept, now):
        """Return new gates: 1 for the output units with the highest scores, and 0 for all other
        output units."""
        found = []
        ranked = self.rank(self.scores(weights, states), layouts, kept)
        for w, mask, layout in zip(weights, ranked, layouts):
            rank = len(w.shape)
            inputs = {*range(rank)} - {axis % rank for axis in layout.outputs}
            is_open = ops.reshape(ops.any(mask, tuple(inputs)), self.gate_shape(w.shape, layout))
            found.append({"gate": ops.cast(is_open, w.dtype)})
        return found

    def gate(self, state: State, layout: Layout = KERNEL) -> Tensor:
        """Return the gates of a weight, 0 or 1, in the shape that `gate_shape` returns.

        The layer calls this function in every forward pass for its kernel and for its bias. By
        default, the gates are `state["gate"]`.

        Args:
            state: Variables that the method stores for the weight, as a dict.
            layout: Input and output axes of the weight.
        """
        return ops.convert_to_tensor(state["gate"])

    def apply(self, w: Tensor, state: State, layout: Layout) -> Tensor:
        """Return the weight multiplied by its gates."""
        return w * self.gate(state, layout)

    def mask(self, w: Tensor, state: State, layout: Layout = KERNEL) -> Tensor:
        """Return the boolean mask of a weight. The mask is True for all weights of a unit whose
        gate is open."""
        return ops.broadcast_to(self.gate(state, layout) > 0, w.shape)

    def bind_layers(
        self,
        layers: Sequence,
        uses: Mapping[int, tuple[int | None, str | None]],
        layouts: Sequence[Layout],
    ) -> None:
        """Pass all layers to the method, so that a penalty can depend on the gates of all layers.

        The training callback calls this function once when training begins. By default, this
        function does nothing.

        Args:
            layers: All sparse layers and `Gate` layers that use the method.
            uses: Dict that maps `id(variable)` of each weight to a pair `(count, reason)`. `count`
                is the number of multiplications per sample in which one entry of the weight is
                used. If the number of multiplications is unknown, `count` is None, and `reason`
                states why. The dict is empty for methods whose `needs_use_counts` is False.
            layouts: Input and output axes of every weight in `layers`. In a functional model, the
                layouts also state which channels are removed together.
        """

    def cost_per_entry(self, state: State) -> float | None:
        """Return the cost of one entry of a weight, such as its FLOPs, or None.

        None means that all entries of all weights have the same cost. The target sparsity is a
        fraction of the total cost.

        The training callback calls this function once when training begins, after `bind_layers`.
        """
        return None


# -- methods that mask the optimizer step --------------------------------------------------------


class UpdateMethod(Method):
    """Base class of methods whose mask is part of the optimizer step.

    The `SparseOptimizer` owns the masks and all other variables of the method. The layers remain
    plain Keras layers. Every optimizer step calls `before`, `perturb`, the inner optimizer and
    `after`, in this order. By default, pruned weights get no gradient and stay 0.

    Attributes:
        moves_weights: Whether `before` may return weights that differ from the model's weights.
        grows: Whether `update` also returns an entry `"grown"`: a boolean mask of the weights that
            are newly kept. The optimizer sets newly kept weights and their slots, such as momentum,
            to 0. For coupled channels, `update` also returns an entry `"start"` with the values
            that newly kept weights get instead of 0.
        reads_gradients: True if the method reads the values of the gradients, for example to
            compute a saliency. If True, distributed training sums the gradients of all replicas
            before the method reads them. A method that only masks the gradients sets
            `reads_gradients` to False.
        reads_scales: True if `scores` needs the scales of normalization layers. If True, the state
            of a weight has an entry `"scale"` with the scales of the normalization layer that
            follows the weight. The shape of `"scale"` broadcasts to the weight.
    """

    moves_weights = False
    grows = False
    reads_gradients = False
    reads_scales = False

    def init(self, kernels: Sequence, steps: int | None) -> list[dict[str, tuple[str, str]]]:
        """Return one dict per weight: the tensors that the method stores in addition to the mask.

        The optimizer calls this function when the optimizer is built, and again when the number of
        training steps is known. The dict maps the name of each tensor to `(initial value, dtype)`.
        The initial value is `"zeros"` for a tensor of zeros, or `"value"` for a copy of the weight.
        Every tensor has the shape of its weight.

        Args:
            kernels: Keras variables of the pruned weights.
            steps: Number of steps in the training run, or None if the number is unknown.
        """
        return [{} for _ in kernels]

    def before(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Any]:
        """Return weights and gradients for the inner optimizer, and a value that `after` receives.

        The value for `after` can have any type. `FlipOut`, for example, passes a list of signs. By
        default, the gradients of pruned weights become 0.

        Args:
            weights: All weights that the method prunes.
            grads: Gradients of the weights.
            states: One dict per weight, with the mask and other tensors that the method stores for
                the weight.
        """
        return weights, [masks.masked(g, s["mask"]) for g, s in zip(grads, states)], None

    def perturb(
        self,
        grads: Sequence[Tensor | None],
        masks: Sequence[Tensor | None],
        step: Tensor,
        total: Tensor,
    ) -> Sequence[Tensor | None]:
        """Return changed gradients of all trainable variables, with or without a mask.

        By default, the gradients do not change.

        Args:
            grads: Gradients of all variables; None for a variable without a gradient.
            masks: Masks of all variables; None for a variable without a mask.
            step: Number of finished optimizer steps, int32.
            total: Number of steps in the training run, int32, or 0 if the number is unknown.
        """
        return grads

    def after(
        self, carry: Any, weights: Sequence[Tensor], states: Sequence[State]
    ) -> tuple[list[Tensor], list[State]]:
        """Return the new weights, and the changed states as one dict of new values per weight.

        By default, pruned weights become 0 again, because momentum or weight decay may have changed
        them.

        Args:
            carry: The value for `after` that `before` returned in the same step.
            weights: All weights that the method prunes, after the step of the inner optimizer.
            states: One dict per weight, with the mask and other tensors that the method stores for
                the weight.
        """
        return [self.masked(w, s) for w, s in zip(weights, states)], [{} for _ in weights]

    def masked(self, w: Tensor, state: State) -> Tensor:
        """Return one weight with its mask applied.

        `after` calls this function in every step, and the optimizer calls this function after a
        mask update.
        """
        return masks.masked(w, state["mask"])
