"""Encode files for TensorFlow Lite for Microcontrollers. Zero weights are not stored.

TensorFlow Lite for Microcontrollers (TFLM) decodes compressed constants with the custom op
``TFLM_DECODE``. In the pruning format of ``TFLM_DECODE``, a weight tensor is stored as two
constants:

* The first constant is a bitmap with one bit per entry of the weight tensor. A bit is 1 if the
  entry is nonzero. The most significant bit of a byte comes first.
* The second constant is a header of 16 bytes, followed by the nonzero entries of the weight tensor
  in row-major order. Byte 0 of the header is the decode type, 2 for pruning. Byte 1 is the version
  of the header, and byte 4 is the version of the pruning format. Both versions are 1.

TFLM writes the decoded weight into its memory arena, from which other ops read the weight. An
encoded file is smaller than the dense file, but needs a larger arena. The pruning format does not
make inference faster, because weights are decoded during inference.

Source: ``kernels/decode_state_prune.cc`` in the repository of TFLM.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from keras_dst.export.encode import Weight, weights
from keras_dst.export.flatbuffer import add_tensor, indices, op_name, read, text, write
from keras_dst.export.origins import layer_at
from keras_dst.export.quantize import to_int8
from keras_dst.export.report import ExportError, TensorReport, gzip_bytes
from keras_dst.export.target_reports import MicroReport

DECODE = "TFLM_DECODE"
NEEDS_TFLM = "Running a file for microcontrollers needs TFLM. Fix: pip install keras_dst[micro]."
_OP_NAMES = """
    ABS ADD ADD_N ARG_MAX ARG_MIN ASSIGN_VARIABLE AVERAGE_POOL_2D BATCH_MATMUL
    BATCH_TO_SPACE_ND BROADCAST_ARGS BROADCAST_TO CALL_ONCE CAST CEIL CONCATENATION CONV_2D COS
    CUMSUM DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE DIV DYNAMIC_UPDATE_SLICE ELU
    EMBEDDING_LOOKUP EQUAL EXP EXPAND_DIMS FILL FLOOR FLOOR_DIV FLOOR_MOD FULLY_CONNECTED
    GATHER GATHER_ND GREATER GREATER_EQUAL HARD_SWISH IF L2_NORMALIZATION L2_POOL_2D LEAKY_RELU
    LESS LESS_EQUAL LOG LOGICAL_AND LOGICAL_NOT LOGICAL_OR LOGISTIC LOG_SOFTMAX MAXIMUM
    MAX_POOL_2D MEAN MINIMUM MIRROR_PAD MUL NEG NOT_EQUAL PACK PAD PADV2 PRELU QUANTIZE
    READ_VARIABLE REDUCE_ALL REDUCE_MAX REDUCE_MIN RELU RELU6 RESHAPE RESIZE_BILINEAR
    RESIZE_NEAREST_NEIGHBOR REVERSE_V2 ROUND RSQRT SELECT_V2 SHAPE SIN SLICE SOFTMAX
    SPACE_TO_BATCH_ND SPACE_TO_DEPTH SPLIT SPLIT_V SQRT SQUARE SQUARED_DIFFERENCE SQUEEZE
    STRIDED_SLICE SUB SUM SVDF TANH TRANSPOSE TRANSPOSE_CONV UNIDIRECTIONAL_SEQUENCE_LSTM
    UNPACK VAR_HANDLE WHILE ZEROS_LIKE
