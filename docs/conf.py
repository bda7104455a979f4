"""Sphinx configuration."""

from __future__ import annotations

import torchlinop

project = "torchlinop"
author = "The torchlinop developers"
copyright = "2026, the torchlinop developers"  # noqa: A001
release = torchlinop.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
sphinx_gallery_conf = {
    "examples_dirs": ["gallery"],
    "gallery_dirs": ["auto_gallery"],
    "filename_pattern": r"\.py$",  # every script is run
    "download_all_examples": False,
    "show_memory": False,
}
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2
exclude_patterns = ["_build", "examples", "gallery"]
autodoc_typehints = "none"
autodoc_inherit_docstrings = False
html_theme = "alabaster"
