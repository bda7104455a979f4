"""Is that right? Of what a solver has returned, and of an operator itself.

Solvers stop by estimates of their own, some in silence: cupyx's ``eigsh`` returns what it
has when its iterations are used up, and its tolerance is absolute. Here eigenpairs,
singular triplets and solutions are multiplied with the operator itself, what was missed is
looked for, and the properties of a matrix that solvers rely on are tested with random
vectors. Each result is true if all is well, prints as a report, and raises with
``raise_if_bad()``.
"""

from torchlinop.verify.completeness import complete
from torchlinop.verify.properties import (
    adjoint,
    deterministic,
    positive_semidefinite,
    symmetric,
)
from torchlinop.verify.residuals import eigenpairs, singular_triplets, solution
from torchlinop.verify.results import (
    Completeness,
    Semidefiniteness,
    Verification,
    VerificationError,
)

__all__ = [
    "Completeness",
    "Semidefiniteness",
    "Verification",
    "VerificationError",
    "adjoint",
    "complete",
    "deterministic",
    "eigenpairs",
    "positive_semidefinite",
    "singular_triplets",
    "solution",
    "symmetric",
]
