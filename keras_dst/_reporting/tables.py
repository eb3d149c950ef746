"""Text tables and number formats of the reports."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Literal

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table


def as_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. A heading that ends in ``" >"`` aligns its column to the right.

    Args:
        headings: Names of the columns.
        rows: For each row, the texts of its cells.
    """
    table = Table(box=MARKDOWN)
    for heading in headings:
        name = heading.removesuffix(" >")
        justify: Literal["left", "right"] = "left" if name == heading else "right"
        table.add_column(name, justify=justify, overflow="fold", max_width=60)
    for row in rows:
        table.add_row(*row)
    return as_text(table, width=300).strip()


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
