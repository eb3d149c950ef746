"""Tests of files for Ethos-U NPUs: int8 inputs and outputs, dense weights, Vela's report."""

import json

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

import keras_dst
import keras_dst_cli
from keras_dst.export import ethos
from keras_dst.export.decode import encoding, type_name
from keras_dst.export.encode import weights
from keras_dst.export.flatbuffer import op_name, read
from keras_dst.export.target_reports import ACCELERATORS
from tests.backends import on_tensorflow

pytestmark = on_tensorflow
x = np.random.default_rng(0).normal(size=(40, 16, 16, 8)).astype("float32")


@pytest.fixture(scope="module")
def model():
    """Return a sparse network with one op that the NPU cannot run.

    A kernel has at most 16 distinct values.
    """
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 16, 8))
    h = keras.layers.Conv2D(32, 3, padding="same", use_bias=False)(inputs)
    h = keras.layers.ReLU()(keras.layers.BatchNormalization()(h))
    h = keras.layers.Conv2D(64, 3, strides=2, padding="same", activation="relu")(h)
    h = keras.layers.Dense(64, "relu")(keras.layers.GlobalAveragePooling2D()(h))
    model = keras.Model(inputs, keras.ops.sin(keras.layers.Dense(10)(h)))
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        if variable.name == "kernel":
            w = rng.normal(size=variable.shape)
            variable.assign(w * (np.abs(w) > np.quantile(np.abs(w), 0.9)) / 10)
        elif variable.name == "gamma":
            variable.assign(rng.uniform(0.1, 2, variable.shape))
    return keras_dst.cluster_weights(model, 16)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """Export the model for an Ethos-U55. Return the report and the path of the compiled file."""
    folder = tmp_path_factory.mktemp("npu")
    compiled = folder / "compiled.tflite"
    report = keras_dst.export_tflite(
        model,
        folder / "model.tflite",
        target="ethos-u55-128",
        quantize="full",
        representative=x,
        vela_path=compiled,
    )
    return report, compiled


def test_the_file_is_int8_throughout_and_dense(exported):
    content = exported[0].path.read_bytes()
    file = read(content)
    (graph,) = file.subgraphs
    assert [type_name(graph.tensors[i]) for i in [*graph.inputs, *graph.outputs]] == ["int8"] * 2
    assert {encoding(tensor) for tensor in graph.tensors} == {"dense"}
    assert not any(op_name(file, op) == "DENSIFY" for op in graph.operators)


def test_the_file_computes_the_outputs_of_the_model(model, exported):
    interpreter = Interpreter(str(exported[0].path))
    interpreter.allocate_tensors()
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    scale, zero = taken["quantization"]
    integers = np.clip(np.rint(x[:1] / scale) + zero, -128, 127).astype("int8")
    interpreter.set_tensor(taken["index"], integers)
    interpreter.invoke()
    scale, zero = given["quantization"]
    outputs = scale * (interpreter.get_tensor(given["index"]).astype("float32") - zero)
    expected = keras.ops.convert_to_numpy(model(x[:1]))
    # The rounding errors of all layers add up to a few quantization steps of the int8 output.
    np.testing.assert_allclose(outputs, expected, atol=3 * scale, rtol=0)


def test_export_preserves_zeros_and_number_of_distinct_values(model, exported):
    """Batch normalization multiplies the weights of each channel by a different factor.

    Zeros must stay zero.
    """
    stored = [w.values for w in weights(read(exported[0].path.read_bytes()))]
    kernels = [v for v in model.trainable_variables if v.name == "kernel"]
    assert len(stored) == len(kernels)
    zeros = sum(int((w == 0).sum()) for w in stored)
    in_model = [int((keras.ops.convert_to_numpy(k) == 0).sum()) for k in kernels]
    assert zeros == sum(in_model)
    assert max(len(np.unique(w)) for w in stored) == 16


def test_estimates_of_a_sparse_file_are_below_those_of_the_dense_file(exported):
    report = exported[0]
    file, dense = report.vela.file, report.vela.dense
    assert file.weight_bytes <= 0.2 * dense.weight_bytes
    assert file.cycles < dense.cycles
    assert file.npu_cycles <= file.cycles
    assert set(file.memory_cycles) == {"sram", "off chip flash"}
    assert report.vela.accelerator == "ethos-u55-128"
    assert file.seconds == pytest.approx(file.cycles / 500e6)  # Vela's default clock is 500 MHz
    printed = " ".join(str(report).split())  # Join wrapped lines.
    assert "Estimates by Vela" in printed
    assert "not measurements on hardware" in printed
    assert f"{file.cycles:,}" in printed
    assert json.loads(json.dumps(report.to_dict()))["vela"]["file"]["cycles"] == file.cycles


