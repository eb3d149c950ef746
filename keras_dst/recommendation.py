"""Recommend a pruning method for a sparsity, a pattern and a number of epochs.

Recommendations are based on measured figures in the folder results/, which is not installed with
the package. This module therefore contains copies of the measured figures. A test compares these
copies with the files in results/. `Figure.method` names the pruning method with the highest mean
accuracy. If Magnitude is nearly as accurate as this method, `Figure.method` names Magnitude,
because Magnitude has the lowest training cost. Magnitude counts as nearly as accurate if the mean
accuracies of the two methods differ by at most the sum of their standard deviations.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import asdict, dataclass

from keras_dst._utils.validation import check_integer, is_number
from keras_dst.export.target_reports import ACCELERATORS
from keras_dst.masks import Pattern


@dataclass(frozen=True)
class Figure:
    """Result of a benchmark of pruning methods. All methods had the same pattern, sparsity and
    number of epochs.

    Attributes:
        method: Name of the recommended method.
        pattern: Sparsity pattern, such as `"1x4"`.
        sparsity: Fraction of zeros.
        epochs: Number of epochs of each training run.
        net: Names of the network and the data set.
        accuracy: Test accuracy of `method` in percent, averaged over the seeds.
        magnitude: Test accuracy of Magnitude in percent, averaged over the seeds.
        dense: Test accuracy of the dense baseline in percent, or None if no dense baseline was
            trained.
        compared: Number of compared pruning methods. Variants count as methods.
        seeds: Number of training runs per method, each with its own seed.
        source: Name of the folder in results/ that contains the measured training runs.
    """

    method: str
    pattern: str
    sparsity: float
    epochs: int
    net: str
    accuracy: float
    magnitude: float
    dense: float | None
    compared: int
    seeds: int
    source: str

    def __str__(self) -> str:
        others = "" if self.method == "Magnitude" else f" Magnitude: {self.magnitude:.2f} %."
        others += "" if self.dense is None else f" Dense network: {self.dense:.2f} %."
        return (
            f"{self.accuracy:.2f} % test accuracy with {self.method}, {100 * self.sparsity:g} % "
            f"sparsity ({self.pattern}), {self.epochs} epochs, {self.net}.{others} "
            f"Source: results/{self.source}."
        )


_RESNET32 = "ResNet-32 (16-32-64), CIFAR-10"
_RESNET8 = "ResNet-8 with a first stride of 2, CIFAR-10"
_LENET5 = "LeNet-5, MNIST"
_LENET300 = "LeNet-300-100, MNIST"
_WIDE_RESNET8 = "ResNet-8 of width 32 with a first stride of 2, CIFAR-10"

#: Each `Figure` compares pruning methods for one combination of pattern, sparsity and number of
# epochs.
FIGURES = (
    Figure("DCIL", "unstructured", 0.95, 100, _RESNET32, 91.61, 89.97, 93.06, 6, 1, "papers"),
    Figure("Magnitude", "unstructured", 0.9, 5, _LENET5, 98.79, 98.79, 98.97, 11, 3, "methods"),
    Figure("DCIL", "unstructured", 0.95, 5, _LENET300, 97.69, 97.38, None, 9, 3, "patterns"),
    Figure("ST3", "unstructured", 0.98, 5, _LENET5, 98.47, 97.69, 98.97, 11, 3, "methods"),
    Figure("ST3", "unstructured", 0.9, 3, _RESNET8, 63.0, 60.82, 64.62, 11, 3, "methods"),
    Figure("ST3", "unstructured", 0.98, 3, _RESNET8, 55.9, 49.78, 64.62, 11, 3, "methods"),
    Figure("DCIL", "1x4", 0.9, 5, _LENET300, 97.84, 97.62, None, 9, 3, "patterns"),
    Figure("DCIL", "1x4", 0.95, 5, _LENET300, 97.56, 97.16, None, 9, 3, "patterns"),
    Figure("DCIL", "1x16", 0.9, 5, _LENET300, 97.47, 97.17, None, 9, 3, "patterns"),
    Figure("DCIL", "1x16", 0.95, 5, _LENET300, 96.89, 96.45, None, 9, 3, "patterns"),
    Figure("Magnitude", "channel", 0.9, 5, _LENET300, 96.68, 96.68, None, 9, 3, "patterns"),
    Figure("Magnitude", "channel", 0.95, 5, _LENET300, 95.14, 95.14, None, 9, 3, "patterns"),
    Figure("Magnitude", "2:4", 0.5, 4, _WIDE_RESNET8, 71.61, 71.61, 73.09, 1, 1, "micro"),
)

#: Costs of the network `_WIDE_RESNET8` on edge devices, relative to the dense int8 file, from
# results/micro. The keys of `TARGETS` are export targets. In a nested dict, a key is a sparsity
# in percent, such as "80", or a pattern, such as "2:4". A value is a pair of relative costs. For an
# NPU, Vela estimated the costs: the size of the weights and the number of cycles. For `micro`
# (TFLM), the costs are the size of the file and the size of the tensor arena.
TARGETS: dict[str, dict[str, tuple[float, float]]] = {
    "micro": {"80": (0.338, 4.897), "90": (0.247, 4.897), "95": (0.202, 4.897)},
    "ethos-u55-128": {
        **{"80": (0.294, 0.454), "90": (0.16, 0.42), "95": (0.094, 0.417)},
        "2:4": (0.634, 0.722),
    },
    "ethos-u65-256": {
        **{"80": (0.294, 0.994), "90": (0.16, 0.992), "95": (0.094, 0.992)},
        "2:4": (0.634, 0.992),
    },
    "ethos-u85-256": {
        **{"80": (0.267, 0.805), "90": (0.147, 0.8), "95": (0.087, 0.643)},
        "2:4": (0.578, 0.611),
    },
}
_CPUS = ("host", "arm", "any")
# For each family of NPUs, the NPU that was measured: for example, ethos-u55-128 for ethos-u55.
_FAMILIES = {name[:9]: name for name in TARGETS if name != "micro"}


@dataclass(frozen=True)
class Recommendation:
    """Recommended pruning method, and the measurements on which the recommendation is based.

    Attributes:
        method: Python expression that creates the method, such as `"DCIL(sparsity=0.95)"`.
        figure: Measured comparison of pruning methods.
        notes: Sentences about the differences between the measured training run and your training
            run, and about the target.
    """

    method: str
    figure: Figure
    notes: tuple[str, ...]

    def to_dict(self) -> dict:
        """Return the recommendation as a dict that can be written as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"Figure: {self.figure}", *(f"Note:   {note}" for note in self.notes)]
        lines = [textwrap.fill(line, 96, subsequent_indent=" " * 8) for line in lines]
        return "\n".join([f"Method: keras_dst.methods.{self.method}", *lines])


