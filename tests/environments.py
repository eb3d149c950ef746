"""Install wheels in build/environments, and test each extra and old and new package versions.

    python tests/environments.py wheel              check wheel and sdist, install every extra
    python tests/environments.py wheel jax export   check only these extras
    python tests/environments.py versions           run core tests with old and new packages
    python tests/environments.py versions newest    check only this set, on every Python
    python tests/environments.py versions 3.12      check all sets, only on this Python
    python tests/environments.py versions newest-3.12

Two checks run at a time, so that pip downloads packages for one check during the tests of the other
check. When a check ends, its output is printed, and its environment is deleted if the check passed.
At the end, the script lists passed, failed and skipped checks with the reasons. The script imports
only the standard library.

If pip would install a CUDA build of PyTorch, the core tests skip PyTorch, because the download has
several GB. Set KERAS_DST_CUDA=1 to install the CUDA build.
"""

import functools
import glob
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ProcessPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "environments"
DIST = ROOT / "build" / "dist"
PYTHONS = ("3.11", "3.12", "3.13")
BACKENDS = ("tensorflow", "jax", "torch")

# SETS maps a name to extras of keras-dst and to other requirements. TensorFlow 2.21 does not work
# with Keras 3.10 and 3.11. test_wheel.py checks that the oldest versions equal the lower bounds in
# pyproject.toml.
SETS = {
    "oldest": (["jax", "torch"], ["keras==3.10", "jax==0.10", "torch==2.13"]),
    "oldest-tensorflow": (["export"], ["keras==3.12", "tensorflow==2.21", "ai-edge-litert==2.1"]),
    "jax-0.11": (["jax"], ["jax==0.11.*"]),
    "newest": (["tensorflow", "jax", "torch", "export"], []),
}
UNAVAILABLE = {"jax-0.11-3.11": "JAX 0.11 needs Python 3.12"}
TEST_PACKAGES = ["hypothesis", "pytest", "safetensors", "scikit-learn"]
CORE = ["test_keras_names.py", "test_contract.py", "test_layers.py", "test_sparse_files.py"]
EXPORT = ["export/test_export_tflite.py"]
# The test of resumed training trains three models per method, so only three methods are tested.
CORE_NAMES = (
    "names or config_round_trip or test_target or sparse_files"
    " or (saved_and_resumed and (rigl or consensus or dst-target))"
    " or equals_its_stock or multilayer or residual or recurrence"
)

SMOKE = """
import os, sys
os.chdir(sys.prefix)  # Files are written into the environment, which is deleted.
import keras, numpy, keras_dst
x, y = numpy.ones((32, 8), "f"), numpy.ones((32, 1), "f")
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16), keras.layers.Dense(1)])
model.compile("adam", "mse")
keras_dst.sparsify(model, keras_dst.methods.Magnitude(0.5))
model.fit(x, y, verbose=0, callbacks=[keras_dst.callbacks.SparseTraining()])
report = keras_dst.report(keras_dst.strip(model))
assert abs(report.sparsity - 0.5) < 0.01, report
"""
# USES maps the name of an extra to code that needs the packages of this extra.
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
    """Create a virtual environment with the given packages, and return the path of its Python."""
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
    """Build an sdist and a wheel from the sdist, check both, and return the path of the wheel."""
    python = create("build", sys.executable, "build", "twine")
    shutil.rmtree(DIST, ignore_errors=True)
    if not run(python, "-m", "build", "--outdir", DIST, ROOT):
        raise OSError("The sdist and the wheel could not be built.")
    files = sorted(DIST.iterdir())
    if len(files) != 2 or not run(python, "-m", "twine", "check", "--strict", *files):
        raise OSError(f"Expected one valid wheel and one valid sdist. Received: {files}.")
    (wheel,) = DIST.glob("*.whl")
    return str(wheel)


def check_extra(wheel: str, extra: str) -> None:
    """Install the wheel with one extra, train a model, and run code that needs the extra."""
    python = create(f"extra-{extra}", sys.executable, f"{wheel}[{extra}]")
    found = "import importlib.util as u, sys; sys.exit(u.find_spec(sys.argv[1]) is None)"
    backend = next((name for name in BACKENDS if run(python, "-c", found, name)), None)
    if backend is None:
        backend = "jax"
        run(python, "-m", "pip", "install", "--quiet", f"{wheel}[jax]")
    code = SMOKE + USES.get(extra, "")
    if not run(python.with_name("keras-dst"), "--version"):
        raise OSError("keras-dst --version failed.")
    if not run(python, "-c", code, KERAS_BACKEND=backend):
        raise OSError(f"The code for this extra failed on {backend}.")


