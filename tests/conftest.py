"""Set the environment variables that Keras needs at import, and select the slow test cases."""

import gc
import math
import os
import pathlib
from fractions import Fraction
from importlib.metadata import distributions

import pytest

# The tests train the same small models many times, so a cache ensures that XLA compiles each
# program only once. Programs that compile in less than 0.2 s are not cached, because reading them
# from the cache would take longer than compilation.
cache = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# `make test-gpu` runs the tests on a GPU. The settings below make the results of repeated runs
# equal, and compute matrix products in float32. Several processes share the memory of the GPU.
ON_GPU = bool(os.environ.get("KERAS_DST_GPU"))
if ON_GPU:
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

# Compile without XLA's optimizations: for small networks, the optimizations would take most of the
# test time. `make test-xla`, `make test-gpu` and the notebooks use XLA's default optimizations, as
# users do.
OPTIMIZED = ON_GPU or bool(os.environ.get("KERAS_DST_XLA_DEFAULT"))
flags = "--xla_gpu_deterministic_ops=true" if ON_GPU else ""
if not OPTIMIZED:
    flags = "--xla_backend_optimization_level=0"
    # An unknown flag would make XLA end the process. Only jaxlib 0.10 knows
    # `--xla_cpu_use_fusion_emitters`.
    if all(jaxlib.version.startswith("0.10.") for jaxlib in distributions(name="jaxlib")):
        flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()


def pytest_collection_finish():
    """Turn off TensorFlow's graph optimizer. Exclude imported objects from garbage collection."""
    if os.environ.get("KERAS_BACKEND") == "tensorflow" and not OPTIMIZED:
        import tensorflow as tf

        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    gc.collect()
    gc.freeze()
    # Full garbage collections are slow, so let Python run them less often. The fixture
    # `free_compiled_programs` also collects garbage after each test file.
    gc.set_threshold(*gc.get_threshold()[:2], 50)


def pytest_sessionstart(session):
    """Print the GPU of `make test-gpu`, and stop if no GPU is found."""
    if not ON_GPU:
        return
    from benchmarks.backends import card

    device = card()
    if device is None:
        pytest.exit("Expected an accelerator, because KERAS_DST_GPU is set. Found none.", 1)
    session.config.get_terminal_writer().line(f"The tests run on: {device}")


@pytest.fixture(scope="module", autouse=True)
def free_compiled_programs():
    """Free the models and compiled programs of a test file after its last test.

    Every compiled JAX program uses several memory mappings. Linux allows 65,530 mappings per
    process, and JAX crashes with a segmentation fault if a process needs more. This fixture frees
    JAX programs only if the process has many mappings. Otherwise, later test files can reuse the
    compiled programs of single operations.

    TensorFlow never frees the gradient functions of custom gradients. Each gradient function keeps
    the graph of a whole training step in memory. This fixture deletes the gradient functions,
    because the graphs of all tests together would need about 8 GB of memory.
    """
    yield
    if os.environ.get("KERAS_BACKEND") == "jax" and mappings() > 15_000:
        import jax

        jax.clear_caches()
    if os.environ.get("KERAS_BACKEND") == "tensorflow":
        from tensorflow.python.framework.ops import gradient_registry

        gradients = gradient_registry._registry
        for name in [name for name in gradients if name.startswith("CustomGradient-")]:
            del gradients[name]
    gc.collect()


def mappings():
    """Return the number of memory mappings of this process, or infinity if unknown."""
    maps = pathlib.Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else float("inf")


def pytest_configure(config):
    # tests/test_keras_optimizers.py runs tests of Keras itself that use the mark
    # `requires_trainable_backend`.
    config.addinivalue_line(
        "markers", "requires_trainable_backend: a Keras test that trains a model"
    )


def pytest_collection_modifyitems(items):
    """Mark test cases that `every(n)` does not select as slow: only `make test-all` runs them."""
    start = {"jax": Fraction(1, 2), "tensorflow": 0}.get(os.environ.get("KERAS_BACKEND"))
    if start is None:
        return
    shares = {}
    for item in items:
        node, mark = next(item.iter_markers_with_node("every"), (None, None))
        # A test with its own `skipif` mark runs on every backend that the mark allows.
        only_here = node is not item and any(own.name == "skipif" for own in item.own_markers)
        elsewhere = item.get_closest_marker("once") or item.get_closest_marker("slow")
        if mark is None or only_here or elsewhere:
            continue
        # `shares` contains a sum for each test file. A test case with the mark `every(n)` adds 1/n
        # to the sum of its file. The test case runs if the sum reaches or passes a whole number.
        (n,) = mark.args
        before = shares.get(item.path, start)
        shares[item.path] = after = before + (Fraction(1, n) if n else 0)
        if math.floor(after) == math.floor(before):
            item.add_marker(pytest.mark.slow)