def recommend(
    sparsity: float, epochs: int, pattern: str = "unstructured", target: str | None = None
) -> Recommendation:
    """Return the pruning method with the highest measured accuracy in a similar training run.

    If no training run was measured with the requested arguments, the function uses the most similar
    measured run, and adds a note. To find the most similar run, the function first compares
    patterns, then numbers of epochs, then densities.

    Args:
        sparsity: Fraction of weights to prune, between 0 and 1.
        epochs: Number of epochs of your training run, at least 1.
        pattern: Sparsity pattern, as in the argument `pattern` of pruning methods. Defaults to
            `"unstructured"`.
        target: Device that will run the model, as in the argument `target` of
            `keras_dst.export_tflite`. Defaults to None, which adds no notes about a device.

    Returns:
        A `Recommendation`. `print` shows the method, the measured comparison and the notes.

    Raises:
        ValueError: If an argument is out of range or unknown, or if `sparsity` differs from the
            sparsity of an N:M pattern.

    Example:
        >>> print(recommend(0.95, epochs=100).method)
        DCIL(sparsity=0.95)
    """
    if not (is_number(sparsity) and 0 < sparsity < 1):
        raise ValueError(f"sparsity must be between 0 and 1. Received: sparsity={sparsity!r}")
    check_integer(epochs, "epochs")
    similar = _measured_pattern(pattern, sparsity)
    if similar == "unstructured":
        pattern = similar  # The pattern "1x1" is another name for "unstructured".
    figure = min(
        (figure for figure in FIGURES if figure.pattern == similar),
        key=lambda figure: (
            abs(math.log(figure.epochs / epochs)),
            abs(math.log((1 - figure.sparsity) / (1 - sparsity))),
        ),
    )
    notes = []
    missing = [f"the pattern {pattern}"] if figure.pattern != pattern else []
    if figure.epochs != epochs:
        missing.append(f"{epochs} epochs")
    if not math.isclose(figure.sparsity, sparsity):
        missing.append(f"{100 * sparsity:g} % sparsity")
    if missing:
        notes.append(f"Not measured: {', '.join(missing)}. The figure is the nearest one.")
    if figure.compared == 1:
        notes.append(f"No other method was measured with {figure.pattern}.")
    elif figure.method == "Magnitude":
        notes.append("No method is ahead of Magnitude by more than the deviation between seeds.")
    if figure.seeds == 1:
        notes.append("Every method was trained once, so the deviation between seeds is unknown.")
    if target is not None:
        notes += _target_notes(target, pattern, sparsity)
    given = "" if pattern == "unstructured" else f", pattern={pattern!r}"
    method = f"{figure.method}(sparsity={float(sparsity)!r}{given})"
    return Recommendation(method, figure, tuple(notes))


