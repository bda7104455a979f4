"""Sphinx configuration. No network is needed: formulas, links and fonts are local."""

from __future__ import annotations

import sys
from pathlib import Path

import torchlinop

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "torchlinop"
author = "The torchlinop developers"
copyright = "2026, the torchlinop developers"  # noqa: A001
release = torchlinop.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "reference",
]
exclude_patterns = ["_build", "examples", "gallery"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

napoleon_use_ivar = True
autodoc_typehints = "none"
autodoc_inherit_docstrings = False
toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
nitpicky = True
# types in docstrings are prose; references to what is ours have to lead somewhere
nitpick_ignore_regex = [("py:(class|obj|exc)", r"(?!torchlinop\.).*")]

# the names that these pages refer to: lists in the repository, so that no build fetches any
intersphinx_mapping = {
    name: (address, f"inventories/{name}.txt")
    for name, address in {
        "cupy": "https://docs.cupy.dev/en/stable/",
        "numpy": "https://numpy.org/doc/stable/",
        "scipy": "https://docs.scipy.org/doc/scipy/",
        "torch": "https://docs.pytorch.org/docs/stable/",
    }.items()
}

sphinx_gallery_conf = {
    "examples_dirs": ["gallery"],
    "gallery_dirs": ["auto_gallery"],
    "filename_pattern": r"\.py$",  # every script is run
    "within_subsection_order": "gallery_order.GalleryOrder",
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "plot_gallery": True,
    "reference_url": {"torchlinop": None},
    "doc_module": ("torchlinop",),
    "backreferences_dir": None,
    "capture_repr": (),  # what is printed, and no name of a legend
}

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "pydata_sphinx_theme"
html_title = "torchlinop"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "show_nav_level": 1,
    "navigation_with_keys": False,
    "use_edit_page_button": False,
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_show_sourcelink = False
