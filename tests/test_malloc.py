"""Tests that a process keeps freed memory only during training runs that request it."""

import contextlib
import os
import subprocess
import sys

import keras
import pytest

from keras_dst._backend import malloc
from keras_dst.callbacks import SparseTraining
from keras_dst.methods import Magnitude
from keras_dst.optimizers import SparseOptimizer
from tests import models
from tests.backends import once

# The program frees a block of 64 MiB under each memory policy, and prints whether the process keeps
# the block. By default, glibc returns a freed block of this size to the operating system. The
# program runs in a process of its own and imports no backend. In a process with a large heap, glibc
# may place the block in a gap of the heap. The process then keeps the freed block under every
# memory policy.
PROGRAM = """
import importlib.util, mmap, os, pathlib, sys

spec = importlib.util.spec_from_file_location("malloc", sys.argv[1])
malloc = importlib.util.module_from_spec(spec)
spec.loader.exec_module(malloc)
SIZE = 64 << 20

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

def is_kept():
    block = b"1" * SIZE
    before = resident()
    del block
    return before - resident() < SIZE // 2

print(is_kept())
malloc.keep_freed_memory()
print(is_kept())
before = resident()
malloc.return_freed_memory()
print(before - resident() > SIZE // 2)
print(is_kept())
"""


def run(**variables):
    """Run PROGRAM with environment variables, and return the four booleans that it prints.

    1. True if the process keeps a freed block of memory by default.
    2. True if the process keeps a freed block of memory after `keep_freed_memory()`.
    3. True if `return_freed_memory()` returns the freed block to the operating system.
    4. True if the process keeps a freed block of memory after `return_freed_memory()`.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM, malloc.__file__]
    result = subprocess.run(
        command, env=inherited | variables, capture_output=True, text=True, check=True
    )
    return [value == "True" for value in result.stdout.split()]


@once
@pytest.mark.skipif(malloc.glibc() is None, reason="needs glibc with its default memory policy")
def test_freed_memory_is_kept_until_return_freed_memory():
    assert run() == [False, True, True, False]


@once
@pytest.mark.skipif(malloc.glibc() is None, reason="needs glibc with its default memory policy")
def test_environment_variables_have_priority():
    assert run(MALLOC_TRIM_THRESHOLD_="131072") == [False] * 4


class Observe(keras.callbacks.Callback):
    """Callback that appends `policy["kept"]` to a list after every batch, and raises `error` if it
    is given."""

    def __init__(self, policy, error=None):
        super().__init__()
        self.policy, self.error, self.seen = policy, error, []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(self.policy["kept"])
        if self.error is not None:
            raise self.error()


@pytest.fixture
def policy(monkeypatch):
    """Replace the functions that set the memory policy. Instead of setting the memory policy, each
    replacement stores a boolean in `policy["kept"]`."""
    policy = {"kept": False}
    monkeypatch.setattr(malloc, "keep_freed_memory", lambda: policy.update(kept=True))
    monkeypatch.setattr(malloc, "return_freed_memory", lambda: policy.update(kept=False))
    return policy


def fit(policy, error=None, **arguments):
    x, y = models.data(size=32)
    model = models.compiled(models.residual(), SparseOptimizer("sgd", Magnitude(0.5)))
    observe = Observe(policy, error)
    callbacks = [SparseTraining(**arguments), observe]
    with contextlib.suppress(KeyboardInterrupt, ValueError):
        model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=callbacks)
    return observe.seen


def test_training_changes_the_memory_policy_only_on_request(policy):
    assert fit(policy) == [False] * 4
    assert fit(policy, keep_memory=True) == [True] * 4
    assert not policy["kept"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_training_restores_the_memory_policy(policy, error):
    assert fit(policy, error, keep_memory=True) == [True]
    assert not policy["kept"]
