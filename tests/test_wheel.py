"""Tests that the wheel contains the package, and works without the repository."""

import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

import keras
import pytest

import keras_dst
from tests.backends import heavy, once
from tests.environments import SETS
from tests.pages import ROOT

pytestmark = once

SCRIPT = """
import pathlib, runpy, sys
import keras, keras_dst

assert pathlib.Path(keras_dst.__file__).is_relative_to(sys.prefix), keras_dst.__file__
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
keras_dst.sparsify(model, keras_dst.methods.DST())
print(keras_dst.report(keras_dst.strip(model)))

def print_output(run, name, argument):
    print(f"== {argument}")
    sys.argv = ["keras-dst", argument]
    try:
        run(name, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0

command = str(pathlib.Path(sys.prefix) / "bin" / "keras-dst")
print_output(runpy.run_path, command, "--version")
print_output(runpy.run_path, command, "--help")
print_output(runpy.run_module, "keras_dst", "--help")
"""


def run(*command, cwd):
    environment = {
        "KERAS_BACKEND": keras.backend.backend(),
        "PATH": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_oldest_tested_versions_equal_the_lower_bounds():
    """The oldest versions in `make test-versions` are the lower bounds in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["jax"], *extras["torch"], *extras["export"]]
    bounds = {n.split(",")[0].replace(">=", "==") for n in needed if ">=" in n}
    pins = {pin for name, (_, pins) in SETS.items() if "oldest" in name for pin in pins}
    assert bounds <= pins


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy of the repository, without a network connection."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("keras_dst", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("keras_dst_cli.py", "pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    run(sys.executable, "-m", "pip", "wheel", *options, ".", "-w", "dist", cwd=folder)
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Create an environment that contains the wheel and all other packages of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    # A .pth file makes the packages of this environment importable in the new environment. Python
    # searches the added path last, and ignores the .pth files in this path.
    (pathlib.Path(site.strip()) / "here.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", str(wheel), cwd=folder)
    return folder


@heavy
def test_the_wheel_contains_only_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in ROOT.glob("keras_dst/**/*.*") if "__pycache__" not in path.parts]
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == {str(path.relative_to(ROOT)) for path in files} | {"keras_dst_cli.py"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@heavy
def test_the_installed_wheel_works(installed):
    report, version, shown, again = run(
        installed / "bin" / "python", "-c", SCRIPT, cwd=installed
    ).split("== --")
    assert "0.00 % sparse" in report
    assert version.split() == ["version", "keras-dst", keras_dst.__version__]
    for name in ("demo", "report", "strip", "shrink", "export", "inspect", "lint", "bench"):
        assert f"  keras-dst {name}" in shown or f"    {name} " in shown
    assert "Exit codes: 0 done; 1 failed" in shown
    assert shown == again
