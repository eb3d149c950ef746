"""The code on the pages of docs/, and of README.md."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]


def fences(page):
    """`(language, info, code)` of every fenced block on a page, named from the root, in order."""
    text = (ROOT / page).read_text()
    found = re.findall(r"^```(\w*) ?(.*?)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert 2 * len(found) == text.count("```")
    return found


def blocks(page):
    """`(info, code)` of the Python on a page of docs/; no info where it is for all backends."""
    return [(info, code) for language, info, code in fences(f"docs/{page}") if language == "python"]
