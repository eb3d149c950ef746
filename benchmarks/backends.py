"""What a benchmark needs before it imports Keras, which has one backend for all of a process."""

import os
import pathlib
import subprocess
import sys

BACKENDS = ("tensorflow", "jax", "torch")
HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parent / "results"


def run_on(backend: str, module: str, *arguments: str, variables: dict | None = None) -> None:
    """Run `python -m benchmarks.MODULE ARGUMENTS` with a backend; raise if it fails.

    `variables` are put into its environment.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    print(f"KERAS_BACKEND={backend}", *command[1:], flush=True)
    environment = {**os.environ, **(variables or {}), "KERAS_BACKEND": backend}
    subprocess.run(command, env=environment, check=True)


def write_page(path: pathlib.Path, lines: list[str]) -> None:
    """Write a page of tables, and below them what they say in words: benchmarks/NAME.md, if any."""
    notes = HERE / path.name
    words = ["", notes.read_text().rstrip()] if notes.exists() else []
    path.write_text("\n".join([*lines, *words]) + "\n")
    print(path.read_text())
