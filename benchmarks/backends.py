"""Run benchmarks on a given backend, in new processes.

Each backend needs a new process, because Keras cannot change its backend after the import.
"""

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
    """Run `python -m benchmarks.MODULE ARGUMENTS` on a backend.

    Raise an error if the command fails.

    The environment variables in `variables` are set in the new process. After `timeout` seconds,
    the process is stopped.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    print(f"KERAS_BACKEND={backend}", *command[1:], flush=True)
    environment = {**os.environ, **(variables or {}), "KERAS_BACKEND": backend}
    subprocess.run(command, env=environment, check=True, timeout=timeout)


def card() -> str | None:
    """Return the name of the GPU or TPU that JAX or PyTorch uses, or None on a CPU."""
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    import jax

    device = jax.devices()[0]
    return None if device.platform == "cpu" else device.device_kind
