"""curvlinops' names and constructors, on the operators of this package.

Programs written for curvlinops run with the import lines changed::

    from torchlinop.compat.curvlinops import GGNLinearOperator

The operators are this package's own (SciPy operators on any kind of array); only their
constructors take curvlinops' arguments. ``to_scipy()`` returns the operator itself.
"""

from torchlinop.compat.curvlinops.inverses import (
    CGInverseLinearOperator,
    LSMRInverseLinearOperator,
    NeumannInverseLinearOperator,
)
from torchlinop.compat.curvlinops.operators import (
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    TransposedJacobianLinearOperator,
)

__all__ = [
    "CGInverseLinearOperator",
    "EFLinearOperator",
    "FisherMCLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "JacobianLinearOperator",
    "LSMRInverseLinearOperator",
    "NeumannInverseLinearOperator",
    "TransposedJacobianLinearOperator",
]
