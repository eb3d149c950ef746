"""Hooks of MkDocs: formulas, tables from results/, notebooks, and pages outside docs/."""

import base64
import json
import pathlib
import posixpath
import re

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, InclusionLevel

ROOT = pathlib.Path(__file__).parent.parent


def on_files(files, config):
    """Add the pages outside docs/ to the site: results, notebooks, changelog, contributing."""
    for path in [*sorted(ROOT.glob("results/*/index.md")), *sorted(ROOT.glob("C*.md"))]:
        name = path.relative_to(ROOT).as_posix()
        kind = InclusionLevel.NOT_IN_NAV  # MkDocs does not warn that the menu lacks the page.
        files.append(File.generated(config, name, abs_src_path=str(path), inclusion=kind))
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        page, pictures = notebook(path)
        contents = {f"notebooks/{path.stem}.md": page, **pictures}
        for name, content in contents.items():
            files.append(File.generated(config, name, content=content, inclusion=kind))
    return files


def notebook(path: pathlib.Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as a Markdown page, and its pictures as a dict from path to content."""
    parts, pictures = [], {}
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in output["data"]:
                name = f"{path.stem}_{len(pictures)}.png"
                pictures[f"notebooks/{name}"] = base64.b64decode(output["data"]["image/png"])
                # Link each picture to its file, so that the user of a phone can open and zoom it.
                parts.append(f"[![Picture that the code above draws]({name})]({name})")
    return "\n\n".join(parts) + "\n", pictures


def on_page_markdown(markdown, page, config, files):
    """Render formulas as MathML, fill in tables, and adapt links to files outside docs/."""
    # The word after "python" is the backend of the code block.
    markdown = re.sub(r"^```python .+$", "```python", markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^```math\n(.*?)^```$", _display, markdown, flags=re.DOTALL | re.MULTILINE)
    markdown = _outside_code(markdown, _formulas)
    markdown = re.sub(r"^<!-- figures of (.+?) -->$", _figures, markdown, flags=re.MULTILINE)

    def adapt(text):
        return re.sub(r"\]\((?!\w+:)([^)#]+)", lambda link: _link(link[1], page.file), text)

    return _outside_code(markdown, adapt)


def on_page_content(html, page, config, files):
    """Allow line breaks after the dots of long names, and forbid line breaks within numbers."""
    name = r'(?<=<span class="doc doc-object-name )[^<]+'
    html = re.sub(name, lambda heading: heading[0].replace(".", ".<wbr>"), html)
    html = re.sub(r"<t[dh]\b.*?</t[dh]>", _breakable, html, flags=re.DOTALL)
    parts = re.split(r"(<pre.*?</pre>|<code.*?</code>)", html, flags=re.DOTALL)
    figure = r"(?<=\d) (?=%)|(?<=\d) (?=± \d)|(?<=±) (?=\d)"
    return "".join(
        part if i % 2 else re.sub(figure, "&nbsp;", part) for i, part in enumerate(parts)
    )


def _breakable(cell) -> str:
    """Allow line breaks within long names in the cell of a table."""
    place = r"(?<=\w[._(=])(?=[A-Za-z])"
    return re.sub("<code>[^<]+", lambda code: re.sub(place, "<wbr>", code[0]), cell[0])


def _link(target: str, file: File) -> str:
    """Convert a link of the repository into a link of the site.

    In the repository, CONTRIBUTING.md is in the parent folder of docs/. On the site,
    CONTRIBUTING.md and the pages of docs/ are in one folder, and notebooks are Markdown pages.
    """
    path = file.abs_src_path  # None for a notebook
    source = pathlib.Path(path).relative_to(ROOT).as_posix() if path else file.src_uri
    linked = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    in_site = linked.removeprefix("docs/").replace("README.md", "index.md")
    in_site = re.sub(r"\.ipynb$", ".md", in_site)
    return f"]({posixpath.relpath(in_site, posixpath.dirname(file.src_uri) or '.')}"


def _outside_code(markdown: str, change) -> str:
    """Apply a change to the text outside of fenced blocks and code spans."""
    parts = re.split(r"(^```.*?^```$|`[^`\n]+`)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def _formulas(text: str) -> str:
    text = re.sub(r"\$\$(.+?)\$\$", _display, text, flags=re.DOTALL)  # in notebooks
    return re.sub(r"\$([^$\n]+)\$", _inline, text)


def _display(block) -> str:
    """Render each formula of a line separately, so that a phone can show one formula per line."""
    parts = block[1].split(r"\qquad")
    formulas = [f"<span>{convert(part.strip(), display='block')}</span>" for part in parts]
    return f"<div>{' '.join(formulas)}</div>"


def _inline(formula) -> str:
    # Markdown would start a new paragraph at a line that begins with <math>.
    return f"<span>{convert(formula[1])}</span>"


def _figures(marker) -> str:
    return figures(marker[1], (ROOT / "results" / "methods" / "index.md").read_text())


def figures(method: str, page: str) -> str:
    """Return the rows of results/methods/index.md for a method, its variants and its baselines.

    Omit the columns in which only the dense network has a value.
    """
    wanted = ("method", "---", "dense", "random", "Magnitude", method)
    lines = [
        "Each cell shows the test accuracy in %, as mean ± standard deviation over the seeds. "
        "The number in brackets is the fraction of the weights that are zero or removed."
    ]
    for section in page.split("\n## ")[1:]:
        heading, *rest = section.splitlines()
        rows = [[cell.strip() for cell in line.split("|")] for line in rest if line[:1] == "|"]
        rows = [row for row in rows if row[1].split(",")[0] in wanted]
        if rows:
            pruned = [row for row in rows[2:] if row[1] != "dense"]
            shown = [i for i in range(1, len(rows[0]) - 1) if any(row[i] for row in pruned)]
            lines += ["", f"**{heading}**", ""]
            lines += [f"| {' | '.join(row[i] for i in shown)} |" for row in rows]
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Extension that lets the docstring parser griffe read docstrings in Keras style."""

    def on_object(self, *, obj, **kwargs):
        """Change the docstring of an object so that griffe can parse it.

        * Rename `Example:` to `Examples:`, the name that griffe supports.
        * Replace `Call arguments:`, which griffe does not support, by a list.
        """
        if obj.docstring:
            text = obj.docstring.value
            text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
            obj.docstring.value = re.sub(
                r"^Call arguments:\n( {4}.*\n)+", _list, text, flags=re.MULTILINE
            )


def _list(section) -> str:
    """Convert the arguments in a docstring section to a Markdown list."""
    return re.sub(r"^    (\w+):", r"    * `\1`:", section[0], flags=re.MULTILINE)
