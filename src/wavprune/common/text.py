"""Text that other programs read."""

from __future__ import annotations

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def csv_cell(cell: object) -> object:
    """A cell of a CSV file that no spreadsheet takes for a formula.

    Excel, LibreOffice and Google Sheets evaluate texts that begin like one; all three know the
    apostrophe in front.

    Args:
        cell: text gets an apostrophe where it needs one; everything else stays as it is.

    Example:
        >>> csv_cell("=1+1"), csv_cell("conv1"), csv_cell(-1.5)
        ("'=1+1", 'conv1', -1.5)
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
