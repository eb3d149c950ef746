"""Which tests are run on which backend."""

import keras
import pytest

#: TensorFlow and JAX compile every step anew for every model: most of the time of their tests.
COMPILES = keras.backend.backend() != "torch"

#: For what is Python, NumPy, files or graphs of layers, whatever the backend computes with.
once = pytest.mark.skipif(COMPILES, reason="nothing of a backend is in it: torch has run it")
