"""Curvature matrices of PyTorch models as SciPy linear operators."""

from torchlinop import distributed, estimate, plot, verify
from torchlinop._blas import single_threaded_blas
from torchlinop._convergence import ConvergenceWarning
from torchlinop._cost import Cost, cost
from torchlinop._monitor import monitor
from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop._runlog import RunLog
from torchlinop._space import ParameterSpace
from torchlinop._summary import Summary, summary
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
    "Cost",
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
    "RunLog",
    "SolveReport",
    "StoredFileError",
    "StructuredLinearOperator",
    "SubmatrixLinearOperator",
    "Summary",
    "TorchLinearOperator",
    "UnsupportedDerivativeError",
    "WrongDerivativeError",
    "aslinearoperator",
    "block",
    "cost",
    "distributed",
    "estimate",
    "gradient_and_loss",
    "monitor",
    "multishift_cg",
    "neumann_scale",
    "plot",
    "single_threaded_blas",
    "summary",
    "verify",
]

__version__ = "0.1.0"
