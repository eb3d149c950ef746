"""What of a model is zero, and what it costs: `report`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
import re
import textwrap
import warnings
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import layers
from rich.box import MARKDOWN
from rich.table import Table

from keras_dst import html, plots
from keras_dst.files import check_writable, whole_or_not
from keras_dst.surgery import check_model
from keras_dst.tables import as_text, count, percent
from keras_dst.weights import Weight, cells, weights_of

Shape = tuple[int, ...]

_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)

# Weights of layers other than Keras's that are looked up or added, and not multiplied.
_TABLES = re.compile(r"(embeddings?|tokens?)$")

# A model is traced with this batch where its Input leaves it open; 1 could be squeezed away.
_BATCH = 2
# What replaces other open sizes. Layers for which the two differ have no FLOPs of their own.
_SIZES = (128, 256)


@dataclass(frozen=True)
class WeightReport:
    """One prunable weight of a model.

    Attributes:
        name: path of the weight.
        layer: type of its layer.
        shape: its shape.
        parameters: number of its entries.
        nonzeros: entries that are neither zero nor masked.
        sparse: whether it is under a mask, of its layer or of a `SparseOptimizer`.
        uses: how often an entry is multiplied for one sample, None where that is not known.
        reason: why `uses` is None.
        cells: densities of its parts, as `plots.masks` draws them: inputs x outputs.

    Example:
        >>> keras_dst.report(model).layers[0].density
    """

    name: str
    layer: str
    shape: Shape
    parameters: int
    nonzeros: int
    sparse: bool
    uses: int | None
    reason: str | None
    cells: np.ndarray = field(repr=False, compare=False)

    @property
    def density(self) -> float:
        """Fraction of nonzeros."""
        return self.nonzeros / max(self.parameters, 1)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.density

    @property
    def flops(self) -> int | None:
        """Multiplications and additions for one sample, those with zeros left out."""
        return None if self.uses is None else 2 * self.nonzeros * self.uses

    @property
    def dense_flops(self) -> int | None:
        """Multiplications and additions for one sample."""
        return None if self.uses is None else 2 * self.parameters * self.uses

    def to_dict(self) -> dict[str, Any]:
        """All figures, in types that JSON knows."""
        own = {**dataclasses.asdict(self), "shape": list(self.shape)}
        del own["cells"]  # a picture
        derived = ("density", "sparsity", "flops", "dense_flops")
        return {**own, **{name: getattr(self, name) for name in derived}}


@dataclass(frozen=True)
class SparsityReport:
    """What `report` found: prints as a table.

    Attributes:
        model: name of the model.
        parameters: number of all weights: kernels, biases, normalisation and its statistics, and
            not the state that keras_dst adds. A shared layer counts once.
        nonzeros: how many of them are neither zero nor masked.
        bytes: size of all weights, zeros included, in the dtypes of the variables.
        layers: the prunable weights, in the model's order.

    Example:
        >>> print(keras_dst.report(model))
    """

    model: str
    parameters: int
    nonzeros: int
    bytes: int
    layers: list[WeightReport] = field(repr=False)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the prunable weights; 0 where there is none."""
        prunable = sum(row.parameters for row in self.layers)
        return 1 - sum(row.nonzeros for row in self.layers) / prunable if prunable else 0.0

    @property
    def total_sparsity(self) -> float:
        """Fraction of zeros among all weights; 0 where there is none."""
        return 1 - self.nonzeros / self.parameters if self.parameters else 0.0

    @property
    def flops(self) -> int | None:
        """FLOPs for one sample, each kernel's scaled with its density; None: see `reason`."""
        return _sum_known([row.flops for row in self.layers])

    @property
    def dense_flops(self) -> int | None:
        """FLOPs for one sample if no weight were zero; None: see `reason`."""
        return _sum_known([row.dense_flops for row in self.layers])

    @property
    def reason(self) -> str | None:
        """Why `flops` is None."""
        return "; ".join(dict.fromkeys(row.reason for row in self.layers if row.reason)) or None

    def to_dict(self) -> dict[str, Any]:
        """All figures, in types that JSON knows.

        Example:
            >>> json.dumps(keras_dst.report(model).to_dict())
        """
        names = ["model", "sparsity", "total_sparsity", "parameters", "nonzeros", "bytes"]
        names += ["flops", "dense_flops", "reason"]
        rows = [row.to_dict() for row in self.layers]
        return {**{name: getattr(self, name) for name in names}, "layers": rows}

    def __str__(self):
        table = Table(box=MARKDOWN)
        for name in ("weight", "layer", "shape"):
            table.add_column(name, no_wrap=True)
        for name in ("weights", "nonzero", "sparsity", "FLOPs", "dense FLOPs"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("masked")
        for row in self.layers:
            shape = " x ".join(str(n) for n in row.shape)
            figures = _figures(row.parameters, row.nonzeros, row.flops, row.dense_flops)
            table.add_row(row.name, row.layer, shape, *figures, "yes" if row.sparse else "")
        table.add_row()
        prunable = sum(row.parameters for row in self.layers)
        kept = sum(row.nonzeros for row in self.layers)
        figures = _figures(prunable, kept, self.flops, self.dense_flops)
        table.add_row("total of these", "", "", *figures)
        table.add_row("all weights", "", "", *_figures(self.parameters, self.nonzeros)[:3])
        lines = [f"{self.model}: {percent(self.sparsity)} sparse, {self.bytes:,} bytes if dense"]
        lines += [
            line.rstrip() for line in as_text(table, width=10_000).splitlines() if line.strip()
        ]
        if self.reason:
            lines.append(f"FLOPs are not known: {self.reason}.")
        return "\n".join(lines)

    def plot(self, ax=None):
        """Bar chart of the density of every prunable weight.

        Args:
            ax: the matplotlib axes to draw on; by default those of a new figure.

        Returns:
            The axes.

        Raises:
            ImportError: without matplotlib.

        Example:
            >>> keras_dst.report(model).plot().figure.savefig("density.png")
        """
        return plots.density(self, ax)

    def to_html(self) -> str:
        """A page with the summary, the table, the densities and heat maps of the masks.

        It is whole in itself: no scripts, and nothing is loaded from elsewhere.

        Raises:
            ImportError: without matplotlib or jinja2.

        Example:
            >>> IPython.display.HTML(keras_dst.report(model).to_html())
        """
        return html.page(self)

    def save_html(self, path) -> None:
        """Write the page of `to_html` to a file, which is whole or not there.

        Args:
            path: of the file; one that exists is replaced.

        Raises:
            OSError: where the file cannot be written.
            ImportError: without matplotlib or jinja2.

        Example:
            >>> keras_dst.report(model).save_html("report.html")
        """
        path = pathlib.Path(path)
        check_writable(path)
        text = self.to_html()
        with whole_or_not(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def report(model) -> SparsityReport:
    """Count what of a model is zero, and what it costs.

    Works on every built Keras model: dense, made sparse by `sparsify`, trained with
    `SparseOptimizer`, or stripped. A weight counts as zero where it is 0 or its mask is. Prunable
    are the weights under a mask and all other kernels, frozen ones included.

    FLOPs are those of the prunable weights in inference on one sample, a multiplication and an
    addition being 2; padding counts as input. They come from one symbolic call of the model, so a
    shared layer counts as often as it is called, an RNN cell once per time step, and a layer that
    inference does not call as 0. They are None, with the reason, where the model's input shape is
    not known or leaves open a size they depend on, and for a weight of a user's own layer that is
    neither a matrix over the last axis of an input, nor that of a convolution, nor named as a token
    or an embedding, which cost nothing.

    Args:
        model: a built Keras 3 model or layer; it is left as it was.

    Returns:
        A `SparsityReport`.

    Raises:
        TypeError: for a model that is not a Keras 3 model.
        ValueError: for an unbuilt model.

    Example:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> keras_dst.report(model).dense_flops
        64
    """
    check_model(model)
    weights = weights_of(model)
    uses = iter(_uses(model, [weight for weight in weights if weight.prunable]))
    nonzeros = 0
    rows = []
    for weight in weights:
        kept = weight.kept()
        number = int(np.count_nonzero(kept))
        nonzeros += number
        if weight.prunable:
            times, reason = next(uses)
            rows.append(
                WeightReport(
                    name=weight.variable.path,
                    layer=type(weight.layers[0]).__name__,
                    shape=tuple(weight.variable.shape),
                    parameters=weight.parameters,
                    nonzeros=number,
                    sparse=weight.sparse,
                    uses=times,
                    reason=reason,
                    cells=cells(kept, weight.layout),
                )
            )
    return SparsityReport(
        model=model.name,
        parameters=sum(weight.parameters for weight in weights),
        nonzeros=nonzeros,
        bytes=sum(weight.parameters * _bytes_each(weight.variable.dtype) for weight in weights),
        layers=rows,
    )


def _sum_known(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _figures(parameters, nonzeros, *flops) -> list[str]:
    sparsity = 1 - nonzeros / parameters if parameters else 0.0
    return [count(parameters), count(nonzeros), percent(sparsity), *map(count, flops)]


def _bytes_each(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)  # as in bfloat16 and float8_e4m3fn; bool has none
    return max(int(bits[0]) // 8, 1) if bits else 1


def uses_of(model) -> dict[int, tuple[int | None, str | None]]:
    """How often every prunable weight is multiplied for one sample, or None and the reason.

    By the id of its variable.
    """
    weights = [weight for weight in weights_of(model) if weight.prunable]
    return {id(w.variable): found for w, found in zip(weights, _uses(model, weights))}


# -- FLOPs ---------------------------------------------------------------------------------------


class _Unknown(Exception):
    """Why FLOPs cannot be told."""


@dataclass
class _Call:
    """A call of a layer: how often it happens, and the shapes of its tensors, with the batch."""

    times: int
    inputs: list[Shape]
    output: Shape


class _Trace(keras.Operation):
    """Calls a model on symbolic tensors, for inference, and notes the calls of layers inside."""

    # Attributes, because Keras serialises an operation's arguments.
    model: Any
    batch: int

    def __init__(self):
        super().__init__(name="trace")
        self.calls: dict[int, list[_Call]] = {}
        self.times = 1

    def call(self, args, kwargs):
        self.calls.clear()  # torch calls again where a model does not run on its meta device
        self.model(*args, training=False, **kwargs)
        return []

    @contextlib.contextmanager
    def watch(self, watched: list):
        """Note the calls of layers, by an attribute before the method of their class."""
        before = []
        try:
            for layer in watched:
                name = "quantized_call" if layer.quantization_mode else "call"
                before.append((layer.__dict__, name, layer.__dict__.get(name)))
                # Past Keras's tracking.
                layer.__dict__[name] = self._watched(layer, getattr(layer, name))
            yield
        finally:
            for attributes, name, old in before:
                if old is None:
                    attributes.pop(name, None)
                else:
                    attributes[name] = old

    def _watched(self, layer, call):
        @functools.wraps(call)
        def noted(*args, **kwargs):
            output = call(*args, **kwargs)
            noted_call = _Call(self.times, _shapes((args, kwargs)), _shapes(output)[0])
            self.calls.setdefault(id(layer), []).append(noted_call)
            return output

        # What an RNN calls, and how often, differs by backend. So count a step of it instead.
        @functools.wraps(call)
        def unrolled(sequences, *args, **kwargs):
            with self._repeat(sequences.shape[1]):
                layer.cell(sequences[:, 0], layer.get_initial_state(sequences.shape[0]))
            with self._repeat(0):
                return call(sequences, *args, **kwargs)

        return unrolled if isinstance(layer, layers.RNN) else noted

    @contextlib.contextmanager
    def _repeat(self, times: int):
        before, self.times = self.times, self.times * times
        try:
            yield
        finally:
            self.times = before


def _shapes(structure) -> list[Shape]:
    tensors = [x for x in keras.tree.flatten(structure) if hasattr(x, "shape")]
    return [tuple(x.shape) for x in tensors] or [()]


def _uses(model, weights: list[Weight]) -> list[tuple[int | None, str | None]]:
    """How often every weight is multiplied for one sample, or None and the reason."""
    watched = {id(layer): layer for weight in weights for layer in weight.layers}
    watched |= {id(x): x for x in model._flatten_layers() if isinstance(x, layers.RNN)}
    try:
        traces = _traces(model, list(watched.values()))
    except _Unknown as unknown:
        return [(None, str(unknown))] * len(weights)
    return [_agreed(weight, traces) for weight in weights]


def _agreed(weight: Weight, traces: list[_Trace]) -> tuple[int | None, str | None]:
    try:
        uses = {_uses_in(trace, weight) for trace in traces}
    except _Unknown as unknown:
        return None, str(unknown)
    if len(uses) > 1:
        return None, "they depend on a size that the Input leaves open"
    return uses.pop(), None


def _uses_in(trace: _Trace, weight: Weight) -> int:
    uses = sum(
        call.times * _places(layer, weight.variable, call)
        for layer in weight.layers
        for call in trace.calls.get(id(layer), ())
        if call.times
    )
    return uses // trace.batch


def _traces(model, watched: list) -> list[_Trace]:
    """Trace a model, with every size for the axes that its input leaves open."""
    unbuilt = [layer.name for layer in model._flatten_layers() if not layer.built]
    if unbuilt:  # a trace would build them
        raise _Unknown(f"'{unbuilt[0]}' is not built; call the model once on data")
    inputs = _inputs(model)
    tensors = keras.tree.flatten(inputs)
    batch = next((x.shape[0] for x in tensors if x.shape and x.shape[0]), _BATCH)

    def closed(x, size):
        shape = [batch, *(size if n is None else n for n in x.shape[1:])] if x.shape else []
        return keras.KerasTensor(shape, x.dtype, sparse=x.sparse)

    def traced(size):
        trace = _Trace()
        trace.model, trace.batch = model, batch
        with trace.watch(watched), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the model's own calls
            trace.compute_output_spec(*keras.tree.map_structure(lambda x: closed(x, size), inputs))
        return trace

    is_open = any(None in x.shape[1:] for x in tensors)
    try:
        return [traced(size) for size in (_SIZES if is_open else _SIZES[:1])]
    except Exception as error:
        text = re.sub(r"\x1b\[\d*m", "", str(error).split("Error encountered:\n")[-1])
        raise _Unknown(f"the model fails in a trace ({textwrap.shorten(text, 200)})") from error


def _inputs(model) -> tuple[tuple, dict]:
    """Arguments to call a model with, positional and by name, as KerasTensors."""
    inputs = getattr(model, "inputs", None)
    if inputs and all(isinstance(x, keras.KerasTensor) for x in inputs):
        return (inputs[0] if isinstance(model, keras.Sequential) else model.input,), {}
    shapes = model._build_shapes_dict
    if not shapes or any(shape is None for shape in shapes.values()):
        raise _Unknown("the model's input shape is not known; call it once on data")
    tensors = {
        name.removesuffix("_shape"): keras.tree.map_shape_structure(keras.KerasTensor, shape)
        for name, shape in shapes.items()
    }
    return ((*tensors.values(),), {}) if len(tensors) == 1 else ((), tensors)


def _places(layer, variable, call: _Call) -> int:
    """At how many places of its tensors, over the batch, a layer applies the whole of a weight."""
    shape, x, y = tuple(variable.shape), call.inputs[0], call.output
    if any(None in tensor for tensor in (x, y)):
        raise _Unknown(f"the shapes in {layer.name} are not known")
    if isinstance(layer, _TRANSPOSED):
        return _points(layer, x)
    if hasattr(layer, "kernel_size"):
        return _points(layer, y)
    if isinstance(layer, layers.EinsumDense):
        inputs, kernel = re.split(",|->", layer.equation.replace(" ", ""))[:2]
        applied = (n for letter, n in zip(kernel, shape) if letter in inputs)
        return math.prod(x) // math.prod(applied)
    if isinstance(layer, layers.Embedding):
        return _reversed_places(layer, variable, x, y)
    if _TABLES.search(variable.name):
        return 0
    for tensor in call.inputs:
        if len(shape) == 2 and tensor[-1:] == shape[:1]:
            return math.prod(tensor[:-1])
    raise _Unknown(f"what {type(layer).__name__} does with {variable.path} is not known")


def _points(layer, shape: Shape) -> int:
    """Points in time or space of a convolution's input or output, over the batch."""
    first = getattr(layer, "data_format", None) == "channels_first"
    return math.prod(shape[:1] + shape[2:] if first else shape[:-1])


def _reversed_places(layer, variable, x: Shape, y: Shape) -> int:
    """An embedding looks up, at no cost, or goes back from vectors to scores of tokens."""
    if len(y) > len(x):
        return 0
    tied = getattr(layer, "tie_weights", True)
    return math.prod(x[:-1]) if tied or variable.name == "reverse_embeddings" else 0
