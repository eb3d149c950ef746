"""Tests of Keras's export to other runtimes. The outputs must equal the outputs of Keras."""

import importlib.util
import shutil

import keras
import numpy as np
import pytest
from keras import layers

import keras_dst
from keras_dst.methods import DCIL, DST, Magnitude
from tests.backends import every
from tests.pages import blocks

# The exporters, torch.jit and hls4ml raise warnings about their own code.
pytestmark = pytest.mark.filterwarnings("ignore")
BACKEND = keras.backend.backend()
x = np.random.default_rng(0).normal(size=(1, 12, 12, 3)).astype("float32")
HLS4ML = ("hls4ml", "g++")  # hls4ml compiles its C++ code with g++.
# On TensorFlow and JAX, Keras's exporter needs a converter. Only the converter for TensorFlow is
# installed for the tests, because the converter for JAX installs 34 packages.
CONVERTERS = {("onnx", "tensorflow"): "tf2onnx", ("onnx", "jax"): "jax2onnx"}


def needs(*names):
    """Skip the test if a package or a program is missing."""
    found = {name: importlib.util.find_spec(name) or shutil.which(name) for name in names}
    missing = [name for name, place in found.items() if not place]
    if missing:
        pytest.skip(f"Not installed: {', '.join(missing)}.")


@pytest.fixture(autouse=True)
def no_usage_statistics(monkeypatch):
    """Prevent OpenVINO from sending usage statistics. OpenVINO sends no statistics in CI jobs."""
    monkeypatch.setenv("CI", "true")


def in_onnx_runtime(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def in_openvino(path):
    import openvino

    # OpenVINO computes in bfloat16 on some CPUs by default.
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(x)[0]


def in_pytorch(path):
    import torch

    with torch.inference_mode():
        return torch.export.load(path).module()(torch.from_numpy(x)).numpy()


# FORMATS maps an export format of Keras to a file name, the packages that are needed, and a
# function that runs the file.
FORMATS = {
    "onnx": ("model.onnx", ("onnx", "onnxruntime"), in_onnx_runtime),
    "openvino": ("model.xml", ("openvino",), in_openvino),
    "torch": ("model.pt2", ("torch",), in_pytorch),
}


@pytest.fixture(params=FORMATS)
def run(request, tmp_path):
    """Return a function that exports a model, runs the file, and returns path and outputs."""
    form = request.param
    file, packages, execute = FORMATS[form]
    if form == "torch" and BACKEND != "torch":
        pytest.skip("Keras exports .pt2 files on the torch backend only.")
    if form == "openvino" and BACKEND == "jax":
        pytest.skip("OpenVINO cannot convert the op XlaCallModule, which JAX writes.")
    needs(*packages, *filter(None, [CONVERTERS.get((form, BACKEND))]))

    def export(model):
        path = str(tmp_path / file)
        model.export(path, format=form, verbose=False)
        return path, execute(path)

    return export


def network():
    """Return a small network with a convolution, a normalization layer and two dense layers."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(8, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(16, "relu"),
            layers.Dense(4),
        ]
    )


def sparse(method):
    """Return a network that was trained with a pruning method for a few steps."""
    model = network()
    model.compile("adam", "mse")
    keras_dst.sparsify(model, method)
    samples = np.repeat(x, 8, axis=0)
    callbacks = [keras_dst.callbacks.SparseTraining()]
    model.fit(samples, np.zeros((8, 4)), batch_size=2, verbose=0, callbacks=callbacks)
    return model


def assert_runs(run, model):
    path, outputs = run(model)
    expected = keras.ops.convert_to_numpy(model(x, training=False))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    return path


def test_a_stripped_model_runs(run):
    model = keras_dst.strip(sparse(Magnitude(0.9)))
    assert keras_dst.report(model).sparsity == pytest.approx(0.9, abs=0.01)
    path = assert_runs(run, model)
    if path.endswith(".onnx"):
        assert zeros_in(path) == sum(int((w.numpy() == 0).sum()) for w in kernels(model))


def kernels(model):
    return [weight for weight in model.weights if weight.name == "kernel"]


def zeros_in(path):
    """Return the number of zeros in the weights of an ONNX file."""
    import onnx

    constants = map(onnx.numpy_helper.to_array, onnx.load(path).graph.initializer)
    return sum(int((c == 0).sum()) for c in constants if c.ndim > 1 and c.dtype == np.float32)


@every(16)
@pytest.mark.parametrize("method", [DST(0.8), DCIL(0.8, warmup=1.0)], ids=repr)
def test_a_model_that_is_still_sparse_runs(run, method):
    assert_runs(run, sparse(method))


@pytest.mark.skipif(BACKEND != "torch", reason="Only torch has all exports of the page.")
def test_the_page_of_other_runtimes(tmp_path, monkeypatch, capsys):
    needs("onnx", "onnxruntime", "openvino", *HLS4ML)
    monkeypatch.chdir(tmp_path)
    names = {}
    for _, code in blocks("other_runtimes.md"):
        exec(code, names)
    kept = round(0.1 * sum(weight.numpy().size for weight in kernels(names["model"])))
    assert f"{kept} multipliers" in capsys.readouterr().out