"""
#: Builtin ops that the op resolver of TFLM can register.
OPS = frozenset(_OP_NAMES.split())
_WORKER = Path(__file__).with_name("micro_worker.py")
_PRUNING_HEADER = np.array([2, 1, 0, 0, 1, *[0] * 11], np.uint8)
# Number of bytes that `_arena_limit` adds to the estimated size of all tensors.
_SPARE_ARENA = 1 << 24


@dataclass(frozen=True)
class Run:
    """Result of a run in TFLM: one array per output, and the size of the arena in bytes."""

    outputs: list[np.ndarray]
    arena: int


def check_tflm() -> None:
    """Raise ImportError unless the interpreter of TFLM is installed."""
    if importlib.util.find_spec("tflite_micro") is None:
        raise ImportError(NEEDS_TFLM)


def encode_for_micro(content: bytes) -> tuple[bytes, list[TensorReport]]:
    """Remove the zeros of each int8 weight from a dense file if the file then becomes smaller.

    Args:
        content: Bytes of a file with dense int8 weights, integer ops, and int8 inputs and outputs.

    Returns:
        The encoded file, and one report per weight tensor.

    Example:
        >>> smaller, tensors = encode_for_micro(path.read_bytes())
    """
    chosen: list[int] = []
    smallest = _with_decode(content, chosen)
    reports = []
    for weight in weights(read(content)):
        reason, stored = _unfit_reason(weight), weight.values.nbytes
        if not reason:
            trial = _with_decode(content, [*chosen, weight.buffer])
            if len(trial) < len(smallest):
                chosen.append(weight.buffer)
                smallest = trial
                stored = sum(part.nbytes for part in _pruned(weight.values))
            else:
                reason = "the bitmap would take more bytes than the zeros that it replaces"
        reports.append(
            TensorReport(
                name=weight.name,
                op=weight.op,
                shape=weight.values.shape,
                density=weight.density,
                encoding=f"{weight.values.dtype} {'dense' if reason else 'bitmap'}",
                bytes=stored,
                dense_bytes=weight.values.nbytes,
                reason=reason,
            )
        )
    return smallest, reports


def unsupported_ops(
    model: schema.ModelT, layers: Collection[str] = ()
) -> list[tuple[str, str, str]]:
    """Return the ops of a file that TFLM does not support.

    Args:
        model: A ``.tflite`` file.
        layers: Names of the layers of the Keras model. Defaults to no names.

    Returns:
        A list with one triple per op: the op's name, the name of its first output, and a text such
        as ``"in layer 'dense'"``. The text is empty if the Keras layer that contains the op is
        unknown.
    """
    found = []
    for graph in model.subgraphs:
        for op in graph.operators:
            name, code = op_name(model, op), model.operatorCodes[op.opcodeIndex]
            if name not in OPS and text(code.customCode) != DECODE:
                output = text(graph.tensors[op.outputs[0]].name)
                found.append((name, output, _origin(graph, op, layers)))
    return found


def _origin(graph: schema.SubGraphT, op: schema.OperatorT, names: Collection[str]) -> str:
    """Return a text that names the Keras layer of an op, or the last layer before the op.

    For an op that is outside all layers or computes a model output, the file contains no layer
    name.

    Args:
        graph: The graph of the file.
        op: An op of the graph.
        names: Names of the layers of the Keras model.

    Returns:
        Text such as ``"in layer 'dense'"`` or ``"after layer 'dense'"``. The text is empty if the
        op has no layer, and no layer before the op is found.
    """
    producers = {index: other for other in graph.operators for index in indices(other.outputs)}
    word, tensors = "in", indices(op.outputs)
    while tensors:
        for index in tensors:
            name = layer_at(text(graph.tensors[index].name), names)
            if name:
                return f"{word} layer {name!r}"
        word, before = "after", [producers[index] for index in tensors if index in producers]
        tensors = list(dict.fromkeys(i for other in before for i in indices(other.inputs)))
    return ""


def check_ops(content: bytes, layers: Collection[str]) -> None:
    """Raise ExportError if a file contains ops that TFLM does not support.

    Args:
        content: Bytes of the file.
        layers: Names of the layers of the Keras model, for the error message.
    """
    missing = unsupported_ops(read(content), layers)
    if missing:
        listed = ", ".join(f"{name} ({' '.join(place).strip()})" for name, *place in missing)
        raise ExportError(
            f"Expected a file whose ops TFLM supports. Received: {listed}. Fix: replace the layers "
            "from which the rejected ops come."
        )


def run_in_tflm(content: bytes, inputs: list[np.ndarray]) -> Run:
    """Run a file in TFLM on each row of the inputs.

    Args:
        content: The file.
        inputs: One array of shape `(runs, *shape)` per input of the file, where `shape` is the
            shape of the input. Each array has the data type of its input.

    Raises:
        ImportError: If the extra `micro` is not installed.
        ExportError: If TFLM refuses the file.
    """
    check_tflm()
    model = read(content)
    (graph,) = model.subgraphs[:1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.tflite").write_bytes(content)
        arrays = {f"input_{place}": array for place, array in enumerate(inputs)}
        arrays["outputs"] = np.array(len(graph.outputs))
        np.savez(folder / "inputs.npz", allow_pickle=False, **arrays)
        paths = [str(folder / name) for name in ("model.tflite", "inputs.npz", "outputs.npz")]
        # Without the option -P, Python would import modules from the folder of the worker script in
        # place of standard modules with the same name.
        command = [sys.executable, "-P", str(_WORKER), *paths, str(_arena_limit(model))]
        done = subprocess.run(command, capture_output=True, text=True)
        log = done.stdout + done.stderr
        used = re.search(r"Arena allocation total (\d+) bytes", log)
        if done.returncode or used is None:
            # TFLM prints the reason for the failure before Python prints the traceback.
            lines = [line for line in log.partition("Traceback")[0].splitlines() if line.strip()]
            raise ExportError(
                "Expected a file that TFLM can run. Received: TFLM stopped with exit code "
                f"{done.returncode}: {' '.join(lines[-3:])} Fix: replace the layers from which the "
                "rejected ops come."
            )
        with np.load(folder / "outputs.npz") as loaded:
            outputs = [loaded[f"output_{place}"] for place in range(len(graph.outputs))]
    return Run(outputs, int(used[1]))


def report_for(content: bytes, dense: bytes, inputs: list[np.ndarray]) -> MicroReport:
    """Compare the outputs and the sizes of an exported file and of the dense int8 file in TFLM.

    Raises:
        ExportError: If the outputs of the file differ from the outputs of the dense int8 file in at
        least one bit.
    """
    own, reference = run_in_tflm(content, inputs), run_in_tflm(dense, inputs)
    for place, (y, expected) in enumerate(zip(own.outputs, reference.outputs, strict=True)):
        if not np.array_equal(y, expected):
            raise ExportError(
                f"Expected output {place} of the file to equal the output of the dense int8 file "
                "bit for bit in TFLM. Received: different values. Nothing was written. Please "
                "report this model."
            )
    return MicroReport(
        bytes=len(content),
        dense_bytes=len(dense),
        unread_bytes=len(dense) - len(_with_decode(dense, [])),
        dense_gzip_bytes=gzip_bytes(dense),
        arena=own.arena,
        dense_arena=reference.arena,
        samples=len(inputs[0]),
    )


def quantized_inputs(content: bytes, samples: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Convert samples to arrays with the shapes and types of a file's inputs.

    In each returned array, `array[i]` is the input of run i.

    Args:
        content: Bytes of the file. The last batch is left out if the samples do not fill the last
            batch.
        samples: Dict from input names to arrays of floats or integers. Samples are along the first
            axis.

    Raises:
        ExportError: If the file has an input whose shape is not fixed.
    """
    model = read(content)
    graph, names = model.subgraphs[0], _input_names(model)
    found = []
    for index in graph.inputs:
        tensor = graph.tensors[index]
        array = samples[names[int(index)]]
        # A `.tflite` file stores an unknown size of a tensor as 1.
        if array.shape[1:] != tuple(tensor.shape[1:]):
            raise ExportError(
                "Expected fixed input shapes, which TFLM needs. Received: an input "
                f"{names[int(index)]!r} whose shape is not fixed. Fix: build the model with the "
                f"shape of the samples, keras.Input({array.shape[1:]})."
            )
        if tensor.type == schema.TensorType.INT8 and array.dtype.kind == "f":
            quantization = tensor.quantization
            array = to_int8(array, quantization.scale[0], quantization.zeroPoint[0])
        runs = len(array) // tensor.shape[0]
        found.append(array[: runs * tensor.shape[0]].reshape(runs, *tensor.shape))
    return found


