"""Tests that notebooks run without errors or warnings and print their stored values."""

import json
import math
import re

import nbformat
import pytest

from notebooks.execute import ALL, execute
from tests.backends import slow

each = pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
# `make test` runs only these notebooks, and `make test-all` runs all notebooks. Other tests train
# with the methods of the other notebooks, and run similar code on the pages.
SHORT = (1, 11, 15)

NUMBER = r"(\d[\d,]*(?:\.\d+)?(?:e-\d+)?)"
# VALUES maps the name of a printed value to its regular expression, and to the largest allowed
# absolute and relative difference. The trained weights differ between CPUs. If one of the 360 test
# images is classified differently, the accuracy changes by 0.3 percentage points.
VALUES = {
    "total sparsity": (rf"{NUMBER} ?% sparse", 0.1, 0),
    "accuracy": (rf"{NUMBER}% (?:correct|with gates|now)", 5, 0),
    "accuracy of a file": (rf"accuracy:? +{NUMBER}%", 5, 0),
    "accuracy of a path": (rf"path {NUMBER}%", 5, 0),
    "parameters before": (rf"parameters {NUMBER} ->", 0, 0),
    "parameters after": (rf"parameters [\d,]+ -> {NUMBER}", 0, 0.2),
    "weights": (rf"total of these[ |]+{NUMBER}", 0, 0),
    "nonzero weights": (rf"total of these[ |]+[\d,]+[ |]+{NUMBER}", 0, 0.002),
    "bytes of the dense file": (rf"dense float32 [ |]+{NUMBER}", 0, 0.01),
    "bytes of the dense int8 file": (rf"dense int8 [ |]+{NUMBER}", 0, 0.01),
    "zeros of a layer": (rf"zeros before: +{NUMBER}", 30, 0.01),
    "agreement of masks": (rf"device: {NUMBER}%", 1, 0),
    "copies of a mask": (rf"{NUMBER} copies", 0, 0),
    "difference of outputs": (rf"difference.*?: {NUMBER}", 1e-4, 0),
    "weights in all": (rf"in all, of {NUMBER}", 0, 0),
    "weights that return": (rf"{NUMBER} (?:returns|of [\d,]+ weights)", 0, 0.5),
    "weights kept by both criteria": (rf"(?:kept by both:|kept,) {NUMBER}%", 10, 0),
}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """Return the stream name or the MIME types of each output of a notebook cell."""
    return [sorted(out.data) if "data" in out else out.name for out in cell.outputs]


def printed(notebook):
    """Return the text that a notebook prints."""
    outputs = [out for cell in code_cells(notebook) for out in cell.outputs]
    return "".join(out.text for out in outputs if out.output_type == "stream")


def values(text):
    """Return a dict that maps each name in VALUES to the numbers that a text contains."""
    return {
        name: [float(number.replace(",", "")) for number in re.findall(pattern, text)]
        for name, (pattern, _, _) in VALUES.items()
    }


def differences(text, stored):
    """Return a tuple (name, new numbers, stored numbers) for each value outside its tolerance."""
    now, before = values(text), values(stored)
    return [
        (name, now[name], before[name])
        for name, (_, absolute, relative) in VALUES.items()
        if len(now[name]) != len(before[name])
        or not all(
            math.isclose(a, b, abs_tol=absolute, rel_tol=relative)
            for a, b in zip(now[name], before[name])
        )
    ]


def test_notebooks_are_numbered_without_gaps():
    assert [int(path.name[:2]) for path in ALL] == list(range(1, len(ALL) + 1))
    assert len(ALL) > 10


@each
def test_stored_notebook_is_complete(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# ")
    assert all(cell.source for cell in notebook.cells)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [kind for cell in cells for kind in kinds(cell)]
    assert "stdout" in shown
    assert any("image/png" in kind for kind in shown)
    assert not any(out.output_type == "error" for cell in cells for out in cell.outputs)
    assert path.stat().st_size < 300_000


@each
def test_stored_notebook_contains_no_path_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not any(cell.metadata for cell in notebook.cells)
    for cell in code_cells(notebook):
        for out in cell.outputs:
            out.get("data", {}).pop("image/png", None)
        assert not re.search(r"(?<![\w.])/\w+/\w+", json.dumps(cell.outputs))


@each
def test_links_in_a_notebook_have_targets(path):
    notebook = nbformat.read(path, as_version=4)
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        assert link.startswith("https://") or (path.parent / link.split("#")[0]).is_file(), link


@each
def test_changed_values_are_found(path):
    """Check that `differences` compares at least two printed values of each notebook, and finds
    every changed value."""
    stored = printed(nbformat.read(path, as_version=4))
    assert differences(stored, stored) == []
    found = {name: numbers for name, numbers in values(stored).items() if numbers}
    assert sum(map(len, found.values())) >= 2
    for name in found:
        pattern, absolute, relative = VALUES[name]
        first = re.search(pattern, stored)
        value = float(first[1].replace(",", ""))
        changed = value + 2 * absolute + 2 * relative * value + 1
        text = f"{stored[: first.start(1)]}{changed:.6f}{stored[first.end(1) :]}"
        assert name in [difference[0] for difference in differences(text, stored)]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if int(path.name[:2]) in SHORT else slow)
        for path in ALL
    ],
)
def test_notebook_runs_and_shows_the_stored_values(path):
    stored = nbformat.read(path, as_version=4)
    executed = execute(path)
    for cell, before in zip(code_cells(executed), code_cells(stored)):
        assert kinds(cell) == kinds(before), cell.source
    assert differences(printed(executed), printed(stored)) == []
