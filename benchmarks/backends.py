"""Run a benchmark on a backend. The backend must be chosen before Keras is imported."""

import os
import subprocess
import sys

BACKENDS = ("tensorflow", "jax", "torch")


def run_on(
    backend: str,
    module: str,
    *arguments: str,
    variables: dict | None = None,
    timeout: float | None = None,
) -> None:
    """Run `python -m benchmarks.MODULE ARGUMENTS` on a backend; raise an error if it fails.

    `variables` are added to the environment of the process. The process is stopped after `timeout`
    seconds.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    print(f"KERAS_BACKEND={backend}", *command[1:], flush=True)
    environment = {**os.environ, **(variables or {}), "KERAS_BACKEND": backend}
    subprocess.run(command, env=environment, check=True, timeout=timeout)


def card() -> str | None:
    """Return the name of the GPU or TPU that JAX or PyTorch uses, or None if it uses the CPU."""
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    import jax

    device = jax.devices()[0]
    return None if device.platform == "cpu" else device.device_kind
