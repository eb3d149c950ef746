"""Pytest marks for tests that need no backend and for slow tests."""

import os

import keras
import pytest

#: TensorFlow and JAX compile a training step for every model, which takes most of the test time.
COMPILES = keras.backend.backend() != "torch"

#: Mark of tests that do not depend on the backend, such as tests of NumPy code or of files. `make
#: test` runs these tests once, in a separate job.
once = pytest.mark.once

#: Mark of slow tests, which are left out by `make test` and included by `make test-all`.
slow = pytest.mark.slow

#: Mark of tests whose cases each compile a training step, which takes most of the test time. With
#: `every(n)`, `make test` runs every n-th case on TensorFlow and JAX, and all cases on PyTorch. JAX
#: starts at the first case and TensorFlow at the second, so the two backends run different cases.
every = pytest.mark.every

#: True in `make test-all`, which runs the slow tests.
LONG = bool(os.environ.get("KERAS_DST_LONG"))


def short(cases: dict, *names: str) -> dict:
    """Return the named cases in `make test`, and all cases in `make test-all`."""
    return cases if LONG else {name: cases[name] for name in names}
