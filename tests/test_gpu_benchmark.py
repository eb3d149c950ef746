"""Tests of the GPU benchmark on a CPU: printed lines, time limit, and the error without a GPU."""

import keras
import pytest

from benchmarks import results
from benchmarks.training_cost import gpu

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="needs JAX or PyTorch"),
]


@pytest.fixture(autouse=True)
def no_files(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)
    assert list(tmp_path.iterdir()) == []


def test_the_gpu_benchmark_without_a_gpu_raises(monkeypatch):
    monkeypatch.setattr(gpu, "card", lambda: None)
    with pytest.raises(SystemExit, match=r"Expected an accelerator\. \w+ found none"):
        gpu.measure(["mlp"], smoke=False, limit=1)


@pytest.mark.heavy
def test_a_trial_prints_a_row_for_each_method_and_dtype(monkeypatch, capsys):
    chosen = {name: gpu.methods()[name] for name in ("DST", "DCIL")}
    monkeypatch.setattr(gpu, "methods", lambda: chosen)
    monkeypatch.setattr(gpu, "COPIES", 2)
    gpu.measure(["mlp"], smoke=True, limit=60)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split(":")[0].split(", ")[2:] for line in lines] == [
        [policy, method] for policy in gpu.POLICIES for method in chosen
    ]
    for line in lines:
        assert ("every 16 steps" in line) == ("DCIL" in line)
        assert "not" not in line  # Each line contains a time and a finite loss.


def test_methods_without_remaining_time_are_skipped(capsys):
    gpu.measure(["resnet-32"], smoke=True, limit=-1)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == len(gpu.methods())
    assert all("left out" in line for line in lines)


def test_cells_of_a_row_by_column():
    row = {
        "step_ratio": 1.25,
        "dense_seconds_per_step": 0.004,
        "peak_bytes": 3 << 20,
        "dense_peak_bytes": 2 << 20,
        "loss_is_finite": True,
        "update": {"seconds": 0.003, "every_steps": 16, "seconds_of_a_pass": 0.0002},
    }
    assert gpu.cells(row) == {
        "step": "1.25× of 4.00 ms",
        "update": "3.0 ms every 16 steps",
        "passes": "15",
        "memory": "3 MiB (1.50×)",
    }
    assert gpu.cells(None) == {"step": "not measured"}
