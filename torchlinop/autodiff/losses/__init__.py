r"""What a loss contributes to a curvature matrix: closed forms in the prediction.

A loss is treated as a sum over the data divided by a normaliser,
:math:`\frac1Z \sum_n \ell_n(f_n, y_n)`, where :math:`Z` is 1 for ``reduction="sum"``
and, for ``"mean"``, what PyTorch divides by: the number of elements, of samples, or the
total class weight of the targets that are not ignored. All derivatives here are those
of the *sum*, times a ``scale``: the caller's :math:`1/Z` for the whole data set.

Shapes: ``prediction`` is what the model returns, ``target`` what the data holds. A
direction ``u`` has the prediction's shape, optionally with one leading batch dimension.
"""

from torchlinop.autodiff.losses.cross_entropy import CrossEntropy
from torchlinop.autodiff.losses.linearity import is_piecewise_linear
from torchlinop.autodiff.losses.loss_function import (
    HessianProduct,
    LikelihoodLoss,
    LossFunction,
)
from torchlinop.autodiff.losses.recognition import as_loss

__all__ = [
    "CrossEntropy",
    "HessianProduct",
    "LikelihoodLoss",
    "LossFunction",
    "as_loss",
    "is_piecewise_linear",
]
