"""The code on the pages of docs/, and of README.md."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def blocks(page):
    """`(info, code)` of the Python on a page; the info is empty where it is for all backends."""
    text = (ROOT / "docs" / page).read_text()
    found = re.findall(r"^```python ?(.*?)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(found) == text.count("```python")
    return found
