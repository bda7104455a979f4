"""Inverses of operators, and preconditioners."""

from torchlinop.solve.cg import CGInverseLinearOperator
from torchlinop.solve.direct import (
    CholeskyInverseLinearOperator,
    EighInverseLinearOperator,
)
from torchlinop.solve.jacobi import JacobiPreconditioner
from torchlinop.solve.lsmr import LSMRInverseLinearOperator
from torchlinop.solve.minres import MINRESInverseLinearOperator
from torchlinop.solve.multishift import multishift_cg
from torchlinop.solve.neumann import NeumannInverseLinearOperator, neumann_scale
from torchlinop.solve.nystrom import NystromPreconditioner
from torchlinop.solve.preconditioner import Preconditioner
from torchlinop.solve.report import (
    ConvergenceError,
    NegativeCurvatureError,
    SolveReport,
)

__all__ = [
    "CGInverseLinearOperator",
    "CholeskyInverseLinearOperator",
    "ConvergenceError",
    "EighInverseLinearOperator",
    "JacobiPreconditioner",
    "LSMRInverseLinearOperator",
    "MINRESInverseLinearOperator",
    "NegativeCurvatureError",
    "NeumannInverseLinearOperator",
    "NystromPreconditioner",
    "Preconditioner",
    "SolveReport",
    "multishift_cg",
    "neumann_scale",
]
