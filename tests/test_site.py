"""Tests that the site builds without warnings and that its figures agree with results/."""

import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zlib
from html import unescape

import pytest

import keras_dst
from benchmarks import pictures, results
from benchmarks.accuracy import (
    authors,
    backend_agreement,
    channels,
    methods,
    mnist_runs,
    papers,
    patterns,
    recalibration,
)
from benchmarks.comparison import libraries
from benchmarks.coverage import models, smaller
from benchmarks.files import int8, micro, runtimes, tflite_cases, tflite_grid
from benchmarks.training_cost import mask_update, scaling, step_time, time_to_accuracy
from tests.backends import heavy, once, slow
from tests.browser import look_at
from tests.pages import PAGES, ROOT

pytestmark = once


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site with warnings as errors, and return its folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def html(site):
    return {path: path.read_text() for path in site.rglob("*.html")}


def test_every_page_is_built_and_every_marker_is_replaced(site):
    for page in PAGES[1:]:
        name = page.removeprefix("docs/").removesuffix(".md").removesuffix("index")
        text = (site / name / "index.html").read_text()
        assert "```" not in text
        assert not re.search("<!-- figures", text)
        assert ("<math" in text) == ("```math" in (ROOT / page).read_text())
    assert "$" not in (site / "architecture/index.html").read_text().split("<article")[1]
    assert "<td>RigL</td>" in (site / "methods/rigl/index.html").read_text()
    assert "<td>DCIL</td>" in (site / "results/step_time/index.html").read_text()


def test_every_page_begins_with_a_sentence(site):
    """Every page begins with a paragraph, before its first table, code block or heading."""
    for path, text in html(site).items():
        article = text.split("<article")[-1]
        if "<h1" in article and path.parent != site:  # index.html has other tests
            after = article.split("</h1>")[1]
            first = re.search(r"<(p|h2|table|pre|ul|ol|details)\b", after)[1]
            assert first == "p", path


