"""A real browser, headless, as a reader of a page has it."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")

#: Written into the page by the page itself, once its pictures are there.
_PROBE = """<script>addEventListener("load", () => {
  const size = x => [x.naturalWidth, x.naturalHeight, x.getBoundingClientRect().width, x.alt];
  const found = {
    pictures: [...document.images].map(size),
    overflow: document.documentElement.scrollWidth - innerWidth,
    background: getComputedStyle(document.body).backgroundColor,
    text: document.body.innerText,
    requests: performance.getEntriesByType("resource").map(entry => entry.name),
  };
  const node = document.createElement("script");
  node.type = "application/json"; node.id = "probe";
  node.textContent = JSON.stringify(found).replaceAll("<", "\\\\u003c");
  document.body.append(node);
})</script>"""


@dataclasses.dataclass
class Page:
    """What a browser made of a page."""

    dom: str
    pictures: list  # natural width and height, width on the page, alt text
    overflow: int  # pixels by which the page is wider than the window
    background: str
    text: str  # as it is shown
    console: list[str]
    requests: list[str]  # for anything that is not in the page itself
    screenshot: pathlib.Path


def look_at(page: pathlib.Path, folder: pathlib.Path, width=1200, dark=False) -> Page:
    """Open a page; skips the test where there is no browser.

    The page's own policy allows no script: its copy that is opened has one, the probe's.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"No browser to look at the page with: none of {', '.join(NAMES)} is installed")
    text = page.read_text("utf-8")
    assert "default-src 'none'" in text
    probed = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    copy = folder / "probed.html"
    copy.write_text(probed.replace("</body>", f"{_PROBE}</body>"), "utf-8")
    screenshot = folder / "screenshot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += ["--disable-dev-shm-usage", "--hide-scrollbars", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    flags += [f"--window-size={width},2400", f"--screenshot={screenshot}", "--dump-dom"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run(
        [browser, *flags, copy.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    dom = done.stdout
    probe = json.loads(re.search(r'id="probe">(.*?)</script>', dom, re.DOTALL)[1])
    return Page(
        dom=dom,
        **probe,
        console=re.findall(r"CONSOLE.*", done.stderr),
        screenshot=screenshot,
    )
