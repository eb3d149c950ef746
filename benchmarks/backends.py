"""Run a benchmark on a backend. Keras must be imported after the backend is chosen."""

import os
import subprocess
import sys

BACKENDS = ("tensorflow", "jax", "torch")


def run_on(backend: str, module: str, *arguments: str, variables: dict | None = None) -> None:
    """Run `python -m benchmarks.MODULE ARGUMENTS` with a backend; raise if it fails.

    `variables` are added to the environment of the process.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    print(f"KERAS_BACKEND={backend}", *command[1:], flush=True)
    environment = {**os.environ, **(variables or {}), "KERAS_BACKEND": backend}
    subprocess.run(command, env=environment, check=True)
