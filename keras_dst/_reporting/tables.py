"""Tables of text, as the reports print them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Literal

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table


def as_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, as wide on a terminal as in a file; ``>`` sets a column to the right."""
    table = Table(box=MARKDOWN)
    for heading in headings:
        name = heading.removesuffix(" >")
        justify: Literal["left", "right"] = "left" if name == heading else "right"
        table.add_column(name, justify=justify, overflow="fold", max_width=60)
    for row in rows:
        table.add_row(*row)
    return as_text(table, width=300).strip()


def as_text(table: Table, width: int) -> str:
    """A table, the same on a terminal, in a notebook and in a file, and names as they are."""
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


def count(number: int | None) -> str:
    """A number as text: 1234567 is ``1,234,567``, and one that is not known ``?``."""
    return "?" if number is None else f"{number:,}"


def percent(fraction: float) -> str:
    """A fraction as text: 0.125 is ``12.50 %``."""
    return f"{100 * fraction:.2f} %"
