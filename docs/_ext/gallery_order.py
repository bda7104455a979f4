"""The order of the gallery: from SciPy's solvers to what needs more words."""

from __future__ import annotations

from sphinx_gallery.sorting import FileNameSortKey

ORDER = [
    "eigenvalues",
    "eigenvalues_cupyx",
    "spectra",
    "edge_of_stability",
    "transformer",
    "natural_gradient",
    "fisher_monte_carlo",
    "kfac",
    "laplace",
    "influence",
    "least_squares",
    "trust_region",
    "vibrations",
    "pde",
]


class GalleryOrder(FileNameSortKey):
    """Position in ``ORDER``; what is not listed comes last, by name."""

    def __call__(self, filename: str) -> tuple[int, str]:
        """Key of one script."""
        stem = filename.removesuffix(".py")
        return ORDER.index(stem) if stem in ORDER else len(ORDER), stem
