"""What a benchmark needs before it imports Keras, which has one backend for all of a process."""

import os
import pathlib
import subprocess
import sys

BACKENDS = ("tensorflow", "jax", "torch")
RESULTS = pathlib.Path(__file__).parent.parent / "results"


def run_on(backend: str, module: str, *arguments: str) -> None:
    """Run `python -m benchmarks.MODULE ARGUMENTS` with a backend; raise if it fails."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    print(f"KERAS_BACKEND={backend}", *command[1:], flush=True)
    subprocess.run(command, env={**os.environ, "KERAS_BACKEND": backend}, check=True)
