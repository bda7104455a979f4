"""curvlinops' names and constructors, on the operators of this package.

Programs written for curvlinops run with the import lines changed::

    from torchlinop.compat.curvlinops import GGNLinearOperator

The operators are this package's own (SciPy operators on any kind of array); only their
constructors take curvlinops' arguments, and they multiply lists of tensors, too. What is
different, and what is not there, is on the page ``docs/migration.md``.
"""

from torchlinop.compat.curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from torchlinop.compat.curvlinops.diag import DiagonalLinearOperator
from torchlinop.compat.curvlinops.eigh import EighDecomposedLinearOperator
from torchlinop.compat.curvlinops.estimators import (
    hutchinson_diag,
    hutchinson_squared_fro,
    hutchinson_trace,
    hutchpp_trace,
    xdiag,
    xtrace,
)
from torchlinop.compat.curvlinops.inverse import (
    CGInverseLinearOperator,
    LSMRInverseLinearOperator,
    NeumannInverseLinearOperator,
)
from torchlinop.compat.curvlinops.kfac import (
    EKFACLinearOperator,
    FisherType,
    GGNDiagonalLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    KFACType,
    KFOCLinearOperator,
)
from torchlinop.compat.curvlinops.kronecker import KroneckerProductLinearOperator
from torchlinop.compat.curvlinops.operators import (
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    TransposedJacobianLinearOperator,
)
from torchlinop.compat.curvlinops.papyan2020traces.spectrum import (
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
)
from torchlinop.compat.curvlinops.submatrix import SubmatrixLinearOperator

__all__ = [
    "BlockDiagonalLinearOperator",
    "CGInverseLinearOperator",
    "DiagonalLinearOperator",
    "EFLinearOperator",
    "EKFACLinearOperator",
    "EighDecomposedLinearOperator",
    "FisherMCLinearOperator",
    "FisherType",
    "GGNDiagonalLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "JacobianLinearOperator",
    "KFACInverseLinearOperator",
    "KFACLinearOperator",
    "KFACType",
    "KFOCLinearOperator",
    "KroneckerProductLinearOperator",
    "LSMRInverseLinearOperator",
    "LanczosApproximateLogSpectrumCached",
    "LanczosApproximateSpectrumCached",
    "NeumannInverseLinearOperator",
    "SubmatrixLinearOperator",
    "TransposedJacobianLinearOperator",
    "hutchinson_diag",
    "hutchinson_squared_fro",
    "hutchinson_trace",
    "hutchpp_trace",
    "lanczos_approximate_log_spectrum",
    "lanczos_approximate_spectrum",
    "xdiag",
    "xtrace",
]
