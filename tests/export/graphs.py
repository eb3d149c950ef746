"""Builders of small ``.tflite`` files, and a simple decoder of sparse weights for comparison."""

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from keras_dst.export.encode import pack
from keras_dst.export.flatbuffer import read, write

AUTO = OpResolverType.AUTO
BUILTIN = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES

TYPES = {
    "float32": schema.TensorType.FLOAT32,
    "float16": schema.TensorType.FLOAT16,
    "int8": schema.TensorType.INT8,
    "int32": schema.TensorType.INT32,
    "int64": schema.TensorType.INT64,
}


class File:
    """Builder of a ``.tflite`` file, which may have several graphs, each with its own signature."""

    def __init__(self):
        self.model = schema.ModelT()
        self.model.version = 3
        self.model.description = "made by hand"
        self.model.buffers = [schema.BufferT()]
        self.model.operatorCodes = []
        self.model.subgraphs = []
        self.model.signatureDefs = []
        note = schema.MetadataT()
        note.name, note.buffer = "note", self._buffer(np.frombuffer(b"untouched", np.uint8))
        self.model.metadata = [note]

    def graph(self, key="serving_default"):
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = key, [], []
        self.model.subgraphs.append(graph)
        return Graph(self, graph, key)

    def content(self):
        builder = flatbuffers.Builder(0)
        builder.Finish(self.model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    def _buffer(self, values):
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
        self.model.buffers.append(buffer)
        return len(self.model.buffers) - 1


class Graph:
    """Graph of a `File`. The methods of this class refer to tensors by their indices."""

    def __init__(self, file, graph, key):
        self.file, self.graph, self.key = file, graph, key

    def tensor(self, shape, dtype="float32", name="", buffer=0):
        tensor = schema.TensorT()
        tensor.shape = np.array(shape, np.int32)
        tensor.type, tensor.buffer = TYPES[dtype], buffer
        tensor.name = name or f"{self.key}/tensor{len(self.graph.tensors)}"
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def dynamic(self, shape, dtype="float32"):
        """Add a tensor with a dynamic batch size."""
        index = self.tensor(shape, dtype)
        self.graph.tensors[index].shapeSignature = np.array([-1, *shape[1:]], np.int32)
        return index

    def constant(self, values, name="", buffer=None):
        buffer = self.file._buffer(values) if buffer is None else buffer
        return self.tensor(values.shape, values.dtype.name, name, buffer)

    def sparse(self, values, block=1, name="weight"):
        """Add a sparse constant: in CSR with `block=1`, otherwise in blocks along the last axis.

        If the last axis is not a multiple of `block`, the last values along this axis are dropped.
        """
        width = values.shape[-1]
        sparsity, entries = pack(values[..., : width - width % block], block)
        index = self.tensor(values.shape, values.dtype.name, name, self.file._buffer(entries))
        self.graph.tensors[index].sparsity = sparsity
        return index

    def quantized(self, index, scale=0.02, zero=0):
        quantization = schema.QuantizationParametersT()
        quantization.scale = np.array([scale], np.float32)
        quantization.zeroPoint = np.array([zero], np.int64)
        self.graph.tensors[index].quantization = quantization
        return index

    def unary(self, builtin, x, dtype=None, options=None):
        """Add an op with one input.

        The output has the shape of the input. The dtype of the output is ``dtype``, by default the
        dtype of the input.
        """
        y = self.op(builtin, [x], self.shape(x), options)
        self.graph.tensors[y].shapeSignature = None
        self.graph.tensors[y].type = TYPES[dtype] if dtype else self.graph.tensors[x].type
        self.graph.tensors[y].quantization = None if dtype else self.graph.tensors[x].quantization
        return y

    def op(self, builtin, inputs, shape, options=None, version=1):
        """Add an op with one output of the given shape, and return the index of the output."""
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, builtin)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        code.version = version
        self.file.model.operatorCodes.append(code)
        op = schema.OperatorT()
        op.opcodeIndex = len(self.file.model.operatorCodes) - 1
        op.inputs = np.array(inputs, np.int32)
        output = self.dynamic(shape)
        op.outputs = np.array([output], np.int32)
        if options is not None:
            kind = type(options).__name__.removesuffix("T")
            op.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            op.builtinOptions = options
        self.graph.operators.append(op)
        return output

    def shape(self, index):
        return [int(size) for size in self.graph.tensors[index].shape]

    def pad(self, x, widths, dtype=np.int32):
        """Add a PAD op with paddings ``[[before, after], ...]``, one pair per axis."""
        shape = [size + sum(pair) for size, pair in zip(self.shape(x), widths)]
        widths = self.constant(np.array(widths, dtype))
        return self.op("PAD", [x, widths], shape, schema.PadOptionsT())

    def convolve(self, op, x, weight, stride=1, same=True, dilation=1, multiplier=1):
        """Add a convolution op with a bias. ``weight`` is an array, or the index of a tensor in the
        graph."""
        options = {
            "CONV_2D": schema.Conv2DOptionsT,
            "DEPTHWISE_CONV_2D": schema.DepthwiseConv2DOptionsT,
            "TRANSPOSE_CONV": schema.TransposeConvOptionsT,
        }[op]()
        options.padding = schema.Padding.SAME if same else schema.Padding.VALID
        options.strideH = options.strideW = stride
        kernel = weight if isinstance(weight, int) else self.constant(weight, "weight")
        filters, height, width, channels = self.shape(kernel)
        if op == "TRANSPOSE_CONV":
            target = [*self.shape(x)[:3], filters]
            return self.op(
                op, [self.constant(np.array(target, np.int32)), kernel, x], target, options
            )
        options.dilationHFactor = options.dilationWFactor = dilation
        if op == "DEPTHWISE_CONV_2D":
            options.depthMultiplier, filters = multiplier, channels
        lost = (0, 0) if same else (dilation * (height - 1), dilation * (width - 1))
        sizes = [-(-(size - less) // stride) for size, less in zip(self.shape(x)[1:3], lost)]
        bias = self.constant(np.linspace(-1, 1, filters, dtype=np.float32), "bias")
        return self.op(op, [x, kernel, bias], [1, *sizes, filters], options)

    def finish(self, inputs, outputs):
        """Add a signature that names the inputs and outputs, and return the file builder."""
        signature = schema.SignatureDefT()
        signature.signatureKey = self.key
        signature.subgraphIndex = len(self.file.model.subgraphs) - 1
        signature.inputs = [_named(name, index) for name, index in inputs.items()]
        signature.outputs = [_named(name, index) for name, index in outputs.items()]
        self.graph.inputs = np.array(list(inputs.values()), np.int32)
        self.graph.outputs = np.array(list(outputs.values()), np.int32)
        self.file.model.signatureDefs.append(signature)
        return self.file


def _named(name, index):
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, index
    return entry


def fully_connected(weight, batch=-1, name="weight", input_name="x"):
    """Return a file with one FULLY_CONNECTED op. The batch size is dynamic by default."""
    graph = File().graph()
    make = graph.dynamic if batch == -1 else graph.tensor
    x = make([abs(batch), weight.shape[-1]])
    options = schema.FullyConnectedOptionsT()
    y = graph.op(
        "FULLY_CONNECTED",
        [x, graph.constant(weight, name), -1],
        [abs(batch), weight.shape[0]],
        options,
    )
    if batch != -1:
        graph.graph.tensors[y].shapeSignature = None
    return graph.finish({input_name: x}, {"output_0": y}).content()


def convolution(op, weight, stride=1, same=True, shape=(1, 8, 8, None), pad=None, dtype=np.int32):
    """Return a file with one convolution.

    If `pad` is given, a PAD op pads the input of the convolution.
    """
    graph = File().graph()
    x = y = graph.dynamic((*shape[:3], shape[3] or weight.shape[-1]))
    if pad is not None:
        y = graph.pad(x, pad, dtype)
    y = graph.convolve(op, y, weight, stride, same)
    return graph.finish({"x": x}, {"output_0": y}).content()


def with_dynamic_images(content):
    """Make the height and the width of all images of a file dynamic, as in converted files."""
    model = read(content)
    for tensor in model.subgraphs[0].tensors:
        if tensor.shapeSignature is not None:
            tensor.shapeSignature = np.array([-1, -1, -1, tensor.shape[3]], np.int32)
            tensor.shape = np.array([1, 1, 1, tensor.shape[3]], np.int32)
    return write(model)


def sparse_values(shape, density, block=1, seed=0):
    """Return random float32 values with a given density, pruned in blocks along the last axis."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape).astype(np.float32)
    kept = rng.random((*shape[:-1], shape[-1] // block)) < density
    return values * np.repeat(kept, block, axis=-1)


def decode(sparsity, stored, shape):
    """Decode a sparse tensor one value at a time.

    The sparsity metadata must list the last axis as sparse, and all other axes of the tensor as
    dense.
    """
    *outer, width = shape
    axes = sparsity.dimMetadata
    assert [axis.format for axis in axes[: len(shape)]] == [0] * len(outer) + [1]
    assert [axis.denseSize for axis in axes[: len(outer)]] == outer
    assert list(sparsity.traversalOrder) == list(range(len(axes)))
    block = 1
    if len(axes) > len(shape):
        assert (axes[-1].format, list(sparsity.blockMap)) == (0, [len(shape) - 1])
        block = axes[-1].denseSize
    starts = axes[len(outer)].arraySegments.values
    columns = axes[len(outer)].arrayIndices.values
    rows = int(np.prod(outer))
    assert len(starts) == rows + 1
    values = np.zeros((rows, width), np.float32)
    for row in range(rows):
        for position in range(int(starts[row]), int(starts[row + 1])):
            for offset in range(block):
                column = int(columns[position]) * block + offset
                values[row, column] = stored[position * block + offset]
    return values.reshape(shape)


def run(content, x, resolver=AUTO, key=None):
    """Run a ``.tflite`` model with one input in the LiteRT interpreter.

    Return its first output.
    """
    interpreter = Interpreter(model_content=content, experimental_op_resolver_type=resolver)
    runner = interpreter.get_signature_runner(key)
    (name,) = runner.get_input_details()
    return next(iter(runner(**{name: x}).values()))


def ops(model, graph=0):
    """Return the pairs ``(name, version)`` of all ops of a graph, in order."""
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.isupper()}
    codes = [model.operatorCodes[op.opcodeIndex] for op in model.subgraphs[graph].operators]
    return [(names[code.builtinCode], code.version) for code in codes]