def _measured_pattern(name: str, sparsity: float) -> str:
    """Return the most similar pattern for which measured figures exist."""
    pattern = Pattern(name)
    if pattern.n_of_m:
        kept, of = pattern.n_of_m
        if not math.isclose(sparsity, 1 - kept / of):
            raise ValueError(
                f"The pattern {name} fixes the sparsity at {1 - kept / of:g}. Received: "
                f"sparsity={sparsity!r}. Fix: pass the sparsity of the pattern, or pass "
                "another pattern."
            )
        return "2:4"
    if name == "channel" or not pattern.grouped:
        return name if name == "channel" else "unstructured"
    size = math.prod(int(length) for length in name.split("x"))
    return "1x4" if size <= 8 else "1x16"


def _target_notes(target: str, pattern: str, sparsity: float) -> list[str]:
    """Return notes about the measured size and speed of sparse models on the target."""
    if not isinstance(target, str):
        raise ValueError(f"target must be a string or None. Received: target={target!r}")
    if target in _CPUS:
        return [
            f"No figure for the target {target}: keras_dst.export_tflite compares the latency of "
            "sparse and dense files on a CPU."
        ]
    if target not in ("micro", *ACCELERATORS):
        raise ValueError(
            f"target must be one of {', '.join((*_CPUS, 'micro', *ACCELERATORS))}. "
            f"Received: target={target!r}"
        )
    measured = target if target in TARGETS else _FAMILIES[target[:9]]
    notes = []
    if measured != target:
        notes.append(f"Not measured: {target}. The nearest target is {measured}.")
    variants = TARGETS[measured]
    levels = [name for name in variants if name.isdigit()]
    if pattern in variants:
        variant = pattern
    elif pattern == "unstructured":
        variant = min(
            levels, key=lambda name: abs(math.log((1 - int(name) / 100) / (1 - sparsity)))
        )
    else:
        return [*notes, f"No figure for the pattern {pattern} on {measured}."]
    notes.append(_target_note(measured, variant))
    if measured != "micro" and variants["2:4"][1] < variants[variant][1]:
        notes.append(f"Fewer cycles with another pattern: {_target_note(measured, '2:4')}")
    return notes


def _target_note(target: str, variant: str) -> str:
    size, other = TARGETS[target][variant]
    zeros = f"{variant} % zeros" if variant.isdigit() else f"the pattern {variant}"
    if target == "micro":
        ratios = f"{size:g} of the bytes of the dense int8 file, {other:g} times its arena"
    else:
        ratios = (
            f"{size:g} of the bytes of the dense int8 weights and {other:g} of the cycles, by "
            "estimates of Vela"
        )
    return f"{target}, {zeros}: {ratios} ({_WIDE_RESNET8}, results/micro)."
