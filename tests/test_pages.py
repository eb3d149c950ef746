"""Tests that run the unchanged code of every page. New pages are tested automatically."""

import pathlib
import re
import shlex
import tomllib

import keras
import numpy as np
import pytest

import keras_dst
import keras_dst_cli as cli
from tests.pages import PAGES, ROOT, fences
from tests.test_tfmot import file_of

BACKEND = keras.backend.backend()
NOT_RUN = ("diff", "math", "text")  # The tests do not run code blocks in these languages.
# The code of these pages needs several processes or other checks, so other test files run the code.
TESTED_ELSEWHERE = {
    "docs/keras_features.md": "tests/test_keras_features.py",
    "docs/many_devices.md": "tests/devices/test_pages.py",
    "docs/other_runtimes.md": "tests/export/test_runtimes.py",
    "docs/pictures.md": "tests/test_plots.py",
    "docs/sensitivity.md": "tests/test_tuner.py",
}


def backends(page):
    """Return the names of the backends on which the code blocks of a page run.

    A page that names no backend runs on PyTorch, because training steps on PyTorch need no
    compilation. If the code of the page exports .tflite files, the page runs on TensorFlow, because
    on PyTorch, every export starts a second Python process.
    """
    python = [(info, code) for language, info, code in fences(page) if language == "python"]
    exports = any("export_tflite" in code for _, code in python)
    named = {info for info, _ in python if info}
    return named or {"tensorflow" if exports else "torch"}


def pages_of_this_backend():
    return [page for page in PAGES if page not in TESTED_ELSEWHERE and BACKEND in backends(page)]


@pytest.fixture(autouse=True)
def registered_classes():
    """Restore registered classes after a page has registered other classes under the same names."""
    registered = keras.saving.get_custom_objects()
    before = dict(registered)
    yield
    registered.update(before)


@pytest.mark.parametrize("page", pages_of_this_backend())
def test_page(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    BEFORE.get(page, lambda: None)()
    names = {"__name__": "__main__"}
    for language, info, code in fences(page):
        if language == "python":
            assert info in ("", "tensorflow", "jax", "torch")
            if info in ("", BACKEND):
                exec(compile(code, page, "exec"), names)
        elif language == "bash":
            for line in code.splitlines():
                run_command(shlex.split(line, comments=True))
        else:
            assert language in NOT_RUN
    AFTER.get(page, lambda names, out: None)(names, capsys.readouterr().out)


def run_command(words):
    """Run a `keras-dst` command. For a `make` or `pip` command, only check that its target or extra
    exists."""
    match words:
        case []:
            pass
        case ["keras-dst", *arguments]:
            assert cli.main(arguments) == 0
        case ["make", *given]:
            targets = [word for word in given if "=" not in word]  # NAME=VALUE sets a variable.
            rules = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(targets) <= {target for rule in rules for target in rule.split()}
        case ["pip", "install", package]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            extra = re.fullmatch(r"keras_dst\[(\w+)\]", package)[1]
            assert extra in extras["optional-dependencies"]
        case _:
            pytest.fail(f"Expected a command that this test supports. Received: {words}")


def test_every_page_is_tested_on_a_backend():
    for page, test in TESTED_ELSEWHERE.items():
        assert f'blocks("{pathlib.Path(page).name}")' in (ROOT / test).read_text()
    for page in PAGES:
        assert backends(page) <= {"tensorflow", "jax", "torch"} or page in TESTED_ELSEWHERE


# -- checks of what the code of a page computes ------------------------------------------------


def readme(names, out):
    assert keras_dst.report(names["model"]).sparsity == pytest.approx(0.9, abs=0.01)
    size = pathlib.Path("model.tflite").stat().st_size
    assert size < 4 * names["model"].count_params() / 2


def custom_loops(names, out):
    assert keras_dst.report(names["pruned"]).sparsity == pytest.approx(0.9, abs=0.01)
    assert 0.1 < keras_dst.report(names["learned"]).sparsity < 1
    assert not any(hasattr(layer, "method") for layer in names["learned"].layers)


def edge(names, out):
    out = " ".join(out.split())  # Join wrapped lines.
    assert "this file" in out
    assert "sparse inference cannot begin at 3x3 CONV_2D" in out
    assert "padding 'same'" in out


def channels(names, out):
    assert 0.25 < float(re.search(r"([\d.]+) of the FLOPs", out)[1]) < 0.35
    kept = {
        name: keras.ops.convert_to_numpy(names["small"].get_layer(name).kernel).shape[-1]
        for name in ("stem", "project", "expand")
    }
    assert kept == {"stem": 16, "project": 16, "expand": 32}
    assert keras.ops.convert_to_numpy(names["model"].get_layer("stem").kernel).all()
    assert keras_dst.report(names["copy"]).sparsity > 0.4


def shrink(names, out):
    filters = [names["small"].get_layer(name).filters for name in ("stem", "inner", "outer")]
    assert filters == [8, 8, 8]
    report = keras_dst.shrink_report(names["model"])
    assert not any(row.reasons for row in report.layers)


def tfmot(names, out):
    layer = names["some"].layers[0]
    assert [row.name for row in keras_dst.report(names["some"]).layers if row.sparse]
    assert keras_dst.tfmot.is_pruned(layer)
    assert keras_dst.tfmot.is_pruned(names["mixer"])
    for name in ("looped", "model"):
        assert keras_dst.report(names[name]).sparsity == pytest.approx(0.8, abs=0.01)


def index(names, out):
    assert keras_dst.report(names["model"]).sparsity == pytest.approx(0.9, abs=0.001)
    assert "this file" in out


def guide(names, out):
    assert keras_dst.report(names["other"]).sparsity == pytest.approx(0.9, abs=0.01)
    assert names["report"].sparsity == pytest.approx(0.9, abs=0.001)
    assert type(names["model"].layers[0]) is keras.layers.Dense


def resuming(names, out):
    reached = [float(line) for line in out.splitlines() if re.fullmatch(r"0\.\d+", line)]
    np.testing.assert_allclose(reached, [0.9, 0.9], atol=0.001)


def why_not_smaller(names, out):
    sizes = {name: pathlib.Path(f"{name}.keras").stat().st_size for name in ("dense", "sparse")}
    assert sizes["dense"] == sizes["sparse"]
    assert names["zipped"][1] < names["zipped"][0] / 2
    assert pathlib.Path("model.sparse").stat().st_size < 0.2 * sizes["dense"]
    for weight, loaded in zip(names["model"].weights, names["loaded"].weights, strict=True):
        np.testing.assert_array_equal(loaded.numpy(), weight.numpy())
    assert names["report"].bytes < names["report"].dense_bytes / 2


def where_zeros_go(names, out):
    schedules = re.findall(r"^(\w+) \[.*?([\d.]+)\]$", out, re.M)
    assert schedules == [(name, "0.9") for name in ("Cubic", "Geometric", "Sigmoid", "Constant")]


BEFORE = {"docs/tfmot.md": lambda: file_of("pruned.h5")}
AFTER = {
    "README.md": readme,
    "docs/channels.md": channels,
    "docs/custom_loops.md": custom_loops,
    "docs/edge.md": edge,
    "docs/guide.md": guide,
    "docs/index.md": index,
    "docs/resuming.md": resuming,
    "docs/shrink.md": shrink,
    "docs/tfmot.md": tfmot,
    "docs/where_zeros_go.md": where_zeros_go,
    "docs/why_not_smaller.md": why_not_smaller,
}
