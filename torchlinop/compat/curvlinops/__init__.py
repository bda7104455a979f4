"""curvlinops' names and constructors, on the operators of this package.

Programs written for curvlinops run with the import lines changed::

    from torchlinop.compat.curvlinops import GGNLinearOperator

The operators are this package's own (SciPy operators on any kind of array); only their
constructors take curvlinops' arguments. ``to_scipy()`` returns the operator itself. There
is no ``state_dict``: operators of the KFAC family are written by ``save(path)`` and read by
``load(path)``.
"""

from torchlinop.compat.curvlinops.estimators import (
    hutchinson_diag,
    hutchinson_squared_fro,
    hutchinson_trace,
    hutchpp_trace,
    xdiag,
    xtrace,
)
from torchlinop.compat.curvlinops.inverses import (
    CGInverseLinearOperator,
    LSMRInverseLinearOperator,
    NeumannInverseLinearOperator,
)
from torchlinop.compat.curvlinops.kronecker import (
    EKFACLinearOperator,
    FisherType,
    GGNDiagonalLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    KFACType,
    KFOCLinearOperator,
)
from torchlinop.compat.curvlinops.operators import (
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    TransposedJacobianLinearOperator,
)
from torchlinop.compat.curvlinops.spectra import (
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
)
from torchlinop.compat.curvlinops.structured import (
    BlockDiagonalLinearOperator,
    EighDecomposedLinearOperator,
    KroneckerProductLinearOperator,
)

__all__ = [
    "BlockDiagonalLinearOperator",
    "CGInverseLinearOperator",
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
