"""Text tables and number formats of the reports."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from typing import Literal

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

# Width of printed tables and lines. The pages of the documentation show 96 characters per line.
WIDTH = 96
# Minimum width of a column of text, in characters.
_SHORTEST = 16


def as_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. A heading that ends in ``" >"`` aligns its column to the right.

    If the table is wider than `WIDTH`, headings and long texts are split into several lines. Cells
    in right-aligned columns are not split.

    Args:
        headings: Names of the columns.
        rows: Rows of the table. Each row is a list with the text of every cell.
    """
    rows = list(rows)
    names = [heading.removesuffix(" >") for heading in headings]
    right = [name != heading for name, heading in zip(names, headings)]
    table = Table(box=MARKDOWN)
    for name, width, is_right in zip(names, _widths(names, rows, right), right):
        justify: Literal["left", "right"] = "right" if is_right else "left"
        table.add_column(name, justify=justify, overflow="fold", width=width)
    for row in rows:
        table.add_row(*row)
    return as_text(table, width=10_000).strip()


def _widths(names: Sequence[str], rows: list[Sequence[str]], right: list[bool]) -> list[int]:
    """Return the widths of the columns, so that the table has at most `WIDTH` characters per line
    if possible."""
    cells = [max((len(row[i]) for row in rows), default=0) for i in range(len(names))]
    available = WIDTH - 3 * len(names) - 1  # Borders and spaces take three characters per column.
    widths = [max(len(name), width) for name, width in zip(names, cells)]
    left = [i for i, is_right in enumerate(right) if not is_right]
    if sum(widths) > available:
        words = [max(map(len, name.split()), default=0) for name in names]
        widths = [max(word, width) for word, width in zip(words, cells)]
    while sum(widths) > available and max((widths[i] for i in left), default=0) > _SHORTEST:
        widths[max(left, key=widths.__getitem__)] -= 1
    return widths


def as_paragraph(text: str, indent: int = 0) -> str:
    """Split a text into lines of at most `WIDTH` characters, and indent all lines but the first."""
    return textwrap.fill(
        text,
        WIDTH,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def as_text(table: Table, width: int) -> str:
    """Render a table as plain text that is the same in every terminal and notebook."""
    text = io.StringIO()
    console = Console(
        file=text,
        width=width,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        markup=False,
        emoji=False,
        highlight=False,
    )
    console.print(table)
    return text.getvalue()


def format_count(number: int | None) -> str:
    """Format a whole number, for example 1234567 as ``1,234,567``. Format None as ``?``."""
    return "?" if number is None else f"{number:,}"


def format_percent(fraction: float) -> str:
    """Format a fraction as a percentage, for example 0.125 as ``12.50 %``."""
    return f"{100 * fraction:.2f} %"
