"""Tests that run the unchanged code of docs/many_devices.md."""

import os
import pathlib
import re

import keras
import pytest

from tests.backends import slow
from tests.devices.launch import launch
from tests.pages import blocks

BACKEND = keras.backend.backend()
WORKERS = "tensorflow processes=2"  # Header of the code block for several TensorFlow workers.


def of_this_backend():
    found = [(i, c) for i, c in blocks("many_devices.md") if i.split(" ")[0] == BACKEND]
    assert found
    return found


# `make test` runs only the code for several TensorFlow workers. test_devices.py already tests the
# strategies in the other code blocks.
@pytest.mark.parametrize(
    ("info", "code"),
    [
        pytest.param(*block, id=str(i), marks=[] if block[0] == WORKERS else [slow])
        for i, block in enumerate(of_this_backend())
    ],
)
def test_many_devices(info, code, tmp_path):
    common = "".join(code for info, code in blocks("many_devices.md") if not info)
    processes = int((re.findall(r"processes=(\d+)", info) or [1])[0])
    script = tmp_path / "train.py"
    last = "print('It ended at', keras_dst.report(model).sparsity)\n"
    script.write_text(common + code + last)
    flags = f"--xla_force_host_platform_device_count=4 {os.environ['XLA_FLAGS']}"
    outputs = launch([str(script)], processes, pathlib.Path(tmp_path), XLA_FLAGS=flags)
    for output in outputs:
        reached = re.search(r"It ended at ([\d.]+)", output)[1]
        assert float(reached) == pytest.approx(0.8, abs=0.01)
