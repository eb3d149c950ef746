"""Pytest marks for tests that need no backend and for slow tests."""

import os

import keras
import pytest

#: TensorFlow and JAX compile a training step for every model, which takes most of the test time.
COMPILES = keras.backend.backend() != "torch"

#: Pytest mark of tests that do not depend on the backend, such as tests of NumPy code or of files.
#: `make test` runs these tests once, in a separate job.
once = pytest.mark.once

#: Pytest mark of tests that take five seconds or more. `make check` does not run these tests.
heavy = pytest.mark.heavy

#: Pytest mark of slow tests, which run in `make test-all` but not in `make test`.
slow = pytest.mark.slow

#: Pytest mark of tests that compile a training step in every test case. Compilation takes most of
#: the test time. With the mark `every(n)`, `make test` runs all test cases on PyTorch, but only
#: every n-th test case on TensorFlow and JAX. One counter counts the marked test cases of all tests
#: in a file. TensorFlow and JAX do not run the same test cases. With `every(0)`, `make test` runs a
#: test only on PyTorch. With `every(1)`, `make test` runs all test cases on each backend.
#: `make test-all` runs all cases on all backends.
every = pytest.mark.every

#: Pytest mark of tests that export many models. JAX and PyTorch start a second Python process for
#: each conversion, which takes 5 seconds or more. `test_export_does_not_change_a_sparse_model`
#: tests this process.
on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="conversion in a second Python takes too long"
)

#: Whether the slow tests run, as in `make test-all`.
LONG = bool(os.environ.get("KERAS_DST_LONG"))


def short(cases: dict, *names: str) -> dict:
    """Return the test cases to run: only `names` in `make test`, all cases in `make test-all`."""
    return cases if LONG else {name: cases[name] for name in names}
