"""Which tests run on which backend."""

import keras
import pytest

#: TensorFlow and JAX compile every step again for every model, which takes most of the test time.
COMPILES = keras.backend.backend() != "torch"

#: Marks a test of Python, NumPy, files or graphs of layers, which no backend changes. `make test`
#: runs these tests once, in a job of their own.
once = pytest.mark.once

#: Marks a long form of a test that `make test` runs in a short form. `make test-all` runs it.
slow = pytest.mark.slow