def _input_names(model: schema.ModelT) -> dict[int, str]:
    signature = model.signatureDefs[0]
    return {int(entry.tensorIndex): text(entry.name) for entry in signature.inputs}


def _arena_limit(model: schema.ModelT) -> int:
    tensors = [tensor for graph in model.subgraphs for tensor in graph.tensors]
    sizes = [4 * int(np.prod(t.shape)) for t in tensors if t.shape is not None and len(t.shape)]
    return _SPARE_ARENA + 2 * sum(sizes)


def _unfit_reason(weight: Weight) -> str:
    """Return why TFLM cannot decode a weight, or an empty string if TFLM can decode the weight."""
    quantization = weight.tensors[0].quantization
    if weight.values.dtype != np.int8 or quantization is None or quantization.scale is None:
        return "it is not quantized to int8"
    if any(name == "OUTPUT" for name, _ in weight.readers):
        return "it is an output of the model"
    if np.any(quantization.zeroPoint):
        return "its zeros are not stored as 0"
    if quantization.quantizedDimension not in (0, weight.values.ndim - 1):
        return "TFLM decodes scales along the first or the last axis"
    return ""


def _pruned(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the two constants that store a weight: the bitmap, and the header followed by the
    nonzero entries."""
    flat = values.reshape(-1)
    kept = flat != 0
    return np.packbits(kept), np.concatenate([_PRUNING_HEADER, flat[kept].view(np.uint8)])


def _with_decode(content: bytes, buffers: Collection[int]) -> bytes:
    """Return a copy of a file in which the weights of the given buffers are stored without zeros.

    The function also removes data that TFLM does not need: metadata, the scales of biases, and all
    zero points of a weight except the first.
    """
    model = read(content)
    found = {weight.buffer: weight for weight in weights(model) if weight.buffer in buffers}
    code = _decode_op_code(model) if found else -1
    model.metadata = None  # TFLM does not read the metadata, such as versions of converters.
    for graph in model.subgraphs:
        encoded: dict[int, tuple[int, int]] = {}
        for index, tensor in list(enumerate(graph.tensors)):
            # If ops were merged, the converter joins their names with semicolons.
            tensor.name = text(tensor.name).split(";")[0]
            if tensor.buffer in found:
                encoded[index] = _add_constants(model, graph, found[tensor.buffer].values)
                # The DECODE op computes the tensor, so the tensor refers to buffer 0, which is
                # always empty.
                tensor.buffer = 0
            elif tensor.type == schema.TensorType.INT32:
                tensor.quantization = None  # TFLM computes the scales of biases itself.
            _shorten_zero_points(tensor.quantization)
        free = set(encoded)
        graph.operators = [
            new for op in graph.operators for new in _decoded_reads(graph, op, encoded, free, code)
        ]
    for buffer in buffers:
        model.buffers[buffer].data = None
    return write(model)


def _shorten_zero_points(quantization: schema.QuantizationParametersT | None) -> None:
    """Store a single zero point for a weight if the zero points of all its channels are equal. TFLM
    reads only one zero point per weight."""
    points = None if quantization is None else quantization.zeroPoint
    if quantization is not None and points is not None and len(np.unique(points)) == 1:
        quantization.zeroPoint = points[:1]


def _decode_op_code(model: schema.ModelT) -> int:
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
    code.customCode, code.version = DECODE, 1
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def _add_constants(
    model: schema.ModelT, graph: schema.SubGraphT, values: np.ndarray
) -> tuple[int, int]:
    """Add the bitmap and the nonzero entries of a weight to the graph as two constants, and return
    the tensor indices of both constants."""
    places = []
    for data in _pruned(values):
        buffer, constant = schema.BufferT(), schema.TensorT()
        buffer.data = data
        model.buffers.append(buffer)
        constant.type, constant.shape = schema.TensorType.UINT8, np.array(data.shape, np.int32)
        constant.buffer = len(model.buffers) - 1
        places.append(add_tensor(graph, constant))
    return places[0], places[1]


def _decoded_reads(
    graph: schema.SubGraphT,
    op: schema.OperatorT,
    encoded: dict[int, tuple[int, int]],
    free: set[int],
    code: int,
) -> list[schema.OperatorT]:
    """Return a list that contains the given op.

    If the given op reads encoded weights, the list begins with a DECODE op.

    TFLM keeps a decoded weight only until the next op has run. If several ops read a weight, the
    weight is therefore decoded once per op, each time into a separate tensor.

    Args:
        graph: The graph. The function adds tensors to the graph.
        op: An op of the graph.
        encoded: Dict that maps the tensor index of each encoded weight to a pair of tensor indices.
            The pair refers to the weight's bitmap and to the weight's nonzero values.
        free: Tensor indices of the weights that no DECODE op computes yet. If the given op reads a
            weight, the function removes the index of the weight from `free`.
        code: Op code index of TFLM_DECODE.
    """
    reads = dict.fromkeys(index for index in indices(op.inputs) if index in encoded)
    if not reads:
        return [op]
    outputs = {}
    for index in reads:
        outputs[index] = index
        if index not in free:
            outputs[index] = add_tensor(graph, copy.copy(graph.tensors[index]))
    free.difference_update(reads)
    decode = schema.OperatorT()
    decode.opcodeIndex = code
    decode.inputs = np.array([place for index in reads for place in encoded[index]], np.int32)
    decode.outputs = np.array(list(outputs.values()), np.int32)
    op.inputs = np.array([outputs.get(int(index), index) for index in op.inputs], np.int32)
    return [decode, op]
