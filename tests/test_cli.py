"""Tests of the command `keras-dst`."""

import importlib
import json
import os
import re
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest

import keras_dst.cli
import keras_dst_cli as cli
from keras_dst import demo
from keras_dst.export.encode import Format, encode, weights
from keras_dst.export.flatbuffer import read, write
from keras_dst.methods import DST
from tests.backends import every, on_tensorflow, once
from tests.export.graphs import fully_connected, sparse_values
from tests.pages import ROOT

pytestmark = every(64)

BACKENDS_AND_PACKAGE = {"keras", "numpy", "tensorflow", "jax", "torch", "keras_dst"}


@pytest.fixture
def saved(tmp_path):
    """Return the file of a sparse model in which half of the kernel is pruned."""
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
    keras_dst.sparsify(model, DST())
    layer = model.layers[0]
    middle = np.median(np.abs(layer.sparse_weights()[0].raw(layer).numpy()))
    layer.sparse_state["kernel"]["threshold"].assign(np.full(4, middle))
    model.save(tmp_path / "model.keras")
    return tmp_path / "model.keras"


def test_report(saved, capsys):
    assert cli.main(["report", str(saved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] == pytest.approx(0.5, abs=0.04)
    assert cli.main(["report", str(saved)]) == 0
    assert "head" in capsys.readouterr().out


def test_strip(saved, tmp_path):
    assert cli.main(["strip", str(saved), str(tmp_path / "stock.keras")]) == 0
    loaded = keras.saving.load_model(tmp_path / "stock.keras")
    assert type(loaded.layers[0]) is keras.layers.Dense
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.keras", "stock.keras"]


def test_shrink(tmp_path, capsys):
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(4, name="body"), keras.layers.Dense(2)]
    )
    kernel = np.array(model.layers[0].kernel.numpy())
    kernel[:, :3] = 0
    model.layers[0].kernel.assign(kernel)
    model.save(tmp_path / "model.keras")
    paths = [str(tmp_path / "model.keras"), str(tmp_path / "small.keras")]
    assert cli.main(["shrink", *paths]) == 0
    assert "parameters 46 -> 13" in capsys.readouterr().out
    assert cli.main(["shrink", *paths, "--json", "--latency"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"][0]["after"] == 1
    assert found["latency_after"] > 0
    assert keras.saving.load_model(paths[1]).get_layer("body").units == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.keras", "small.keras"]


def test_models_are_loaded_without_compiling(tmp_path, capsys):
    class Warmup(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.01

        def get_config(self):
            return {}

    def own_loss(y, z):
        return keras.ops.mean(keras.ops.square(y - z))

    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(4, name="body"), keras.layers.Dense(2)]
    )
    model.compile(keras.optimizers.SGD(Warmup()), own_loss, metrics=[own_loss])
    kernel = np.array(model.layers[0].kernel.numpy())
    kernel[:, :2] = 0
    model.layers[0].kernel.assign(kernel)
    path = str(tmp_path / "model.keras")
    model.save(path)
    assert cli.main(["report", path]) == 0
    assert cli.main(["strip", path, str(tmp_path / "stock.keras")]) == 0
    assert cli.main(["shrink", path, str(tmp_path / "small.keras")]) == 0
    assert keras.saving.load_model(tmp_path / "small.keras").get_layer("body").units == 2
    capsys.readouterr()


def test_report_of_a_compiled_model_with_a_sparse_optimizer(tmp_path, capsys):
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    model.compile(keras_dst.SparseOptimizer("sgd", keras_dst.methods.Magnitude(0.5)), "mse")
    model.fit(
        np.ones((8, 8)),
        np.ones((8, 8)),
        verbose=0,
        callbacks=[keras_dst.callbacks.SparseTraining()],
    )
    model.save(tmp_path / "model.keras")
    assert cli.main(["report", str(tmp_path / "model.keras"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] == pytest.approx(0.5)


def test_import_option_loads_custom_layers(tmp_path, capsys, monkeypatch):
    (tmp_path / "my_layers.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable('mine')\n"
        "class Twice(keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return 2 * x\n"
    )
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.syspath_prepend("")
        twice = importlib.import_module("my_layers").Twice()
    keras.Sequential([keras.Input((3,)), twice, keras.layers.Dense(2)]).save("model.keras")
    # As in a new process, neither Python nor Keras knows the layer any more.
    del sys.modules["my_layers"]
    keras.saving.get_custom_objects().pop("mine>Twice")
    assert cli.main(["report", "model.keras"]) == 1
    assert "Fix: for custom layers, add --import MODULE" in capsys.readouterr().err
    monkeypatch.syspath_prepend("")
    assert cli.main(["report", "model.keras", "--import", "my_layers"]) == 0


@on_tensorflow
def test_export(saved, tmp_path, capsys):
    np.savez(tmp_path / "data.npz", x=np.ones((6, 8), "f"), y=np.zeros(6, int))
    options = ["--optimize", "size", "--target", "any", "--quantize", "weights", "--threads", "2"]
    options += ["--batch", "3", "--no-measure", "--evaluate", str(tmp_path / "data.npz"), "--json"]
    assert cli.main(["export", str(saved), str(tmp_path / "model.tflite"), *options]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["bytes"] == (tmp_path / "model.tflite").stat().st_size
    assert (report["threads"], report["batch"]) == (2, 3)
    assert report["files"][-1]["latency"] is None
    assert report["files"][-1]["accuracy"] in (0.0, 1.0)
    assert err == ""


def test_export_shows_progress_on_a_terminal(saved, tmp_path, capsys, monkeypatch):
    def export(model, path, *, progress, representative, **options):
        progress("weight 1 of 2")
        assert representative.shape == (5, 8)
        raise ValueError("no more")

    np.save(tmp_path / "samples.npy", np.ones((5, 8)))
    monkeypatch.setattr(keras_dst, "export_tflite", export)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    options = ["--quantize", "full", "--representative", str(tmp_path / "samples.npy")]
    assert cli.main(["export", str(saved), str(tmp_path / "m.tflite"), *options]) == 1
    err = capsys.readouterr().err
    assert err == "\r\033[Kweight 1 of 2\r\033[Kkeras-dst export: no more\n"


@pytest.fixture
def edge(tmp_path):
    """Return a folder with two `.tflite` files, one valid and one invalid."""
    values = sparse_values((32, 64), 0.1, block=4)
    good = fully_connected(values)
    (weight,) = weights(read(good))
    good = encode(good, {weight.buffer: Format(4, unpack=False)})
    bad = read(good)
    bad.operatorCodes[-1].version = 12
    (tmp_path / "good.tflite").write_bytes(good)
    (tmp_path / "bad.tflite").write_bytes(write(bad))
    return tmp_path


def test_inspect(edge, capsys):
    assert cli.main(["inspect", str(edge / "good.tflite")]) == 0
    assert "1x4" in capsys.readouterr().out
    assert cli.main(["inspect", str(edge / "good.tflite"), "--json"]) == 0
    (constant,) = json.loads(capsys.readouterr().out)["constants"]
    assert (constant["encoding"], constant["shape"]) == ("1x4", [32, 64])


def test_lint(edge, capsys):
    assert cli.main(["lint", str(edge / "good.tflite")]) == 0
    assert "errors: 0" in capsys.readouterr().out
    assert cli.main(["lint", str(edge / "bad.tflite"), "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["rule"] == "sparse-version"


@on_tensorflow
def test_lint_of_a_model(saved, capsys):
    assert cli.main(["lint", str(saved)]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("sequential")


def test_bench(edge, capsys):
    path = str(edge / "good.tflite")
    assert cli.main(["bench", path, "--runs", "3", "--warmup", "0"]) == 0
    assert "3 runs of each file" in capsys.readouterr().out
    assert cli.main(["bench", path, path, "--threads", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [file["name"] for file in json.loads(out)["files"]] == ["good.tflite"] * 2
    assert err == ""


def test_bench_shows_progress_on_a_terminal(edge, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["bench", str(edge / "good.tflite"), "--runs", "2", "--warmup", "1"]) == 0
    assert capsys.readouterr().err == "\rrun 1 of 3\rrun 2 of 3\rrun 3 of 3\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "Expected a .tflite file"),
        (b"PK\x03\x04 another kind of file", "Expected a .tflite file"),
        (b"\x1c\0\0\0TFL3\xff\xff\xff", "damaged or incomplete"),
    ],
    ids=["missing", "empty", "other", "truncated"],
)
@pytest.mark.parametrize("command", ["inspect", "lint", "bench"])
def test_a_file_that_is_not_a_tflite_file_raises(command, content, message, tmp_path, capsys):
    path = tmp_path / "broken.tflite"
    if content is not None:
        path.write_bytes(content)
    assert cli.main([command, str(path)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.startswith(f"keras-dst {command}: "), message in err) == ("", True, True)
    assert "broken.tflite" in err


def test_lint_documents_its_exit_codes(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["lint", "--help"])
    assert "1 an error found" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a file"), (b"", "complete zip"), (b"PK\x03\x04 cut", "complete zip")],
    ids=["missing", "empty", "truncated"],
)
@pytest.mark.parametrize("command", ["report", "strip", "shrink", "export"])
def test_a_file_that_is_not_a_model_raises(command, content, message, tmp_path, capsys):
    path = tmp_path / "broken.keras"
    if content is not None:
        path.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    arguments = [command, str(path)] + [str(tmp_path / "out.keras")] * (command != "report")
    assert cli.main(arguments) == 1
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.h5", "keras_dst.tfmot.load"),
        ("model.weights.h5", "contains only weights"),
        ("model.tflite", "keras-dst inspect"),
    ],
)
def test_the_error_suggests_another_command(name, message, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"any")
    assert cli.main(["report", str(tmp_path / name)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["strip", "shrink"])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("out.h5", "Expected an output path that ends with .keras. Received: "),
        ("out", "Expected an output path that ends with .keras. Received: "),
        ("no/out.keras", "Fix: create "),
    ],
)
def test_an_output_that_cannot_be_written_raises(command, output, message, saved, tmp_path, capsys):
    assert cli.main([command, str(saved), str(tmp_path / output)]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]


@once
def test_demo_checks_the_path_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("keras_dst.demo._digits", lambda: pytest.fail("read the training data"))
    assert cli.main(["demo", "--keep", str(tmp_path / "missing" / "sparse.tflite")]) == 1
    assert "Expected a path in an existing folder" in capsys.readouterr().err


@once
def test_demo_with_few_epochs(capsys):
    data = np.zeros((32, 28, 28, 1), "float32"), np.zeros(32, "int32")
    demo._train(data, 3, 0, DST())
    assert re.findall(r"epoch (\d):", capsys.readouterr().out) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("arguments", "output", "extension"),
    [
        (["export", "model.keras"], "out.KERAS", ".tflite"),
        (["export", "model.keras"], "out.hdf5", ".tflite"),
        (["export", "model.keras"], "out", ".tflite"),
        (["report", "model.keras", "--html"], "model.keras", ".html"),
        (["demo", "--keep"], "model.keras", ".tflite"),
    ],
)
def test_an_output_with_a_wrong_extension_raises(
    arguments, output, extension, saved, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before = saved.read_bytes()
    assert cli.main([*arguments, output]) == 1
    assert f"path that ends with {extension}. Received: {output}. Fix" in capsys.readouterr().err
    assert saved.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]


@pytest.mark.parametrize("command", ["report", "strip", "export", "lint"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["any.txt"], "a zip archive without config.json. Fix: save the model with "),
        (["config.json", "structure.json", "model.safetensors"], "keras_dst.load_sparse(path)"),
    ],
)
def test_a_zip_archive_of_another_kind_raises(command, names, message, tmp_path, capsys):
    path = tmp_path / "other.keras"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "{}")
    output = {"strip": ["out.keras"], "export": ["out.tflite"]}.get(command, [])
    assert cli.main([command, str(path), *(str(tmp_path / name) for name in output)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "custom layers" not in error


def test_a_sparse_file_is_recognized(tmp_path, capsys):
    pytest.importorskip("safetensors")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    keras_dst.save_sparse(model, tmp_path / "sparse.keras")
    assert cli.main(["report", str(tmp_path / "sparse.keras")]) == 1
    assert "keras_dst.save_sparse wrote. Fix: load" in capsys.readouterr().err


def test_an_export_to_a_keras_file_raises(saved, capsys):
    before = saved.read_bytes()
    assert cli.main(["export", str(saved), str(saved)]) == 1
    assert "Expected an output path that ends with .tflite. Received: " in capsys.readouterr().err
    assert saved.read_bytes() == before


def test_help_is_printed_without_a_command(capsys):
    assert cli.main([]) == 2
    assert "keras-dst export model.keras model.tflite" in capsys.readouterr().err


def test_a_damaged_model_raises(saved, tmp_path, capsys):
    broken = tmp_path / "damaged.keras"
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(broken, "w") as target:
        target.writestr("config.json", source.read("config.json")[:-40])
        target.writestr("model.weights.h5", source.read("model.weights.h5"))
    assert cli.main(["report", str(broken)]) == 1
    assert "could not be loaded" in capsys.readouterr().err


def modules_after(code, tmp_path):
    """Run code in a new process, and return the top-level modules that the process imports."""
    code = f"import atexit, sys; atexit.register(lambda: print(*sys.modules)); {code}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


@once
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["export", "--help"],
        [],
        ["no-such-command"],
        ["export", "model.keras", "model.tflite", "--target", "no-such-cpu"],
        ["report", "missing.keras"],
        ["recommend", "--sparsity", "0.9"],
        ["shrink", "model.tflite", "small.keras"],
        ["strip", "empty.keras", "stock.h5"],
        ["bench", "missing.tflite"],
    ],
    ids=" ".join,
)
def test_help_and_wrong_arguments_import_no_backend(arguments, tmp_path):
    (tmp_path / "model.tflite").touch()
    zipfile.ZipFile(tmp_path / "empty.keras", "w").close()
    code = f"import keras_dst_cli; sys.exit(keras_dst_cli.main({arguments}))"
    loaded = modules_after(code, tmp_path)
    assert "keras_dst_cli" in loaded
    assert loaded & BACKENDS_AND_PACKAGE == set()


@once
def test_every_command_has_a_function():
    (commands,) = (a for a in cli._parser()._actions if isinstance(a.choices, dict))
    for name in commands.choices:
        assert callable(getattr(keras_dst.cli, name))
