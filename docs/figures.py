"""The pictures of ``wavprune.plots`` in the tutorials: pyplot does not know of them."""

from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst

_last: list[Figure] = []


def scrape(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save the figure that a block ends with; see Sphinx-Gallery's image scrapers."""
    # Sphinx-Gallery keeps the value of a block's last expression under this name.
    figure = block_vars["example_globals"].get("___")
    if not isinstance(figure, Figure) or figure in _last:
        return ""
    _last[:] = [figure]
    path = next(block_vars["image_path_iterator"])
    figure.savefig(path, dpi=110)
    return str(figure_rst([path], gallery_conf["src_dir"]))