def has_cuda_build(python: str, requirement: str) -> bool:
    """Return whether pip would install a CUDA build of PyTorch for a requirement."""
    options = ["--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    command = [python, "-m", "pip", "install", *options, requirement]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise OSError(f"pip could not find {requirement}: {found.stderr.strip()[-300:]}")
    names = [package["metadata"]["name"] for package in json.loads(found.stdout)["install"]]
    return any(name.startswith("nvidia-") for name in names)


def check_set(wheel: str, name: str, version: str) -> list[str]:
    """Install the package versions in `SETS[name]`, and run the core tests on each backend.

    Return the reason for each skipped backend.
    """
    extras, pins = SETS[name]
    skipped = []
    torch = next((pin for pin in pins if pin.startswith("torch")), "torch")
    if (
        "torch" in extras
        and os.environ.get("KERAS_DST_CUDA") != "1"
        and has_cuda_build(interpreter(version), torch)
    ):
        extras = [extra for extra in extras if extra != "torch"]
        pins = [pin for pin in pins if pin != torch]
        skipped.append(f"torch: pip finds only a CUDA build of {torch}; set KERAS_DST_CUDA=1")
    requirements = [f"{wheel}[{','.join(extras)}]", *pins, *TEST_PACKAGES]
    new = create(f"{name}-{version}", interpreter(version), *requirements)
    run(new, "-m", "pip", "list", "--format=freeze")
    files = [ROOT / "tests" / file for file in CORE + EXPORT * ("export" in extras)]
    options = ["-p", "no:cacheprovider", "--rootdir", ROOT, "-m", "not slow", "-k", CORE_NAMES]
    backends = [b for b in BACKENDS if b in extras or (b == "tensorflow" and "export" in extras)]
    pytest = [new, "-m", "pytest", "-c", ROOT / "setup.cfg", *options, *files]
    failed = [backend for backend in backends if not run(*pytest, KERAS_BACKEND=backend)]
    if failed:
        raise OSError(f"The tests failed on {', '.join(failed)}.")
    return skipped


def interpreter(version: str) -> str | None:
    """Return the path of a Python of the given version that can create environments, or None.

    The function searches PATH and the versions of pyenv.
    """
    pyenv = sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python")))
    for path in [shutil.which(f"python{version}"), *pyenv]:
        if (
            path
            and subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0
        ):
            return path
    return None


def attempt(wheel: str, check: tuple[str, str]) -> tuple[str, list[str]]:
    """Run a check in a worker process.

    Return the output of the check, and the lines about this check in the summary of all checks.
    """
    name = "-".join(check)
    log = FOLDER / f"{name}.log"
    # Redirect stdout and stderr of this process and its children to the log.
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        skipped = []
        if check[0] == "extra":
            check_extra(wheel, check[1])
        else:
            skipped = check_set(wheel, *check)
        shutil.rmtree(FOLDER / name)
        outcome = [f"passed   {name}", *(f"skipped  {name}, {reason}" for reason in skipped)]
    except OSError as error:
        outcome = [f"failed   {name}: {error}"]
    return log.read_text(), outcome


def main(what: str, *names: str) -> int:
    """Run all checks, list their outcomes, and return the exit code."""
    if what == "wheel":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        checks = [("extra", extra) for extra in project["optional-dependencies"]]
    else:
        checks = [(name, version) for version in PYTHONS for name in SETS]
    unknown = set(names) - {name for check in checks for name in (*check, "-".join(check))}
    if unknown:
        raise ValueError(f"Expected names from {checks}. Received: {sorted(unknown)}.")
    wheel = build()
    outcomes, selected = [], []
    for check in checks:
        name = "-".join(check)
        if names and not {name, *check} & set(names):
            outcomes.append(f"skipped  {name}: not selected")
        elif name in UNAVAILABLE:
            outcomes.append(f"skipped  {name}: {UNAVAILABLE[name]}")
        elif what == "versions" and not interpreter(check[1]):
            outcomes.append(f"skipped  {name}: Python {check[1]} is not installed")
        else:
            selected.append(check)
    sys.stdout.flush()
    with ProcessPoolExecutor(max_workers=2) as workers:
        for output, outcome in workers.map(functools.partial(attempt, wheel), selected):
            print(output, flush=True)
            outcomes += outcome
    print("\n" + "\n".join(outcomes))
    return int(any(outcome.startswith("failed") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
