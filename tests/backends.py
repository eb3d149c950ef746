"""Pytest marks that select the backends and the form of a test."""

import os

import keras
import pytest

#: TensorFlow and JAX compile every step again for every model, which takes most of the test time.
COMPILES = keras.backend.backend() != "torch"

#: Marks a test of Python, NumPy, files or graphs of layers, which no backend changes. `make test`
#: runs these tests once, in a job of their own.
once = pytest.mark.once

#: Marks a long form of a test that `make test` runs in a short form. `make test-all` runs it.
slow = pytest.mark.slow

#: Whether the long forms run, as in `make test-all`.
LONG = bool(os.environ.get("KERAS_DST_LONG"))


def short(cases: dict, *names: str) -> dict:
    """Return the named cases in `make test`, and all cases in `make test-all`."""
    return cases if LONG else {name: cases[name] for name in names}
