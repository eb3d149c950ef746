"""Pytest marks for tests that need no backend and for slow tests."""

import os

import keras
import pytest

#: TensorFlow and JAX compile a training step for every model, which takes most of the test time.
COMPILES = keras.backend.backend() != "torch"

#: Mark of tests that do not depend on the backend, such as tests of NumPy code or of files. `make
#: test` runs these tests once, in a separate job.
once = pytest.mark.once

#: Mark of slow tests, which run in `make test-all` but not in `make test`.
slow = pytest.mark.slow

#: Mark of tests in which every case compiles a training step, which takes most of the test time.
#: With `every(n)`, `make test` runs all cases on PyTorch, but every n-th case on TensorFlow and
#: JAX. JAX starts with the first case and TensorFlow with the second, so that their cases differ.
every = pytest.mark.every

#: True in `make test-all`, which runs the slow tests.
LONG = bool(os.environ.get("KERAS_DST_LONG"))


def short(cases: dict, *names: str) -> dict:
    """Return only the named cases in `make test`, but all cases in `make test-all`."""
    return cases if LONG else {name: cases[name] for name in names}
