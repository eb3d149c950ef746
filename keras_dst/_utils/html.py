"""HTML tables that display reports in notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def html_table(headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """Return an HTML table. All cells are aligned to the left.

    Args:
        headings: Names of the columns.
        rows: Lists with the texts of the cells, one list per row.
        caption: Text above the table. Defaults to no caption.
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        opening = f'<{tag} style="text-align:left">'
        return f"<tr>{''.join(f'{opening}{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    lines = [line("th", headings), *(line("td", row) for row in rows)]
    return f"<table>{title}{''.join(lines)}</table>"
