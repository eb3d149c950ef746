"""Runs Python as on an ARM CPU, emulated: LiteRT's wheel for arm64, XNNPACK with NEON.

``setup.sh`` gets all of it into build/arm64; ``make test`` calls it where it can run.
"""

import os
import pathlib
import subprocess

_FOLDER = pathlib.Path(__file__).parents[2] / "build" / "arm64"


def obstacle():
    """Why ARM cannot be emulated on this machine; empty if it can."""
    if (_FOLDER / "ready").exists():
        return ""
    return "an emulated ARM needs what tests/arm64/setup.sh gets, on a Debian: there is no " + str(
        _FOLDER / "ready"
    )


def run(code, *arguments):
    """Runs Python code on the emulated CPU; raises with its words where it fails."""
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
