"""Allocation: the distribution of a model's sparsity over its weights."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from keras_dst._utils.validation import check_number, is_integer
from keras_dst.schedules import check_sparsity

__all__ = ["densities", "floor_counts", "kept_counts"]

NAMES = ("global", "uniform", "erk")


def check(allocation) -> None:
    """Raise ValueError unless `allocation` is a known name or a dict from names to sparsities."""
    if isinstance(allocation, Mapping):
        for name, sparsity in allocation.items():
            try:
                re.compile(name)
            except (re.error, TypeError) as error:
                raise ValueError(
                    "The keys of an allocation are weight names or regular expressions. "
                    f"Received: {name!r}, which is not a valid expression: {error}"
                ) from error
            check_sparsity(sparsity, f"allocation[{name!r}]")
    elif not isinstance(allocation, str) or allocation not in NAMES:
        raise ValueError(
            f"allocation must be one of {', '.join(map(repr, NAMES))} or a dict from weight names "
            f"or regular expressions to sparsities. Received: {allocation!r}"
        )


def _check_shapes(shapes) -> None:
    """Raise ValueError unless `shapes` is a sequence of sequences of whole numbers."""
    try:
        valid = all(is_integer(n, minimum=1) for i in range(len(shapes)) for n in shapes[i])
    # The TypeError means that `shapes` or one of its entries is not a sequence.
    except (TypeError, KeyError):
        valid = False
    if not valid:
        raise ValueError(
            "shapes must be a list of shapes, such as [(10, 10), (30, 10)]. "
            f"Received: shapes={shapes!r}"
        )


def densities(
    allocation: str | Mapping[str, float],
    shapes: Sequence[Sequence[int]],
    density: float,
    names: Sequence[str] = (),
) -> np.ndarray:
    """Return the density of every weight, as float64 in [0, 1].

    Unless the allocation is a dict, a fraction `density` of all weights of the model is kept.

    Args:
        allocation: `"uniform"` gives all weights the same density. `"erk"` (Erdős-Rényi-Kernel)
            gives densities proportional to `sum(shape) / prod(shape)`, at most 1. With `"erk"`,
            small weight tensors have a higher density than large weight tensors. A dict maps weight
            names to sparsities. Weights whose names are not in the dict get the density `density`.
            A name is the path of a weight, or a regular expression that matches any part of a path.
            If several names in the dict match a weight, the last matching name applies.
        shapes: Shapes of the weights.
        density: Fraction of all weights that is kept.
        names: Paths of the weights. The paths are needed only if the allocation is a dict.

    Raises:
        ValueError: If the allocation is not known, or if a name in the dict matches no weight.

    Example:
        >>> keras_dst.allocation.densities("erk", [(10, 10), (1000, 1000)], 0.1)

    Source: arXiv 1911.11134, section 3 (ERK).
    """
    check(allocation)
    _check_shapes(shapes)
    check_number(density, "density", maximum=1)
    if isinstance(allocation, Mapping):
        if isinstance(names, str) or len(names) != len(shapes):
            raise ValueError(
                "An allocation by names needs the name of every weight. Expected "
                f"{len(shapes)} names. Received: names={names!r}"
            )
        return by_name(allocation, density, names)
    if allocation == "erk":
        return _erk(shapes, density)
    return np.full(len(shapes), float(density))


def _erk(shapes, density):
    sizes = np.array([math.prod(s) for s in shapes], "float64")
    # A scalar counts as a vector of one entry.
    raw = np.array([sum(s) or 1 for s in shapes], "float64") / sizes
    full = np.zeros(len(sizes), bool)
    while True:
        # Weight tensors whose density would exceed 1 stay dense. `budget` is the total number of
        # entries to keep in the weight tensors that are not dense.
        budget = density * sizes.sum() - sizes[full].sum()
        result = np.where(full, 1.0, 0.0)
        if not full.all():
            result[~full] = raw[~full] * budget / (raw * sizes)[~full].sum()
        if (result <= 1).all():
            return result
        full |= result > 1


def by_name(allocation: Mapping[str, float], density: float, names: Sequence[str]) -> np.ndarray:
    """Return one density per weight. A weight that the dict does not name has the density
    `density`."""
    result = np.full(len(names), float(density))
    for key, sparsity in allocation.items():
        fitting = [i for i, name in enumerate(names) if key == name]
        fitting = fitting or [i for i, name in enumerate(names) if re.search(key, name)]
        if not fitting:
            raise ValueError(
                f"allocation[{key!r}] matches no weight. The weights are: {', '.join(names)}"
            )
        result[fitting] = 1 - sparsity
    return result


def kept_counts(
    allocation: str | Mapping[str, float],
    shapes: Sequence[Sequence[int]],
    sparsity: float,
    names: Sequence[str] = (),
    final_sparsity: float | None = None,
) -> np.ndarray:
    """Return how many entries to keep in each weight tensor, or a single total for `"global"`.

    The returned numbers are int64. A dict gives every named weight its own sparsity. With any other
    allocation, the sum of the returned numbers is exactly `round((1 - sparsity) * size)`. The
    symbol `size` stands for the number of entries in all weights.

    Args:
        allocation: See `densities`.
        shapes: Shapes of the weights.
        sparsity: Current fraction of zeros.
        names: Paths of the weights. The paths are needed only if the allocation is a dict.
        final_sparsity: Final fraction of zeros. The sparsities in an allocation dict apply at the
            end of the schedule. As long as `sparsity` is below its final value, each sparsity in
            the dict is multiplied by `sparsity / final_sparsity`. Defaults to None, in which case
            the sparsities in the dict are not multiplied by a factor.

    Example:
        >>> keras_dst.allocation.kept_counts("uniform", [(10, 10), (30, 10)], 0.9)
        array([10, 30])
    """
    check(allocation)
    _check_shapes(shapes)
    check_number(sparsity, "sparsity", maximum=1)
    if final_sparsity is not None:
        check_number(final_sparsity, "final_sparsity", maximum=1)
    sizes = np.array([math.prod(s) for s in shapes], "int64")
    if allocation == "global":
        return np.array([round((1 - sparsity) * int(sizes.sum()))])
    if isinstance(allocation, Mapping) and final_sparsity:
        allocation = {k: float(v * sparsity / final_sparsity) for k, v in allocation.items()}
    exact = densities(allocation, shapes, 1 - sparsity, names) * sizes
    counts = np.floor(exact + 1e-9).astype("int64")
    by_name = isinstance(allocation, Mapping)
    total = round(float(exact.sum()) if by_name else (1 - sparsity) * int(sizes.sum()))
    # Round by the largest-remainder method: round all counts down, then add 1 to the counts with
    # the largest remainders until their sum is `total`.
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: max(0, total - int(counts.sum()))]] += 1
    return np.minimum(counts, sizes)


def floor_counts(shapes: Sequence[Sequence[int]], sparsity: float) -> np.ndarray:
    """Return the minimum number of entries that a global ranking keeps in each weight tensor.

    A weight tensor keeps at least one entry, and at least a quarter of the entries that `"erk"`
    would keep. The returned numbers are int64. In a trained network, a global ranking rarely prunes
    a weight tensor down to this minimum. Without a minimum, a global ranking at 98 % sparsity may
    keep so few entries of a layer that hardly any signal passes.

    Args:
        shapes: Shapes of the weights.
        sparsity: Final fraction of zeros.

    Example:
        >>> keras_dst.allocation.floor_counts([(10, 10), (30, 10)], 0.9)
        array([3, 6])
    """
    _check_shapes(shapes)
    check_number(sparsity, "sparsity", maximum=1)
    sizes = np.array([math.prod(s) for s in shapes], "int64")
    counts = np.floor(_erk(shapes, 1 - sparsity) * sizes / 4 + 1e-9).astype("int64")
    return np.minimum(np.maximum(counts, 1), sizes)


def equal_drop(
    sparsities: Sequence[float], drops: np.ndarray, sizes: Sequence[int], sparsity: float
) -> np.ndarray:
    """Return one sparsity per weight tensor, so that the largest drop of the metric is minimal.

    Every weight tensor is pruned until the metric drops by the same amount. This drop of the metric
    is chosen so that the total sparsity meets the target. Between two measured sparsities, the drop
    of the metric is interpolated linearly. Before the search, each negative drop of the metric is
    set to zero. Each drop is then replaced by the largest drop that the same weight tensor has at
    an equal or lower sparsity. If several solutions have the same largest drop of the metric, the
    function returns the solution with the most uniform sparsities.

    Args:
        sparsities: Sparsities at which the drops of the metric were measured, increasing from 0.
        drops: Drops of the metric when only one weight tensor is pruned, as an array of shape
            (weight tensors, sparsities).
        sizes: Number of entries in each weight tensor.
        sparsity: Fraction of zeros over all weights.

    Returns:
        A float64 array with one sparsity per weight tensor, in [0, max(sparsities)].

    Raises:
        ValueError: If `sparsity` exceeds the highest measured sparsity, or if a drop of the metric
            is not a finite number.

    Example:
        >>> drops = [[0.0, 0.1, 0.5], [0.0, 0.0, 0.1]]
        >>> keras_dst.allocation.equal_drop([0.0, 0.5, 0.9], drops, [10, 10], 0.7)
        array([0.5, 0.9])
    """
    check_sparsity(sparsity)
    grid, drops, counts = (np.asarray(x, "float64") for x in (sparsities, drops, sizes))
    if sparsity > grid[-1]:
        raise ValueError(
            f"Expected a sparsity of at most {grid[-1]:g}, the highest measured sparsity. "
            f"Received: {sparsity:g}"
        )
    if not np.isfinite(drops).all():
        raise ValueError(f"Expected finite drops of the metric. Received: {drops.tolist()}")
    drops = np.maximum.accumulate(np.maximum(drops, 0), axis=1)
    # Add a small slope, so that every curve is strictly increasing and therefore invertible.
    drops = drops / (drops.max() or 1.0) + 1e-6 * grid
    # The sparsity of each weight tensor is a piecewise linear function of the drop of the metric.
    # `common` contains all drops at which the slope of such a function can change.
    common = np.unique(drops)
    shares = np.array([np.interp(common, curve, grid) for curve in drops])
    return np.array([np.interp(sparsity * counts.sum(), counts @ shares, row) for row in shares])
