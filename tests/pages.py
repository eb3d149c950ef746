"""Functions that return the code blocks in README.md and in the pages of docs/."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]


def fences(page):
    """Return `(language, info, code)` for each fenced code block of a page, in order.

    `page` is a path relative to the root of the repository, such as `"docs/edge.md"`.
    """
    text = (ROOT / page).read_text()
    found = re.findall(r"^```(\w*) ?(.*?)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert 2 * len(found) == text.count("```")
    return found


def blocks(page):
    """Return `(info, code)` for each Python block of a page in docs/.

    `info` is the backend that runs the code block, or an empty string if every backend runs it.
    """
    return [(info, code) for language, info, code in fences(f"docs/{page}") if language == "python"]
