"""Pictures of spectra, matrices and runs.

Each function draws into ``ax``, or into a new figure, and returns the Axes. Colours are
those of the current style, and nothing is told by colour alone, so the pictures are legible
on light and dark backgrounds and in print. Matplotlib is imported when something is drawn.
"""

from torchlinop.plot.matrices import matrix
from torchlinop.plot.overviews import overview
from torchlinop.plot.runs import convergence, sharpness
from torchlinop.plot.spectra import density, eigenvalues, layers, log_density

__all__ = [
    "convergence",
    "density",
    "eigenvalues",
    "layers",
    "log_density",
    "matrix",
    "overview",
    "sharpness",
]
