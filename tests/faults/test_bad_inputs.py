"""A table of what may go wrong, with the error that says what to do.

Of operands, data, parameters and models there is more in ``tests/test_errors.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchlinop
from torchlinop import *  # noqa: F403 - the names are looked up in the table

from tests.problems import classification

x = np.ones(27)
M, RECTANGLE, D = (
    np.eye(3),
    np.ones((2, 3)),
    torchlinop.DiagonalLinearOperator(torch.ones(3)),
)


class Problem:
    """The operators in the table, made once."""

    def __init__(self) -> None:
        self.arguments = classification().arguments
        self.H = torchlinop.HessianLinearOperator(*self.arguments)


@pytest.fixture(scope="module")
def p():
    return Problem()


#: what is done | the error | what it says
TABLE = r"""
H @ np.full(27, np.datetime64("2020"))      | TypeError | dtype datetime64.*x.astype
H @ np.zeros(27, dtype=[("a", "f4")])       | TypeError | array of numbers, got dtype .*x.astype
H @ torch.ones(27, device="meta")           | ValueError | is on meta .* computes on cpu. Copy
H.matvec(np.float64(3))                     | ValueError | shape .N,. or .N, 1. with N = 27, got ..
H @ np.ones((1, 27, 2))                     | ValueError | got .1, 27, 2.
H @ iter(x)                                 | TypeError | type \w*iterator
H @ "abc"                                   | TypeError | type str
H @ len                                     | TypeError | type builtin_function
H ** 1j                                     | ValueError | integer >= 0, got 1j
H + 1                                       | TypeError | unsupported operand
H / x                                       | ValueError | by a scalar only, got ndarray
H @ D                                       | ValueError | 27 columns meet 3 rows
H - D                                       | ValueError | shapes have to agree
SubmatrixLinearOperator(H, [40], [0])       | IndexError | rows holds 40, .* 27 rows
SubmatrixLinearOperator(H, [0.5], [0])      | ValueError | list of integers, got .0.5.
SubmatrixLinearOperator(H, [True, False], [0]) | ValueError | mask.nonzero
SubmatrixLinearOperator(3, [0], [0])        | TypeError | a matrix .* or a linear operator, got int
KroneckerLinearOperator()                   | ValueError | at least one factor
KroneckerLinearOperator(np.ones((2, 2, 2))) | ValueError | a matrix, got shape .2, 2, 2.
KroneckerLinearOperator("a")                | TypeError | array of numbers
BlockDiagonalLinearOperator([])             | ValueError | at least one block
BlockDiagonalLinearOperator([3])            | TypeError | a linear operator, got int
EighLinearOperator(torch.ones(2), torch.eye(3)) | ValueError | got .2,. and .3, 3.
EighLinearOperator(1j * torch.ones(3), torch.eye(3)) | ValueError | have to be real.*real parts
LowRankPlusDiagonalLinearOperator(torch.ones(3), torch.ones(2, 1)) | ValueError | got .3,., .2, 1.
DiagonalLinearOperator(torch.tensor(1.0))   | ValueError | shape .n,., got ..
IdentityLinearOperator([(-1,)], "cpu", torch.float32) | ValueError | at least 0, got ..-1,..
IdentityLinearOperator([(1,)], "cpu", np.float32) | TypeError | torch.float32 or float64.*numpy
block(H, "nope")                            | KeyError | 'nope' is not a parameter; there are 0.weight
block(D, "w")                               | TypeError | not known. Pass space=
CGInverseLinearOperator(RECTANGLE)          | ValueError | got 2 x 3. .*LSMRInverse
CGInverseLinearOperator(M, damping=np.nan)  | ValueError | damping .* finite number, got nan
CGInverseLinearOperator(M, rtol=-1)         | ValueError | rtol has to be at least 0
CGInverseLinearOperator(M, on_failure="x")  | ValueError | 'warn', 'raise' or 'ignore', got 'x'
CGInverseLinearOperator(M, M=np.eye(2))     | ValueError | M is 2 x 2, but A is 3 x 3
CGInverseLinearOperator(M, x0=np.ones(2))   | ValueError | x0 .* N = 3, got .2,.
CGInverseLinearOperator(M) @ np.array([1, np.nan, 0]) | ValueError | NaN or infinite .* columns .0.
CGInverseLinearOperator(-M) @ np.ones(3)    | NegativeCurvatureError | more damping, or use MINRES
NeumannInverseLinearOperator(M, -1)         | ValueError | num_terms .* >= 0, got -1
NeumannInverseLinearOperator(M, 3, scale=-1.0) | ValueError | between 0 and 2 .*neumann_scale
NystromPreconditioner(M, 0.0)               | ValueError | positive damping, or a rank
NystromPreconditioner(M, 1.0, rank=0)       | ValueError | between 1 and N = 3, got 0
multishift_cg(M, np.ones(2), [1.0])         | ValueError | N = 3, got .2,.
multishift_cg(M, np.ones(3), [])            | ValueError | shifts is empty
LSMRInverseLinearOperator(M, damp=-1.0)     | ValueError | damp has to be at least 0
estimate.trace(H, method="x")               | ValueError | one of hutchinson, .* got 'x'
estimate.trace(RECTANGLE)                   | ValueError | got 2 x 3.*A.H @ A
estimate.trace(H, num_matvecs=0)            | ValueError | at least 1, got 0
estimate.trace(H, seed="a")                 | TypeError | seed has to be an integer, got 'a'
estimate.trace(3)                           | TypeError | got int
estimate.eigsh(H, k=0)                      | ValueError | at least 1, got 0
estimate.eigsh(H, k=100)                    | ValueError | at most N = 27, got 100
estimate.eigsh(H, k=1, which="XX")          | ValueError | one of LA, SA, LM, BE, got 'XX'
estimate.spectral_density(RECTANGLE)        | ValueError | square matrices, got 2 x 3
estimate.logdet(-M)                         | ValueError | not positive definite. Take damping >
summary(3)                                  | TypeError | got int
cost(3)                                     | TypeError | got int
monitor(3)                                  | TypeError | Write A = torchlinop.aslinearoperator
monitor(H, max_seconds=-1)                  | ValueError | max_seconds has to be positive, got -1
verify.symmetric("a")                       | TypeError | got str
verify.eigenpairs(H, np.ones(2), np.ones((27, 3))) | ValueError | each of 3 eigenvectors, got shape
HessianLinearOperator(*arguments, cach=True) | TypeError | 'cach'. The options are .* cache
HessianLinearOperator(*arguments, batch_size=3) | TypeError | function from X to the number .* got 3
HessianLinearOperator(EmpiricalRisk(*arguments), len) | TypeError | its own loss_function. Pass the risk
HessianLinearOperator(*arguments[:2])       | TypeError | Missing params, data
JacobianLinearOperator.from_function(lambda x: (x, x), torch.ones(2)) | TypeError | return a tensor, got
JacobianLinearOperator(arguments[0], arguments[2], 3) | TypeError | re-iterable of .X, y.*got int
KFACLinearOperator(*arguments, fisher_type="x") | ValueError | one of 'type-2', .* got 'x'
KFACLinearOperator(*arguments).inverse(damping=-1) | ValueError | number >= 0, got -1
H.space.to_vector([torch.ones(2)])          | ValueError | Expected tensors of shapes .*, got
H.space.to_named(torch.ones(3))             | ValueError | shape .27,., got .3,.
"""
ROWS = [[part.strip() for part in row.split(" | ")] for row in TABLE.strip().splitlines()]


@pytest.mark.parametrize(("call", "error", "message"), ROWS, ids=[r[0] for r in ROWS])
def test_bad_input(p, call, error, message):
    names = {**globals(), "H": p.H, "arguments": p.arguments}
    with pytest.raises(eval(error, names), match=message):
        eval(call, names)
