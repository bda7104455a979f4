"""Curvature matrices of PyTorch models as SciPy linear operators."""

from torchlinop import verify
from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop._space import ParameterSpace
from torchlinop.autodiff import UnsupportedDerivativeError, WrongDerivativeError
from torchlinop.curvature import (
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from torchlinop.curvature.gradient import gradient_and_loss
from torchlinop.kronecker import (
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    StoredFileError,
)
from torchlinop.solve import (
    CGInverseLinearOperator,
    CholeskyInverseLinearOperator,
    ConvergenceError,
    ConvergenceWarning,
    EighInverseLinearOperator,
    JacobiPreconditioner,
    LSMRInverseLinearOperator,
    MINRESInverseLinearOperator,
    NegativeCurvatureError,
    NeumannInverseLinearOperator,
    NystromPreconditioner,
    Preconditioner,
    SolveReport,
    multishift_cg,
    neumann_scale,
)
from torchlinop.sources import EmpiricalRisk, Options
from torchlinop.structured import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    EighLinearOperator,
    IdentityLinearOperator,
    KroneckerLinearOperator,
    LowRankPlusDiagonalLinearOperator,
    StructuredLinearOperator,
    SubmatrixLinearOperator,
    block,
)

__all__ = [
    "BlockDiagonalLinearOperator",
    "CGInverseLinearOperator",
    "CholeskyInverseLinearOperator",
    "ConvergenceError",
    "ConvergenceWarning",
    "DiagonalLinearOperator",
    "EFLinearOperator",
    "EKFACLinearOperator",
    "EighInverseLinearOperator",
    "EighLinearOperator",
    "EmpiricalRisk",
    "FisherMCLinearOperator",
    "GGNDiagonalLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "IdentityLinearOperator",
    "JacobiPreconditioner",
    "JacobianLinearOperator",
    "KFACLinearOperator",
    "KFOCLinearOperator",
    "KroneckerLinearOperator",
    "LSMRInverseLinearOperator",
    "LowRankPlusDiagonalLinearOperator",
    "MINRESInverseLinearOperator",
    "NegativeCurvatureError",
    "NeumannInverseLinearOperator",
    "NystromPreconditioner",
    "Options",
    "ParameterSpace",
    "Preconditioner",
    "SolveReport",
    "StoredFileError",
    "StructuredLinearOperator",
    "SubmatrixLinearOperator",
    "TorchLinearOperator",
    "UnsupportedDerivativeError",
    "WrongDerivativeError",
    "aslinearoperator",
    "block",
    "gradient_and_loss",
    "multishift_cg",
    "neumann_scale",
    "verify",
]

__version__ = "0.1.0"
