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
]
myst_enable_extensions = ["dollarmath"]
exclude_patterns = ["_build", "examples"]
autodoc_typehints = "none"
autodoc_inherit_docstrings = False
html_theme = "alabaster"
