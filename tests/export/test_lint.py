"""Tests of each `lint` rule, on a file that breaks the rule and on a file that follows the rule."""

import json
import pathlib
import re

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from keras import layers

import keras_dst
from keras_dst.export import ExportError, LintReport
from keras_dst.export.decode import values
from keras_dst.export.flatbuffer import read, write
from keras_dst.export.selection import select_formats
from tests.backends import on_tensorflow, once

from . import test_sparse_inference as nets
from .graphs import AUTO, File, convolution, fully_connected, run, sparse_values

LOOSE = sparse_values((32, 64), 0.2)
SPARSE = sparse_values((32, 64), 0.1)
BLOCKS = sparse_values((32, 64), 0.2, block=4)
KERNEL = sparse_values((16, 3, 3, 32), 0.2)


def layer(make, version=8, dtype="float32"):
    """Return a file with one FULLY_CONNECTED op.

    ``make(graph)`` adds the weight to the graph and returns the index of the weight.
    """
    graph = File().graph()
    weight = make(graph)
    units, inputs = graph.shape(weight)
    x = graph.tensor([2, inputs], dtype)
    options = schema.FullyConnectedOptionsT()
    y = graph.op("FULLY_CONNECTED", [x, weight, -1], [2, units], options, version)
    return graph.finish({"x": x}, {"y": y}).content()


def maps(make):
    """Return a file with one convolution.

    ``make(graph)`` adds the weight to the graph and returns the index of the weight.
    """
    graph = File().graph()
    x = graph.tensor([1, 8, 8, 32])
    return graph.finish({"x": x}, {"y": graph.convolve("CONV_2D", x, make(graph))}).content()


def stored(weight, block=1):
    return lambda graph: graph.sparse(weight, block)


def densified(weight, block=1):
    return lambda graph: graph.unary(
        "DENSIFY", graph.sparse(weight, block), options=schema.DensifyOptionsT()
    )


def half(weight, densify):
    """Return a function that adds a sparse float16 weight to a graph. TensorFlow's converter
    wrongly stores such weights without a DENSIFY op."""

    def make(graph):
        packed = (densified if densify else stored)(weight.astype(np.float16), 4)(graph)
        return graph.unary("DEQUANTIZE", packed, "float32", schema.DequantizeOptionsT())

    return make


def int8(shape, block=16, density=0.2):
    """Return a function that adds a sparse int8 weight with blocks of `block` values to a graph.

    The nonzero values of the weight form blocks of 16 values.
    """
    weight = integers(shape, density)
    return lambda graph: graph.quantized(graph.sparse(weight, block))


def integers(shape, density=0.2):
    weight = (20 * sparse_values(shape, density, block=16)).astype(np.int8)
    weight[..., -16:] = 1
    return weight


def int8_densified(dequantize):
    def make(graph):
        packed = graph.quantized(graph.sparse(integers((16, 3, 3, 32))))
        plain = graph.unary("DENSIFY", packed, options=schema.DensifyOptionsT())
        if not dequantize:
            return plain
        return graph.unary("DEQUANTIZE", plain, "float32", schema.DequantizeOptionsT())

    return make


CUT = nets.network(*nets.BODY, nets.pool("MAX_POOL_2D"), nets.pointwise, nets.mean)
WHOLE = nets.network(*nets.BODY, nets.pointwise, nets.mean)

# ERRORS maps a rule of `lint` to a file with the problem, words of the expected finding, and a file
# without the problem.
ERRORS = {
    "sparse-input": (maps(stored(KERNEL)), "the sparse tensor 'weight'", maps(densified(KERNEL))),
    "sparse-input, float16": (
        layer(half(BLOCKS, densify=False), version=1),
        "DEQUANTIZE",
        layer(half(BLOCKS, densify=True), version=1),
    ),
    "sparse-version": (layer(stored(SPARSE), 12), "has version 12", layer(stored(SPARSE), 8)),
    "sparse-version, int8": (layer(int8((32, 64)), 12), "version 12", layer(int8((32, 64)))),
    "sparse-format": (
        layer(stored(sparse_values((32, 64), 0.2, 8), 8)),
        "float32 in 1x8",
        layer(stored(BLOCKS, 4)),
    ),
    "sparse-format, int8": (layer(int8((32, 64), 4)), "int8 in 1x4", layer(int8((32, 64), 16))),
    "block-remainder": (
        layer(stored(sparse_values((32, 66), 0.2), 4)),
        "the last 2 inputs are lost",
        layer(stored(sparse_values((32, 66), 0.2))),
    ),
    "block-remainder, DENSIFY": (
        layer(densified(sparse_values((32, 66), 0.2), 4), version=1),
        "the last 2 inputs are lost",
        layer(densified(sparse_values((32, 66), 0.2)), version=1),
    ),
    "hybrid-width": (layer(int8((4, 4112))), "4112 float inputs", layer(int8((4, 4096)))),
    "hybrid-width, blocks": (
        layer(int8((4, 4096), density=1.0)),
        "256 int8 blocks in a row",
        layer(int8((4, 4080), density=1.0)),
    ),
    "densify-int8": (maps(int8_densified(False)), "refuses", maps(int8_densified(True))),
    "nchw-layout": (nets.unpacked(CUT), "MAX_POOL_2D", nets.unpacked(WHOLE)),
}

