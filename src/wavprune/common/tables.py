"""Tables as text, for terminals, and as HTML, for notebooks."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

Row = TypeVar("Row")

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


def layers_table(
    title: str,
    columns: Sequence[str],
    layers: Sequence[Row],
    cells: Callable[[Row], Sequence[str]],
    totals: Sequence[str],
    *,
    caption: str,
    max_layers: int | None = None,
    has_note: bool = False,
) -> Table:
    """A table of layers and, last, their totals.

    Args:
        title: above it.
        columns: headings of what stands beside the names.
        layers: one a row.
        cells: a layer's name and what stands beside it.
        totals: likewise, without the name.
        caption: below it.
        max_layers: of more layers than that the first ones and a count of the others; None: all.
        has_note: True where the last column is text.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(title),
        caption=escape(caption),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("layer", overflow="fold")
    for i, column in enumerate(columns):
        is_note = has_note and i == len(columns) - 1
        table.add_column(column, justify="left" if is_note else "right", no_wrap=not is_note)
    shown = layers if max_layers is None else layers[:max_layers]
    for layer in shown:
        table.add_row(*map(escape, cells(layer)))
    if len(shown) < len(layers):
        left = f"{len(layers) - len(shown)} more"
        table.add_row(left, *[""] * (len(columns) - 1), "see to_table()" if has_note else "")
    table.add_section()
    table.add_row("total", *map(escape, totals))
    return table


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
