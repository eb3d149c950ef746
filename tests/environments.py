"""Test wheels in new environments in build/environments: each extra, and old and new packages.

    python tests/environments.py wheel              check wheel and sdist, install every extra
    python tests/environments.py wheel jax export   check only these extras
    python tests/environments.py versions           run core tests with old and new packages
    python tests/environments.py versions newest    check only this set

Each environment is deleted after its checks have passed. The script needs only Python.
"""

import glob
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "environments"
DIST = ROOT / "build" / "dist"
PYTHONS = ("3.11", "3.12", "3.13")
BACKENDS = ("tensorflow", "jax", "torch")

# Name: (extras of keras-dst, other requirements). TensorFlow 2.21 does not accept Keras 3.10 and
# 3.11. test_wheel.py checks that the lower bounds are equal to the lower bounds of pyproject.toml.
SETS = {
    "oldest": (["jax", "torch"], ["keras==3.10", "jax==0.10", "torch==2.13"]),
    "oldest-tensorflow": (["export"], ["keras==3.12", "tensorflow==2.21", "ai-edge-litert==2.1"]),
    "newest": (["tensorflow", "jax", "torch", "export"], []),
}
TEST_PACKAGES = ["hypothesis", "pytest", "safetensors", "scikit-learn"]
CORE = ["test_keras_names.py", "test_contract.py", "test_layers.py", "test_sparse_files.py"]
EXPORT = ["export/test_export_tflite.py"]
CORE_NAMES = (
    "names or config_round_trip or test_target or saved_and_resumed or sparse_files"
    " or equals_its_stock or multilayer or residual or recurrence"
)

SMOKE = """
import keras, numpy, keras_dst
x, y = numpy.ones((32, 8), "f"), numpy.ones((32, 1), "f")
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16), keras.layers.Dense(1)])
model.compile("adam", "mse")
keras_dst.sparsify(model, keras_dst.methods.Magnitude(0.5))
model.fit(x, y, verbose=0, callbacks=[keras_dst.callbacks.SparseTraining()])
report = keras_dst.report(keras_dst.strip(model))
assert abs(report.sparsity - 0.5) < 0.01, report
"""
# Code that needs the packages of an extra.
USES = {
    "demo": "from keras_dst.demo import run; run()",
    "ethos": "import ethosu.vela",
    "export": "print(keras_dst.export_tflite(model, 'model.tflite'))",
    "micro": "import tflite_micro",
    "plot": "report.save_html('report.html'); keras_dst.plots",
    "safetensors": "keras_dst.save_sparse(model, 'm.st'); keras_dst.load_sparse('m.st')",
    "tensorboard": """
keras_dst.sparsify(model, keras_dst.methods.DST(0.5))
board = keras_dst.callbacks.SparsityTensorBoard("logs")
model.fit(x, y, verbose=0, callbacks=[keras_dst.callbacks.SparseTraining(), board])
""",
    "tuner": "keras_dst.tuner",
}


def run(*command, **environment) -> bool:
    """Run a command in build/environments; return True if it succeeds."""
    variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1", **environment}
    variables.pop("PYTHONPATH", None)
    done = subprocess.run([str(part) for part in command], cwd=FOLDER, env=variables)
    return done.returncode == 0


def create(name: str, python: str, *requirements: str) -> pathlib.Path:
    """Create an environment, install requirements, and return the path of its Python."""
    print(f"\n== {name}: {' '.join(requirements)}", flush=True)
    folder = FOLDER / name
    new = folder / "bin" / "python"
    shutil.rmtree(folder, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not run(python, "-m", "venv", folder) or not run(
        new, "-m", "pip", "install", "--quiet", *requirements
    ):
        raise OSError(f"pip could not install: {' '.join(requirements)}")
    return new


def build() -> str:
    """Build and check an sdist and a wheel of it, and return the path of the wheel."""
    python = create("build", sys.executable, "build", "twine")
    shutil.rmtree(DIST, ignore_errors=True)
    if not run(python, "-m", "build", "--outdir", DIST, ROOT):
        raise OSError("The sdist and the wheel could not be built.")
    files = sorted(DIST.iterdir())
    if len(files) != 2 or not run(python, "-m", "twine", "check", "--strict", *files):
        raise OSError(f"Expected one valid wheel and one valid sdist. Received: {files}.")
    (wheel,) = DIST.glob("*.whl")
    return str(wheel)


def check_extra(wheel: str, extra: str) -> bool:
    """Install the wheel with one extra, train a model, and run code that needs the extra."""
    python = create(f"extra-{extra}", sys.executable, f"{wheel}[{extra}]")
    found = "import importlib.util as u, sys; sys.exit(u.find_spec(sys.argv[1]) is None)"
    backend = next((name for name in BACKENDS if run(python, "-c", found, name)), None)
    if backend is None:
        backend = "jax"
        run(python, "-m", "pip", "install", "--quiet", f"{wheel}[jax]")
    code = SMOKE + USES.get(extra, "")
    return run(python.with_name("keras-dst"), "--version") and run(
        python, "-c", code, KERAS_BACKEND=backend
    )


def check_set(wheel: str, name: str, version: str, python: str) -> bool:
    """Install one set of versions, and run the core tests on each backend of the set."""
    extras, pins = SETS[name]
    new = create(f"{name}-{version}", python, f"{wheel}[{','.join(extras)}]", *pins, *TEST_PACKAGES)
    run(new, "-m", "pip", "list", "--format=freeze")
    files = [ROOT / "tests" / file for file in CORE + EXPORT * ("export" in extras)]
    options = ["-p", "no:cacheprovider", "--rootdir", ROOT, "-m", "not slow", "-k", CORE_NAMES]
    backends = [b for b in BACKENDS if b in extras or (b == "tensorflow" and "export" in extras)]
    results = [
        run(new, "-m", "pytest", "-c", ROOT / "setup.cfg", *options, *files, KERAS_BACKEND=backend)
        for backend in backends
    ]
    return all(results)


def interpreter(version: str) -> str | None:
    """Return the path of a working Python of this version, from PATH or pyenv."""
    pyenv = sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python")))
    for path in [shutil.which(f"python{version}"), *pyenv]:
        if (
            path
            and subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0
        ):
            return path
    return None


def main(what: str, *names: str) -> int:
    """Run all checks, print failed and skipped checks, and return the exit code."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wheel = build()
    if what == "wheel":
        extras = names or tuple(project["optional-dependencies"])
        checks = {f"extra-{name}": (check_extra, name) for name in extras}
    else:
        found = {version: interpreter(version) for version in PYTHONS}
        checks = {
            f"{name}-{version}": (check_set, name, version, python)
            for version, python in found.items()
            if python
            for name in names or SETS
        }
        for version, python in found.items():
            if not python:
                print(f"Skipped: Python {version} is not installed.")
    outcomes = {}
    for name, (check, *arguments) in checks.items():
        try:
            outcomes[name] = check(wheel, *arguments)
        except OSError as error:
            print(error)
            outcomes[name] = False
        if outcomes[name]:
            shutil.rmtree(FOLDER / name)
    print("\nPassed:", *(name for name, passed in outcomes.items() if passed))
    print("Failed:", *(name for name, passed in outcomes.items() if not passed))
    return 0 if all(outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
