"""Execute notebooks and store their outputs: `python notebooks/execute.py [NAME.ipynb ...]`."""

import pathlib
import re
import sys

import nbformat
from nbclient import NotebookClient

HERE = pathlib.Path(__file__).parent
ALL = sorted(HERE.glob("*.ipynb"))


def execute(path: pathlib.Path) -> nbformat.NotebookNode:
    """Run a notebook, and return the notebook with the new outputs.

    Raises:
        RuntimeError: If the output contains a warning.
        nbclient.exceptions.CellExecutionError: If a cell raises an error.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(HERE)}},
        record_timing=False,
        coalesce_streams=True,
    ).execute()
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        errors = "".join(out.text for out in outputs if out.get("name") == "stderr")
        if re.search(r"\w+Warning: ", errors):
            raise RuntimeError(f"Expected no warning in {path.name}. Received:\n{errors}")
        # TensorFlow and LiteRT also write log messages of C++ code to stderr at the start.
        outputs[:] = [out for out in outputs if out.get("name") != "stderr"]
    return notebook


def store(notebook, path: pathlib.Path) -> None:
    """Remove metadata that depends on the machine, and write the notebook."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in [pathlib.Path(name) for name in sys.argv[1:]] or ALL:
        print(path.name, flush=True)
        store(execute(path), path)
