# The public names and where each is at home: read by type checkers, and by __init__.py.

from torchlinop import distributed, estimate, plot, verify
from torchlinop._blas import single_threaded_blas
from torchlinop._checkpoint import Checkpoint
from torchlinop._convergence import ConvergenceWarning
from torchlinop._cost import Cost, cost
from torchlinop._influence import influence, self_influence
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
    NTKLinearOperator,
)
from torchlinop.curvature.gradient import gradient_and_loss
from torchlinop.gradients import (
    GradientCovarianceLinearOperator,
    GradientSecondMomentLinearOperator,
    per_sample_gradients,
)
from torchlinop.kronecker import (
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    StoredFileError,
)
from torchlinop.posterior import LaplacePosterior, Predictive, laplace
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
    "Checkpoint",
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
    "GradientCovarianceLinearOperator",
    "GradientSecondMomentLinearOperator",
    "HessianLinearOperator",
    "IdentityLinearOperator",
    "JacobiPreconditioner",
    "JacobianLinearOperator",
    "KFACLinearOperator",
    "KFOCLinearOperator",
    "KroneckerLinearOperator",
    "LSMRInverseLinearOperator",
    "LaplacePosterior",
    "LowRankPlusDiagonalLinearOperator",
    "MINRESInverseLinearOperator",
    "NTKLinearOperator",
    "NegativeCurvatureError",
    "NeumannInverseLinearOperator",
    "NystromPreconditioner",
    "Options",
    "ParameterSpace",
    "Preconditioner",
    "Predictive",
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
    "influence",
    "laplace",
    "monitor",
    "multishift_cg",
    "neumann_scale",
    "per_sample_gradients",
    "plot",
    "self_influence",
    "single_threaded_blas",
    "summary",
    "verify",
]

__version__: str
