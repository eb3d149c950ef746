"""Add the URL of the repository to README.md and pyproject.toml before a release.

    python .github/project_urls.py https://HOST/OWNER/NAME TAG

The URL is known only when the release is built. The README of the repository has relative links,
which do not work on the package index.
"""

import pathlib
import re
import sys
from urllib.parse import urljoin

ROOT = pathlib.Path(__file__).resolve().parent.parent
RELATIVE = r"(?<=\]\()(?!\w+:|#)[^)]+"


def absolute(text: str, url: str, tag: str) -> str:
    """Return Markdown in which relative links are replaced by links to files of a tag."""

    def link(found):
        kind = "raw" if found[0].endswith(".svg") else "blob"
        return urljoin(f"{url}/{kind}/{tag}/", found[0])

    return re.sub(RELATIVE, link, text)


def main(url: str, tag: str, root: pathlib.Path = ROOT) -> None:
    """Change README.md and pyproject.toml of a checkout."""
    readme, project = root / "README.md", root / "pyproject.toml"
    readme.write_text(absolute(readme.read_text("utf-8"), url, tag), "utf-8")
    urls = {
        "Source": url,
        "Issues": f"{url}/issues",
        "Changelog": f"{url}/blob/{tag}/CHANGELOG.md",
    }
    lines = [f'{name} = "{address}"' for name, address in urls.items()]
    text = project.read_text("utf-8")
    project.write_text("\n".join([text, "[project.urls]", *lines, ""]), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
