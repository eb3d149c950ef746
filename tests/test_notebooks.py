"""Every notebook runs without an error or a warning, and is stored with what it shows."""

import json
import re

import nbformat
import pytest

from notebooks.execute import ALL, execute

each = pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows: text that it prints, pictures, values."""
    return [sorted(out.data) if "data" in out else out.name for out in cell.outputs]


def test_notebooks_are_numbered_without_a_gap():
    assert [int(path.name[:2]) for path in ALL] == list(range(1, len(ALL) + 1))
    assert len(ALL) > 10


@each
def test_stored_notebook_is_whole(path):
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
def test_stored_notebook_names_nothing_of_the_machine_it_ran_on(path):
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not any(cell.metadata for cell in notebook.cells)
    for cell in code_cells(notebook):
        for out in cell.outputs:
            out.get("data", {}).pop("image/png", None)
        assert not re.search(r"(?<![\w.])/\w+/\w+", json.dumps(cell.outputs))


@each
def test_links_of_a_notebook_lead_somewhere(path):
    notebook = nbformat.read(path, as_version=4)
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        assert link.startswith("https://") or (path.parent / link.split("#")[0]).is_file(), link


@each
def test_notebook_runs_and_shows_what_is_stored(path):
    stored = nbformat.read(path, as_version=4)
    executed = execute(path)
    for cell, before in zip(code_cells(executed), code_cells(stored)):
        assert kinds(cell) == kinds(before), cell.source