def test_markdown_is_rendered_as_on_github(site):
    """Nested lists are rendered as nested lists, and no formula directly follows the end of a
    paragraph."""
    contributing = (site / "CONTRIBUTING/index.html").read_text()
    assert re.search(r"file with <code>every\(n\)</code>((?!</li>).)*<ul", contributing, re.DOTALL)
    for path, text in html(site).items():
        assert not re.search(r"</p>\s*<(span><)?math", text), path
    for page in [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md"]:
        text = re.sub(r"(?ms)^```.*?^```$", "", (ROOT / page).read_text())
        assert not re.search(r"(?m)^ {1,3}[*-] ", text), page


def test_formulas_and_figures_fit_a_phone(site):
    """Formulas that share a line in the source become separate blocks, and a number is never
    separated from its % sign."""
    text = (site / "methods/dst/index.html").read_text()
    source = (ROOT / "docs/methods/dst.md").read_text()
    assert text.count('display="block"') == source.count("```math") + source.count(r"\qquad")
    for path, text in html(site).items():
        prose = re.sub(r"<(pre|code)\b.*?</\1>|<[^>]+>", "", text.split("<article")[-1], flags=re.S)
        assert not re.search(r"\d (%|± \d)", prose), path


def test_links_are_named_after_their_page(site):
    """The text of a link must not be a file name or a URL."""
    for path, text in html(site).items():
        assert not re.search(r"<a [^>]*>(\d\d_\w+|https?://[^<]*)</a>", text), path


def test_every_column_has_a_heading(site):
    for path, text in html(site).items():
        assert not re.search(r"<th[^>]*>\s*</th>", text), path


def test_long_names_in_tables_can_break(site):
    text = (site / "moving_over/index.html").read_text()
    assert "<code>representative_<wbr>data_<wbr>gen</code>" in text
    assert "<code>Magnitude(0.7, " in text


def test_pages_of_methods_omit_empty_columns(site):
    """Tables have no column that would contain only the dense baseline."""
    consensus, rigl = (
        (site / f"methods/{name}/index.html").read_text() for name in ("consensus", "rigl")
    )
    assert "<th>50% sparse</th>" in consensus
    assert "<th>50% sparse</th>" not in rigl
    assert "<th>90% sparse</th>" in rigl
    assert "standard deviation" in rigl


def test_the_reference_shows_the_default_value_of_every_argument(site):
    """In the table of arguments, each argument has its own row. If two arguments shared a row, the
    table would show no default value for these arguments."""
    page = (site / "methods/rigl/index.html").read_text()
    rows = re.findall(r'<tr class="doc-section-item">(.*?)</tr>', page, re.DOTALL)
    rows = [re.sub(r"<[^>]+>|\s", "", row) for row in rows]
    assert any(re.fullmatch("drop_fractionfloatFraction.*0.3", row) for row in rows), rows
    for path, text in html(site).items():
        assert not re.search(r"<code>\w+, \w+</code>\s*</td>", text), path


def test_the_site_loads_no_external_files(site):
    for path, text in html(site).items():
        loaded = re.findall(
            r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"?(http[^\" >]+)", text
        )
        assert not loaded, path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?http|@import", path.read_text()), path


def test_every_notebook_is_a_page_with_its_outputs(site):
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        text = (site / "notebooks" / path.stem / "index.html").read_text()
        stored = path.read_text()
        assert "$$" not in text
        assert text.count("language-python") >= stored.count('"cell_type": "code"')
        assert text.count('src="../') + text.count("src=../") >= stored.count('"image/png"')
        assert len(list(site.glob(f"notebooks/{path.stem}_*.png"))) == stored.count('"image/png"')


# -- layout ----------------------------------------------------------------------------------------


def code_blocks(site):
    """Return the HTML of every code block on the site, without the outputs of notebooks."""
    texts = [text for path, text in html(site).items()]
    found = re.findall(r'<div class="?([^>]*?)highlight"?>(.*?</pre>)', "".join(texts), re.DOTALL)
    return [block for language, block in found if "language-text" not in language]


def test_code_lines_fit_their_column(site):
    """Lines of code have at most 100 characters, as in the package."""
    for block in code_blocks(site):
        lines = unescape(re.sub("<[^>]+>", "", block)).splitlines()
        assert max(map(len, lines)) <= 100, max(lines, key=len)


@heavy
@pytest.mark.parametrize("width", [pytest.param(1440, marks=slow), 390])
def test_the_layout_in_a_browser(site, width):
    """On a desktop, code needs no horizontal scrolling. On a phone, no page is wider than the
    screen."""
    page = (site / "guide" / "index.html").read_text()
    before, article, after = re.fullmatch(
        r"(.*<article.*?>)(.*)(</article>.*)", page, re.S
    ).groups()
    blocks = "".join(f"<div class=highlight>{block}</div>" for block in code_blocks(site))
    (site / "guide" / "code.html").write_text(f"{before}{article}{blocks}{after}")
    found = look_at(site / "guide" / "code.html", site / "guide", width)
    assert found.overflow <= 0
    assert width < 1000 or found.clipped == []


PUBLIC_MODULES = (
    "allocation",
    "callbacks",
    "layers",
    "masks",
    "methods",
    "plots",
    "regularizers",
    "schedules",
    "tfmot",
    "tuner",
)


def public_names():
    """Return the full names of all public classes and functions of the package."""
    values = {name: getattr(keras_dst, name) for name in keras_dst.__all__}
    names = {f"keras_dst.{name}" for name, value in values.items() if callable(value)}
    for name in PUBLIC_MODULES:
        listed = importlib.import_module(f"keras_dst.{name}").__all__
        names |= {f"keras_dst.{name}.{member}" for member in listed}
    return names


def test_every_public_name_is_in_the_reference(site):
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    documented = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    assert len(public_names()) > 50
    assert public_names() - documented == set()


def test_the_reference_documents_only_public_names_and_members(site):
    """Every name on the pages of the reference exists in the package."""
    pages = (ROOT / "docs" / "reference").glob("*.md")
    named = re.findall(r"^::: (\S+)", "".join(page.read_text() for page in pages), re.MULTILINE)
    for name in named:
        module, _, member = name.rpartition(".")
        assert hasattr(importlib.import_module(module), member), name


def test_a_returned_value_has_one_row(site):
    """In the reference, a returned value has one row, even if its description has several lines."""
    pages = "".join(html(site).values())
    tables = re.findall(r"Returns:</span></p>(.*?)</table>", pages, re.DOTALL)
    assert len(tables) > 20
    for table in tables:
        assert table.count("<tr") == 2, table
        # The column `Type` must not contain a part of the description.
        assert not re.search("<td[^>]*>\\s*`", table), table


# -- figures ---------------------------------------------------------------------------------------


TABLES = (
    authors,
    backend_agreement,
    channels,
    int8,
    libraries,
    mask_update,
    methods,
    micro,
    mnist_runs,
    papers,
    patterns,
    recalibration,
    runtimes,
    scaling,
    smaller,
    step_time,
    tflite_cases,
    tflite_grid,
    time_to_accuracy,
)


@pytest.mark.parametrize("benchmark", TABLES, ids=lambda module: module.BENCHMARK)
def test_benchmark_tables_are_up_to_date(benchmark, tmp_path, monkeypatch):
    page = pathlib.Path(benchmark.BENCHMARK) / "index.md"
    committed = (results.RESULTS / page).read_text()
    shutil.copytree(results.RESULTS, tmp_path / "results")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    benchmark.table()
    assert (tmp_path / "results" / page).read_text() == committed


def test_the_page_on_models_is_up_to_date(tmp_path, monkeypatch):
    committed = models.PAGE.read_text()
    monkeypatch.setattr(models, "PAGE", tmp_path / "models.md")
    models.table()
    assert models.PAGE.read_text() == committed


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_up_to_date(name, tmp_path):
    def data(path):
        return re.search(r"<dc:description>(.*?)</dc:description>", path.read_text())[1]

    pictures.draw(name, tmp_path / "made.svg")
    assert data(tmp_path / "made.svg") == data(pictures.IMAGES / f"{name}.svg")


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_front_pages_show_the_table_of_100_epochs(page):
    sections = (results.RESULTS / "papers" / "index.md").read_text().split("\n## ")
    (table,) = (s for s in sections if s.startswith("ResNet-32 (16-32-64), CIFAR-10, 100 epochs\n"))
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert "\n".join(rows) in (ROOT / page).read_text()


def test_the_page_of_runtimes_shows_the_tables_of_its_runs():
    table = (results.RESULTS / "runtimes" / "index.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    page = (ROOT / "docs" / "other_runtimes.md").read_text()
    assert [row for row in rows if row not in page] == []


@pytest.mark.parametrize(
    ("page", "heading"), [("README.md", "Measured results"), ("docs/index.md", "Results")]
)
def test_figures_on_front_pages_agree_with_results(page, heading):
    section = (ROOT / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    figures = re.findall(r"\d+\.\d+(?: ± \d+\.\d+)? %|\b0\.\d{3}\b", section)
    tables = "".join(path.read_text() for path in results.RESULTS.rglob("*.md"))
    assert len(figures) >= 6
    assert [figure for figure in figures if figure not in tables] == []
