"""Tests that a process keeps freed memory only during training runs that request it."""

import contextlib
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
from tests.backends import every

pytestmark = pytest.mark.skipif(
    malloc.glibc() is None, reason="needs glibc with its default memory policy"
)
# Number of bytes in a block. By default, glibc returns blocks of 64 MiB to the system.
SIZE = 64 << 20


def resident_memory():
    """Return the resident memory of the process in bytes."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def is_kept():
    """Allocate and free a block. Return True if the process keeps the memory of the block."""
    block = np.ones(SIZE, "uint8")
    before = resident_memory()
    del block
    return before - resident_memory() < SIZE // 2


def test_freed_memory_is_kept_until_return_freed_memory():
    assert not is_kept()
    malloc.keep_freed_memory()
    try:
        assert is_kept()
        before = resident_memory()
    finally:
        malloc.return_freed_memory()
    assert before - resident_memory() > SIZE // 2
    assert not is_kept()


class Observe(keras.callbacks.Callback):
    """Callback that records whether freed memory is kept, and that may raise an error."""

    def __init__(self, error=None):
        super().__init__()
        self.error, self.seen = error, []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(is_kept())
        if self.error is not None:
            raise self.error()


def fit(error=None, **arguments):
    x, y = models.data(size=32)
    model = models.compiled(models.residual(), SparseOptimizer("sgd", Magnitude(0.5)))
    observe = Observe(error)
    callbacks = [SparseTraining(**arguments), observe]
    with contextlib.suppress(KeyboardInterrupt, ValueError):
        model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=callbacks)
    return observe.seen


def test_training_changes_the_memory_policy_only_on_request():
    assert fit() == [False] * 4
    assert fit(keep_memory=True) == [True] * 4
    assert not is_kept()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_training_restores_the_memory_policy(error):
    assert fit(error, keep_memory=True) == [True]
    assert not is_kept()


@every(0)
def test_environment_variables_have_priority():
    code = "from tests.test_malloc import *; malloc.keep_freed_memory(); print(is_kept())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "131072"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == "False"
