"""Whether free memory stays with the process: while a training lasts, and no longer."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_dst._backend import malloc
from keras_dst.callbacks import SparseTraining
from keras_dst.methods import Magnitude
from keras_dst.optimizers import SparseOptimizer
from tests import models

pytestmark = pytest.mark.skipif(
    malloc._glibc() is None, reason="no glibc, or one that the environment has told"
)
SIZE = 64 << 20  # bytes, above what glibc keeps by itself


def resident():
    """Bytes of memory that the process holds."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def stays():
    """Whether a block of memory stays with the process once it is free."""
    block = np.ones(SIZE, "uint8")
    held = resident()
    del block
    return held - resident() < SIZE // 2


def test_kept_until_given_back():
    assert not stays()
    malloc.keep()
    try:
        assert stays()
        before = resident()
    finally:
        malloc.give_back()
    assert before - resident() > SIZE // 2
    assert not stays()


def test_kept_while_a_training_lasts():
    x, y = models.data(size=32)
    model = models.compiled(models.residual(), SparseOptimizer("sgd", Magnitude(0.5)))
    seen = []
    look = keras.callbacks.LambdaCallback(on_train_batch_end=lambda _, logs: seen.append(stays()))
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[SparseTraining(), look])
    assert seen == [True, True]
    assert not stays()


def test_what_the_environment_says_counts():
    code = "from tests.test_freed_memory import *; malloc.keep(); print(stays())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "131072"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == "False"
