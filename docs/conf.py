"""How Sphinx builds these pages: ``make docs``."""

import sys
from pathlib import Path

import wavprune

# Where figures.py is.
sys.path.insert(0, str(Path(__file__).parent))

project = "wavprune"
author = "The wavprune authors"
copyright = author  # Sphinx reads this name
release = version = wavprune.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "tutorials"]
# Options begin with two hyphens, which are no dash.
smartquotes = False

# Tutorials run while the pages are built, and an error in one of them ends the build.
sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "filename_pattern": "",
    "within_subsection_order": "ExampleTitleSortKey",
    "abort_on_example_error": True,
    "ignore_repr_types": "Figure",
    "image_scrapers": ("matplotlib", "figures.scrape"),
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "min_reported_time": 1e9,
    "remove_config_comments": True,
}
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# docs/findings.md links to the folder with its tables, which is no page.
suppress_warnings = ["myst.xref_missing"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = "wavprune"
html_static_path: list[str] = []
