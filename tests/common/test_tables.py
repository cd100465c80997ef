from __future__ import annotations

from html.parser import HTMLParser

from rich.table import Table

from wavprune.common.tables import as_html, as_text, pairs


class Cells(HTMLParser):
    """The rows of the tables in a page, and every tag in it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def cells_of(page: str) -> Cells:
    cells = Cells()
    cells.feed(page)
    return cells


def test_html_has_the_cells_and_escapes_what_is_in_them() -> None:
    table = Table(title="a & b", caption="<script>")
    table.add_column("layer")
    table.add_column("kept", justify="right")
    table.add_row("<img src=x>", "1")
    table.add_section()
    table.add_row("[bold]total[/bold]", "2")
    page = as_html(table)
    cells = cells_of(page.split("<p>")[0])
    assert cells.rows == [["layer", "kept"], ["<img src=x>", "1"], ["total", "2"]]
    assert cells.tags == {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert page.count("<tbody>") == 2
    assert "a &amp; b" in page
    assert "<script>" not in page
    assert page.count("text-align:right") == 3


def test_pairs_stand_in_two_columns() -> None:
    assert as_text(pairs("net", [("layers", "3"), ("weights", "1,000")]), 40).split() == [
        *("net", "layers", "3", "weights", "1,000")
    ]