ADVICE = {
    "densify": (layer(densified(SPARSE), version=1), "as csr", layer(densified(LOOSE), version=1)),
    "densify, blocks": (
        layer(densified(BLOCKS, 4), version=1),
        "as 1x4",
        layer(stored(BLOCKS, 4)),
    ),
    "pattern": (layer(stored(SPARSE)), "not in blocks", layer(stored(BLOCKS, 4))),
    "pattern, dense": (fully_connected(LOOSE), "not in blocks", fully_connected(BLOCKS)),
    "sparse-larger": (
        maps(densified(sparse_values((16, 3, 3, 32), 0.9))),
        "in dense",
        maps(densified(KERNEL)),
    ),
    "sparse-larger, blocks": (layer(stored(SPARSE, 4)), "in csr", layer(stored(BLOCKS, 4))),
    "zeros-dense": (
        convolution("CONV_2D", KERNEL),
        "csr+densify takes",
        convolution("CONV_2D", sparse_values((16, 3, 3, 32), 0.9)),
    ),
    "sparse-inference": (CUT, "MAX_POOL_2D cannot take part", nets.unpacked(WHOLE)),
    "sparse-inference, no DENSIFY": (WHOLE, "no DENSIFY op precedes", nets.unpacked(WHOLE)),
}


def found(content, rule):
    return [f for f in keras_dst.lint(content).findings if f.rule == rule.split(",")[0]]


@once
@pytest.mark.parametrize(("rule", "case"), [*ERRORS.items(), *ADVICE.items()])
def test_lint_rule_reports_the_fault_only(rule, case):
    broken, words, sound = case
    (finding,) = found(broken, rule)
    assert finding.level == ("error" if rule in ERRORS else "advice")
    assert words in f"{finding.where} {finding.found}"
    assert finding.fix.endswith(".")
    assert not found(sound, rule)
    assert not keras_dst.lint(sound).errors


def wrong(content):
    """Return True if XNNPACK rejects a file with one layer, or computes wrong outputs."""
    model = read(content)
    (tensor,) = [t for t in model.subgraphs[0].tensors if t.sparsity is not None]
    weight = values(model, tensor).astype(np.float32) * (0.02 if tensor.quantization else 1)
    x = np.random.default_rng(0).standard_normal((2, weight.shape[-1])).astype(np.float32)
    try:
        y = run(content, x, AUTO)
    except RuntimeError:
        return True
    return np.abs(y - x @ weight.T).max() > 0.05 * np.abs(y).max()


@once
@pytest.mark.parametrize(
    "rule", ["sparse-format", "sparse-format, int8", "hybrid-width", "hybrid-width, blocks"]
)
def test_faults_cause_wrong_results_in_the_runtime(rule):
    broken, _, sound = ERRORS[rule]
    assert wrong(broken)
    assert not wrong(sound)


def test_the_runtime_refuses_int8_from_densify():
    broken, _, sound = ERRORS["densify-int8"]
    x = np.ones((1, 8, 8, 32), np.float32)
    with pytest.raises(RuntimeError, match="failed to prepare"):
        run(broken, x)
    assert np.isfinite(run(sound, x)).all()


@once
@pytest.mark.parametrize(
    ("steps", "where", "words"),
    [
        (
            [nets.full, nets.pointwise, nets.mean],
            "CONV_2D",
            "stride 1, padded by 1+1 and 1+1",
        ),
        (
            [lambda g, x: nets.entry(g, x, same=True, pad=None), nets.pointwise, nets.mean],
            "CONV_2D",
            "cannot begin at 3x3 CONV_2D over 3 channels, stride 2, padding 'same'",
        ),
        ([*nets.BODY, nets.pointwise], "CONV_2D", "not followed by the global average pooling"),
        (
            [*nets.BODY, nets.gated(nets.mean, nets.reshaped(1, 1, 1, 32)), nets.mean],
            "MUL",
            "from outside",
        ),
        (
            [nets.entry, lambda g, x: nets.pointwise(g, x, 0.5), nets.mean],
            "1x1 convolutions",
            "of their weights are zero",
        ),
        (
            [*nets.BODY, nets.depthwise(7, dilation=2), nets.pointwise],
            "DEPTHWISE_CONV_2D",
            "7x7 DEPTHWISE_CONV_2D, stride 1, dilation 2x2",
        ),
    ],
    ids=["first", "same", "no exit", "outside", "zeros", "depthwise"],
)
def test_lint_reports_obstacles_to_sparse_inference(steps, where, words):
    channels = 32 if steps[0] is nets.full else 3
    report = keras_dst.lint(nets.network(*steps, channels=channels))
    assert not report.sparse_inference
    texts = [(f.where, f.found) for f in report.findings if f.rule == "sparse-inference"]
    assert any(where in place and words in text for place, text in texts), texts


