"""Run Python on an emulated ARM CPU, with LiteRT's arm64 wheel and the NEON kernels of XNNPACK.

``setup.sh`` downloads the emulator and the packages to build/arm64.
"""

import os
import pathlib
import subprocess

_FOLDER = pathlib.Path(__file__).parents[2] / "build" / "arm64"


def obstacle():
    """Return why ARM cannot be emulated on this machine, or an empty string if emulation works."""
    if (_FOLDER / "ready").exists():
        return ""
    return f"{_FOLDER / 'ready'} is missing. Fix: run tests/arm64/setup.sh on Debian"


def run(code, *arguments):
    """Run Python code on the emulated CPU. If the code fails, raise a RuntimeError that contains
    the output on stderr."""
    (python,) = (_FOLDER / "root" / "usr" / "bin").glob("python3.*")
    done = subprocess.run(
        [
            _FOLDER / "qemu-aarch64-static",
            "-cpu",
            "neoverse-n1",
            "-L",
            _FOLDER / "root",
            python,
            "-c",
        ]
        + ["import sys\n" + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_FOLDER / "site"), "PYTHONHOME": ""},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout
