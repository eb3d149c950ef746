"""Tests of the figures that are measured for a file: bytes, latency, loading time and memory."""

import json
import pathlib

import numpy as np
import pytest

from keras_dst.export import encode, flatbuffer, measure
from keras_dst.export.measure import bench, latencies
from keras_dst.export.memory import peak_memory
from tests.backends import once

from .graphs import File, convolution, fully_connected, sparse_values, with_dynamic_images

pytestmark = once


@pytest.fixture
def paths(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.tflite").write_bytes(fully_connected(sparse_values((32, 64), 1.0)))
    return [tmp_path / "a.tflite", tmp_path / "b.tflite"]


def test_bench_of_two_files(paths):
    done = []
    report = bench(paths, runs=7, warmup=2, threads=2, progress=done.append)
    assert done == list(range(1, 10))
    first, second = report.files
    assert (first.name, second.name, first.ratio) == ("a.tflite", "b.tflite", 1.0)
    assert second.ratio == second.latency / first.latency
    assert first.bytes == paths[0].stat().st_size
    assert first.latency > 0
    assert first.load > 0
    assert json.loads(json.dumps(report.to_dict()))["runs"] == 7
    assert str(report).splitlines()[-1] == "7 runs of each file, interleaved, 2 thread(s)"


def test_bench_reports_median_latency_and_interquartile_range(paths, monkeypatch):
    seconds = [[9.0, 9.0], *([float(n), 2.0 * n] for n in (5, 1, 4, 2, 3))]
    monkeypatch.setattr(measure, "_rounds", lambda interpreters: iter(seconds))
    first, second = bench(paths, runs=5, warmup=1).files
    assert (first.latency, first.spread) == (3.0, 2.0)
    assert (second.latency, second.spread, second.ratio) == (6.0, 4.0, 2.0)


def test_bench_of_a_single_file_with_integer_inputs(tmp_path):
    graph = File().graph()
    x = graph.tensor([2, 3], "int32")
    graph.finish({"x": x}, {"y": graph.unary("ABS", x)})
    path = tmp_path / "model.tflite"
    path.write_bytes(graph.file.content())
    (file,) = bench([path], runs=1, warmup=0).files
    assert (file.ratio, file.spread) == (1.0, 0.0)


def test_bench_resizes_an_unknown_batch_size(monkeypatch):
    contents = [
        fully_connected(sparse_values((32, 64), 1.0)),
        fully_connected(np.eye(64, dtype="f")),
    ]
    interpreters = measure._load_all(contents, threads=1, batch=5)
    shapes = [interpreter.get_input_details()[0]["shape"] for _, interpreter in interpreters]
    assert [shape.tolist() for shape in shapes] == [[5, 64], [5, 64]]
    assert len(latencies(contents, batch=5)) == 2


def open_convolution():
    weight = sparse_values((8, 3, 3, 4), 1.0)
    return with_dynamic_images(convolution("CONV_2D", weight, same=False))


@pytest.mark.parametrize(
    ("shapes", "expected"), [(None, [5, 32, 32, 4]), ({"x": (5, 9, 7, 4), "y": (2,)}, [5, 9, 7, 4])]
)
def test_sizes_of_dynamic_axes(shapes, expected):
    content = open_convolution()
    ((_, interpreter),) = measure._load_all([content], threads=1, batch=5, shapes=shapes)
    assert interpreter.get_input_details()[0]["shape"].tolist() == expected
    model = flatbuffer.read(content)
    (weight,) = encode.weights(model)
    piece = flatbuffer.write(flatbuffer.extract_readers(model, weight.buffer))
    assert latencies([piece], batch=5, shapes=shapes)[0] > 0


def test_bench_of_a_file_with_dynamic_axes(tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(open_convolution())
    assert bench([path], runs=1, warmup=0).files[0].latency > 0


on_linux = pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc"
)


@on_linux
def test_peak_memory_grows_with_the_shapes_of_inputs():
    content = open_convolution()
    small, large = (peak_memory(content, shapes={"x": (1, n, n, 4)}) for n in (8, 1024))
    assert large - small > 1024 * 1024 * 4 * 4
    assert peak_memory(content) > 0


@on_linux
def test_peak_memory_grows_with_the_file():
    small, large = (fully_connected(np.ones((n, 1024), np.float32)) for n in (8, 4096))
    assert peak_memory(large) - peak_memory(small) > 4096 * 1024 * 4
    assert peak_memory(small, batch=4, threads=2) > 0


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"runs": 0}, {"warmup": -1}, {"runs": True}])
def test_bench_with_invalid_numbers_raises(paths, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        bench(paths, **wrong)


def test_bench_without_files_or_with_a_damaged_file_raises(paths):
    with pytest.raises(ValueError, match="Expected at least one path"):
        bench([])
    paths[1].write_bytes(paths[1].read_bytes()[:90])
    with pytest.raises(ValueError, match="damaged"):
        bench(paths)


def test_bench_interleaves_the_runs_of_files(paths, monkeypatch):
    order = []

    class FakeInterpreter:
        def __init__(self, model_content, num_threads):
            self.name = len(order)

        allocate_tensors = get_input_details = lambda self: []

        def invoke(self):
            order.append(id(self))

    monkeypatch.setattr("keras_dst.export.measure.Interpreter", FakeInterpreter)
    bench(paths, runs=3, warmup=1)
    assert len(set(order)) == 2
    first, second = order[0], order[2]
    # Each file runs twice in a row, because only the second run is timed.
    assert order == [first, first, second, second] * 4