def test_report_states_use_of_sparse_inference():
    on = keras_dst.lint(nets.unpacked(WHOLE))
    assert (on.sparse_inference, on.reason, on.findings) == (True, "4 of 5 ops", [])
    off = keras_dst.lint(fully_connected(BLOCKS))
    assert (off.sparse_inference, off.reason[-18:]) == (False, "the sparse kernels")


@once
@pytest.mark.parametrize("content", [fully_connected(BLOCKS), WHOLE, CUT], ids=["fc", "on", "off"])
def test_exported_files_have_no_errors(content):
    report = keras_dst.lint(select_formats(content).content)
    assert not report.errors
    stays_dense = [f for f in report.findings if f.rule == "zeros-dense"]
    assert len(stays_dense) == (2 if content is CUT else 0)
    assert all("with DENSIFY, ARM CPUs" in finding.found for finding in stays_dense)
    assert all("ZeroPadding2D(((1, 0), (1, 0)))" in finding.fix for finding in stays_dense)


def test_lint_report_is_printed(tmp_path):
    path = tmp_path / "cut.tflite"
    path.write_bytes(nets.unpacked(CUT))
    report = keras_dst.lint(path)
    assert isinstance(report, LintReport)
    first, second, *lines = str(report).splitlines()
    assert first == "cut.tflite: errors: 1, advice: 0"
    assert second.startswith("Sparse inference by XNNPACK on ARM: no, results can be wrong,")
    assert max(map(len, lines)) <= 96
    found, fix = [line for line in lines if line.startswith(("error: ", "  Fix: "))]
    assert found.startswith("error: CONV_2D ")
    assert fix.startswith("  Fix: Subsample with stride 2 ")
    (finding,) = json.loads(json.dumps(report.to_dict()))["findings"]
    assert (finding["level"], finding["rule"]) == ("error", "nchw-layout")


def test_lint_lists_errors_first():
    content = layer(stored(sparse_values((32, 66), 0.2), 4), version=7)
    levels = [finding.level for finding in keras_dst.lint(content).findings]
    assert levels == sorted(levels, key="error advice".find)
    assert set(levels) == {"error", "advice"}


@pytest.mark.parametrize("cut", [0, 6, 8, 200, -200])
def test_lint_of_a_damaged_file_raises(tmp_path, cut):
    path = tmp_path / "model.tflite"
    path.write_bytes(fully_connected(BLOCKS)[:cut])
    with pytest.raises(ValueError, match=r"Expected a .*\.tflite file.* Received: .*model\.tflite"):
        keras_dst.lint(path)


def test_lint_of_a_damaged_op_raises():
    model = read(WHOLE)
    for op in model.subgraphs[0].operators:
        op.builtinOptions, op.builtinOptionsType = None, 0
    with pytest.raises(ValueError, match="damaged or incomplete"):
        keras_dst.lint(write(model))


def test_lint_of_other_objects_than_files_and_models_raises():
    with pytest.raises(TypeError):
        keras_dst.lint(3)
    with pytest.raises(FileNotFoundError):
        keras_dst.lint("nowhere.tflite")


@once
def test_lint_of_a_model_without_recorded_inputs_raises():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, inputs):
            return self.dense(inputs["x"])

    model = Net()
    model({"x": np.ones((1, 4), np.float32)})
    message = "Fix: pass inputs= to export_tflite.* lint accepts the path of the exported file"
    for target in (None, "micro"):
        with pytest.raises(ValueError, match=message):
            keras_dst.lint(model, target=target)


@on_tensorflow
def test_lint_of_a_model_checks_the_exported_file():
    model = keras.Sequential([keras.Input((64,)), layers.Dense(32, name="head")])
    kernel, bias = model.layers[0].get_weights()
    model.layers[0].set_weights([kernel * (LOOSE.T != 0), bias])
    (finding,) = keras_dst.lint(model).findings
    assert (finding.level, finding.rule) == ("advice", "pattern")
    assert "head" in finding.where


UNCONVERTIBLE = {
    "recurrent loop": (lambda: keras.Input((6, 4)), layers.LSTM(3), r"Fix: build .* unroll=True"),
    "strings": (
        lambda: keras.Input((1,), dtype="string"),
        layers.StringLookup(vocabulary=["a"], output_mode="one_hot"),
        "Expected numeric inputs",
    ),
}


@pytest.mark.parametrize(("make", "layer", "message"), UNCONVERTIBLE.values(), ids=UNCONVERTIBLE)
def test_lint_of_a_model_that_cannot_be_quantized_raises(make, layer, message):
    """TensorFlow's converter would crash on the recurrent loop."""
    x = make()
    with pytest.raises(ExportError, match=message):
        keras_dst.lint(keras.Model(x, layer(x)), target="micro")


def test_the_page_on_lint_lists_every_rule():
    page = pathlib.Path(__file__).parents[2] / "docs" / "edge.md"
    rows = re.findall(r"^\| `(.*?)` \| (\w+) \|", page.read_text(), re.M)
    tested = {name.split(",")[0]: "error" for name in ERRORS}
    assert dict(rows) == tested | {name.split(",")[0]: "advice" for name in ADVICE}
