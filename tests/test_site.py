"""The pages as MkDocs builds them, and figures in the repository that no longer hold."""

import inspect
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zlib

import pytest

import keras_dst
from benchmarks import pictures, results
from benchmarks.accuracy import authors, backend_agreement, methods, mnist_runs, patterns
from benchmarks.comparison import libraries
from benchmarks.coverage import models
from benchmarks.files import int8, tflite_cases, tflite_grid
from benchmarks.training_cost import scaling, time_to_accuracy
from tests.backends import once
from tests.pages import PAGES, ROOT

pytestmark = once


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; every warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def html(site):
    return {path: path.read_text() for path in site.rglob("*.html")}


def test_every_page_is_there_and_has_no_marker_left(site):
    for page in PAGES[1:]:
        name = page.removeprefix("docs/").removesuffix(".md").removesuffix("index")
        text = (site / name / "index.html").read_text()
        assert "```" not in text
        assert "<!-- figures" not in text
        assert ("<math" in text) == ("```math" in (ROOT / page).read_text())
    assert "<td>RigL</td>" in (site / "methods/rigl/index.html").read_text()
    assert "<td>DCIL</td>" in (site / "benchmarks/index.html").read_text()


def test_nothing_is_loaded_from_a_network(site):
    for path, text in html(site).items():
        loaded = re.findall(
            r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"?(http[^\" >]+)", text
        )
        assert not loaded, path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?http|@import", path.read_text()), path


def test_every_public_name_is_in_the_reference(site):
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    known = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    # Some functions are called as the modules that they are in.
    known |= {
        f"keras_dst.{n}"
        for n in ("report", "sensitivity", "shrink")
        if f"keras_dst.{n}.{n}" in known
    }
    public = {f"keras_dst.{n}" for n in keras_dst.__all__ if callable(getattr(keras_dst, n))}
    public |= {f"keras_dst.methods.{name}" for name in keras_dst.methods.__all__}
    layers = {layer.__name__ for layer in keras_dst.layers.SPARSE_LAYERS} | {"Gate"}
    public |= {f"keras_dst.layers.{name}" for name in layers & set(keras_dst.layers.__all__)}
    for name in ("schedules", "regularizers"):
        classes = inspect.getmembers(getattr(keras_dst, name), inspect.isclass)
        public |= {
            f"keras_dst.{name}.{n}" for n, c in classes if c.__module__ == f"keras_dst.{name}"
        }
    assert public - known == set()


# -- figures -------------------------------------------------------------------------------------


TABLES = (
    authors,
    backend_agreement,
    int8,
    libraries,
    methods,
    mnist_runs,
    patterns,
    scaling,
    tflite_cases,
    tflite_grid,
    time_to_accuracy,
)


@pytest.mark.parametrize("benchmark", TABLES, ids=lambda module: module.BENCHMARK)
def test_the_table_of_a_benchmark_follows_from_its_runs(benchmark, tmp_path, monkeypatch):
    page = pathlib.Path(benchmark.BENCHMARK) / "index.md"
    committed = (results.RESULTS / page).read_text()
    shutil.copytree(results.RESULTS, tmp_path / "results")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    benchmark.table()
    assert (tmp_path / "results" / page).read_text() == committed


def test_the_page_of_models_follows_from_its_runs(tmp_path, monkeypatch):
    committed = models.PAGE.read_text()
    monkeypatch.setattr(models, "PAGE", tmp_path / "models.md")
    models.table()
    assert models.PAGE.read_text() == committed


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_those_of_the_json_files(name, tmp_path):
    def data(path):
        return re.search(r"<dc:description>(.*?)</dc:description>", path.read_text())[1]

    pictures.draw(name, tmp_path / "made.svg")
    assert data(tmp_path / "made.svg") == data(pictures.IMAGES / f"{name}.svg")


def test_figures_in_the_readme_are_in_the_results():
    section = (ROOT / "README.md").read_text().split("## Does it work?")[1].split("\n## ")[0]
    figures = re.findall(r"\d+\.\d+(?: ± \d+\.\d+)? %|\b0\.\d{3}\b", section)
    tables = "".join(path.read_text() for path in results.RESULTS.glob("*/index.md"))
    assert figures
    assert [figure for figure in figures if figure not in tables] == []