def test_report_lists_ops_on_the_cpu(exported):
    report = exported[0].vela
    (sine,) = [op for op in report.cpu_ops if op.op == "SIN"]
    assert sine.reason == "Unsupported opType"
    assert {op.op for op in report.cpu_ops} == {"DEQUANTIZE", "SIN", "QUANTIZE"}
    assert f"{report.ops - 3} of {report.ops} ops run on the NPU." in str(report)
    assert "On the CPU: SIN" in str(report)


def test_compiled_file_is_written_to_vela_path(exported):
    file = read(exported[1].read_bytes())
    names = {code.customCode for code in file.operatorCodes}
    assert b"ethos-u" in names
    assert sorted(path.name for path in exported[1].parent.iterdir()) == [
        "compiled.tflite",
        "model.tflite",
    ]


@pytest.mark.parametrize("accelerator", ["ethos-u65-256", "ethos-u85-256"])
def test_export_for_other_npus(exported, accelerator):
    content = exported[0].path.read_bytes()
    compiled, report = ethos.compile_for_npu(content, accelerator)
    assert report.file.weight_bytes <= 0.2 * report.dense.weight_bytes
    assert ethos.compile_for_npu(content, accelerator) == (compiled, report)


def test_the_dense_file_has_no_zeros_and_the_same_ops(exported):
    content = exported[0].path.read_bytes()
    dense = ethos.with_dense_weights(content)
    assert [w.name for w in weights(read(dense))] == [w.name for w in weights(read(content))]
    for weight in weights(read(dense)):
        assert (weight.values != 0).all()
        assert np.abs(weight.values).max() == 127
    assert ethos.with_dense_weights(content) == dense


def test_without_vela_the_report_names_the_extra_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setattr("keras_dst.export.pipeline.vela_version", lambda: None)
    monkeypatch.setattr(ethos, "vela_version", lambda: None)
    path = tmp_path / "model.tflite"
    options = {"target": "ethos-u85-256", "quantize": "full", "representative": x}
    with pytest.raises(ImportError, match=r"keras_dst\[ethos\]"):
        keras_dst.export_tflite(model, path, vela_path=tmp_path / "compiled.tflite", **options)
    assert list(tmp_path.iterdir()) == []
    report = keras_dst.export_tflite(model, path, **options)
    assert path.exists()
    assert report.vela is None
    assert "pip install keras_dst[ethos]" in str(report)


def test_a_file_that_vela_refuses_raises_an_error(exported, monkeypatch):
    def refuse(*arguments, **options):
        return ethos.subprocess.CompletedProcess("vela", 1, "", "RuntimeError: no such op\n")

    monkeypatch.setattr(ethos.subprocess, "run", refuse)
    with pytest.raises(keras_dst.ExportError, match=r"exit code 1: RuntimeError: no such op"):
        ethos.compile_for_npu(exported[0].path.read_bytes(), "ethos-u55-128")


def test_invalid_arguments_raise_before_the_export(model, tmp_path):
    path = tmp_path / "model.tflite"
    npu = {"target": "ethos-u55-128", "quantize": "full", "representative": x}
    for options, message in (
        ({"target": "ethos-u56-128"}, "Expected target to be one of"),
        ({"target": "ethos-u55-128"}, r"Expected quantize='full' with target='ethos-u55-128'"),
        ({"vela_path": tmp_path / "v.tflite"}, r"Expected an Ethos-U target with vela_path="),
        (
            {**npu, "vela_path": tmp_path / ".." / tmp_path.name / path.name},
            "Expected different files as path and vela_path",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            keras_dst.export_tflite(model, path, **options)
    with pytest.raises(ValueError, match="Expected accelerator to be one of"):
        ethos.compile_for_npu(b"", "ethos-u56-128")
    with pytest.raises(ValueError, match=r"Expected a \.tflite file"):
        ethos.compile_for_npu(b"garbage", "ethos-u55-128")
    assert list(tmp_path.iterdir()) == []


def test_command_line_accepts_all_npus():
    assert keras_dst_cli._NPUS == ACCELERATORS
