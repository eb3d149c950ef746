"""Environment variables that must be set before Keras is imported."""

import os
import pathlib

# The tests fit the same small models again and again: let XLA compile each program once.
cache = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Compile without optimization: the networks are small, and optimizing takes most of the test time.
# Users run the default level, and so does `make test-xla`.
if not os.environ.get("KERAS_DST_XLA_DEFAULT"):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {flags}".strip()


def pytest_configure(config):
    # Keras's own tests, which tests/test_keras_optimizers.py runs, have this mark.
    config.addinivalue_line("markers", "requires_trainable_backend: a test of Keras that trains")
