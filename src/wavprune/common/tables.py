"""Tables as text, for terminals, and as HTML, for notebooks."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

# Above this a table names the first layers and counts the others.
SHORT_ROWS = 20


def as_text(table: Table, width: int) -> str:
    """A table as lines of text, without colors.

    Args:
        table: a table of rich.
        width: the most characters of a line.
    """
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def as_html(table: Table) -> str:
    """A table as the HTML that a notebook shows, with nothing that would run in a page."""
    columns = list(table.columns)
    parts = ["<table>", f'<caption style="text-align:left">{_escaped(table.title)}</caption>']
    if table.show_header:
        heads = (_cell("th", str(column.header), column.justify) for column in columns)
        parts.append(f"<thead><tr>{''.join(heads)}</tr></thead>")
    parts.append("<tbody>")
    cells = [list(column.cells) for column in columns]
    for i, row in enumerate(table.rows):
        parts.append(
            "<tr>"
            + "".join(
                _cell("td", str(values[i]), column.justify)
                for values, column in zip(cells, columns, strict=True)
            )
            + "</tr>"
        )
        if row.end_section and i + 1 < len(table.rows):
            parts.append("</tbody><tbody>")
    parts.append("</tbody></table>")
    if table.caption:
        parts.append(f"<p><small>{_escaped(table.caption)}</small></p>")
    return "".join(parts)


def pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """A table of names and values.

    Example:
        >>> print(as_text(pairs("net", [("layers", "3")]), 40))
        net
        layers  3
    """
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, show_header=False)
    table.padding = (0, 2, 0, 0)
    table.pad_edge = False
    table.add_column("name")
    table.add_column("value", justify="right")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _cell(tag: str, markup: str, justify: str) -> str:
    align = "right" if justify == "right" else "left"
    return f'<{tag} style="text-align:{align}">{_escaped(markup)}</{tag}>'


def _escaped(markup: object) -> str:
    """What rich would show, safe in HTML."""
    from rich.text import Text

    plain = markup.plain if isinstance(markup, Text) else Text.from_markup(str(markup or "")).plain
    return html.escape(plain).replace("\n", "<br>")
