"""What all benchmarks share: data, machine and versions, one JSON file per run."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform

import keras
import numpy as np

RESULTS = pathlib.Path(__file__).parent.parent / "results"


def mnist() -> tuple:
    """MNIST as floats in [0, 1], `(x_train, y_train), (x_test, y_test)`.

    From the folder named by KERAS_DST_DATA (a file mnist.npz in it), else `keras.datasets`.
    """
    folder = os.environ.get("KERAS_DST_DATA")
    if folder:
        with np.load(pathlib.Path(folder) / "mnist.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        train = arrays["x_train"], arrays["y_train"]
        test = arrays["x_test"], arrays["y_test"]
    else:
        train, test = keras.datasets.mnist.load_data()
    return tuple(
        ((x / 255.0).astype("float32")[..., None], y.astype("int32")) for x, y in (train, test)
    )


def environment() -> dict:
    """Backend, versions and machine, for the JSON of a run."""
    packages = ("keras-dst", "keras", "tensorflow", "jax", "torch", "ai-edge-litert", "numpy")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "backend": keras.backend.backend(),
        "versions": versions,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {_cpu()}",
        "date": datetime.date.today().isoformat(),
    }


def _cpu() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def save(name: str, result: dict) -> pathlib.Path:
    """Write one run to results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**result, **environment()}, indent=1) + "\n")
    print(f"wrote {path.relative_to(RESULTS.parent)}")
    return path
