"""Tests of the HTML report, opened in a browser."""

import base64
import html
import io
import re
import sys

import keras
import numpy as np
import pytest
from keras import layers

import keras_dst_cli as cli
from keras_dst import report
from tests import models
from tests.backends import once
from tests.browser import look_at

pytestmark = once

EVIL = "<script>alert(1)</script>&\"'"


def pruned(seed=0):
    """Return a dense model with mostly zero weights, and with a name that must be escaped."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(8, 3, name="conv"),
            layers.Flatten(),
            layers.Dense(100, name="body"),
            layers.Dense(4, name="head"),
        ],
        name="lenet",
    )
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        if len(variable.shape) > 1:
            variable.assign((rng.random(variable.shape) < 0.1).astype("float32"))
    model.layers[2].kernel._path = f"lenet/{EVIL}/kernel"
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a report as an HTML page; return the report and the path."""
    found = report(pruned())
    path = tmp_path_factory.mktemp("page") / "report.html"
    found.save_html(path)
    return found, path


def formatted(number):
    return f"{number:,}"


def test_the_page_shows_the_report(saved, tmp_path):
    found, path = saved
    assert "default-src 'none'" in path.read_text("utf-8")
    page = look_at(path, tmp_path)
    assert page.console == []
    assert page.requests == []
    assert page.overflow <= 0
    for row in found.layers:
        line = next(x for x in page.text.splitlines() if x.startswith(f"{row.name}\t"))
        cells = [text.strip() for text in line.split("\t")]
        assert cells[1:4] == [row.layer, " × ".join(map(str, row.shape)), formatted(row.parameters)]
        assert cells[4:6] == [formatted(row.nonzeros), f"{100 * row.sparsity:.2f} %"]
        assert cells[6:8] == [formatted(row.flops), formatted(row.dense_flops)]
    assert f"{100 * found.sparsity:.2f} %" in page.text
    assert EVIL in page.text
    assert len(page.pictures) == len(found.layers) == 3
    for row, (width, height, width_on_page, alt) in zip(found.layers, page.pictures):
        assert (height, width) == row.density_map.shape
        assert width_on_page > 100
        assert row.name in alt
    assert "<title>lenet: " in page.dom
    assert page.screenshot.stat().st_size > 10_000


def test_the_page_fits_a_narrow_window_with_a_dark_theme(saved, tmp_path):
    # The window is 500 pixels wide, because Chromium allows no narrower windows.
    page = look_at(saved[1], tmp_path, width=500, dark=True)
    assert page.overflow <= 0
    assert page.console == []
    red, *_ = map(int, re.findall(r"\d+", page.background))
    assert red < 64
    assert min(width for *_, width, _ in page.pictures) > 100


def test_the_browser_probe_reports_requests_and_broken_images(saved, tmp_path):
    page = tmp_path / "page.html"
    text = saved[1].read_text("utf-8").replace("img-src data:", "img-src http: data:")
    missing = '<img src="http://example.invalid/x.png" alt="x"><img src="data:image/png;base64,AA">'
    page.write_text(text.replace("</main>", f"{missing}<link rel=stylesheet href=x.css></main>"))
    found = look_at(page, tmp_path)
    assert len(found.requests) == 2
    assert "http://example.invalid/x.png" in found.requests
    # The security policy of the page blocks the external style sheet.
    assert "Security Policy" in found.console[0]
    assert [width for width, *_ in found.pictures][-2:] == [0, 0]


def test_the_page_is_self_contained(saved):
    text = saved[1].read_text("utf-8")
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]*)""", text)
    assert len(links) == 3
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "<script" not in text
    assert html.escape(EVIL, quote=False).split("&amp;")[0] in text


def test_images_show_the_density_maps(saved):
    from matplotlib.image import imread

    found, path = saved
    images = re.findall(r"base64,([^\"]*)", path.read_text("utf-8"))
    for row, image in zip(found.layers, images):
        pixels = imread(io.BytesIO(base64.b64decode(image)))
        # The opacity of a pixel is the square root of the density of several weights, rounded to 8
        # bits.
        np.testing.assert_allclose(pixels[..., 3] ** 2, row.density_map, atol=0.01)


def test_pages_of_models_without_prunable_weights_or_flops():
    nothing = report(keras.Sequential([keras.Input((4,)), layers.BatchNormalization()], name="no"))
    assert "no prunable weight" in nothing.to_html()

    class Odd(layers.Layer):
        def build(self, shape):
            self.mix = self.add_weight(name="mix", shape=(3, 5))

        def call(self, x):
            return x + keras.ops.sum(self.mix)

    unknown = report(keras.Sequential([keras.Input((4,)), Odd()]))
    assert "The FLOPs are unknown: keras_dst does not know how often " in unknown.to_html()
    assert ">?</td>" in unknown.to_html()


def test_the_report_command_writes_a_page(tmp_path, capsys):
    models.sequential().save(tmp_path / "model.keras")
    files = [str(tmp_path / "model.keras"), "--html", str(tmp_path / "page.html")]
    assert cli.main(["report", *files]) == 0
    assert "all prunable" in capsys.readouterr().out
    assert "<h2>Masks</h2>" in (tmp_path / "page.html").read_text("utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.keras", "page.html"]
    nowhere = str(tmp_path / "nowhere" / "page.html")
    assert cli.main(["report", files[0], "--html", nowhere]) == 1
    assert f"Expected a path in an existing folder. Received: {nowhere}" in capsys.readouterr().err


class TestErrors:
    def test_saving_is_atomic(self, monkeypatch, tmp_path):
        found = report(models.sequential())
        (tmp_path / "page.html").write_text("old")
        # A lone surrogate cannot be encoded in UTF-8, so writing the page fails.
        invalid = "\udc80"
        monkeypatch.setattr(type(found), "to_html", lambda self: invalid)
        with pytest.raises(UnicodeEncodeError):
            found.save_html(tmp_path / "page.html")
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
            ("page.html", "old")
        ]

    @pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
    def test_a_missing_library_raises(self, library, monkeypatch):
        found = report(models.sequential())
        for name in [name for name in sys.modules if name.split(".")[0] == library]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ImportError, match=r"pip install keras_dst\[plot\]"):
            found.to_html()
