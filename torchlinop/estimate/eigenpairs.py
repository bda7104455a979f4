"""Eigenpairs at the ends of a spectrum, by Lanczos on the operator's device."""

from __future__ import annotations

import os
import warnings
from typing import Any, Literal, TypeAlias

import torch

from torchlinop._checkpoint import Checkpoint, begun, placed
from torchlinop._convergence import ConvergenceWarning, users_frame
from torchlinop._memory import free_memory
from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Array
from torchlinop.estimate.arguments import (
    at_least_zero,
    one_of,
    positive_count,
    square_operator,
    start_vector,
)
from torchlinop.estimate.krylov import KrylovSpace
from torchlinop.estimate.progress import progress_bar
from torchlinop.estimate.sampling import Interrupted
from torchlinop.estimate.search import Eigenpairs, look, search

#: which end of the spectrum, as for SciPy's ``eigsh``
Which: TypeAlias = Literal["LA", "SA", "LM", "BE"]


def eigsh(
    A: Any,
    k: int = 6,
    *,
    which: Which = "LA",
    tol: float = 1e-5,
    v0: Array | None = None,
    ncv: int | None = None,
    max_matvecs: int | None = None,
    memory_budget: float | None = None,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
) -> Eigenpairs:
    r"""Eigenpairs at an end of the spectrum of a symmetric matrix.

    Thick-restarted Lanczos with full orthogonalization, on the operator's device. When all
    residuals have reached the tolerance, a few more products from a random vector that is
    orthogonal to everything found look for what was missed: further members of a cluster or
    of a repeated eigenvalue, of which one Krylov space holds one each.

    Parameters
    ----------
    A
        Symmetric or Hermitian operator or matrix, shape ``(N, N)``.
    k
        Number of eigenpairs, at most ``N``.
    which
        ``"LA"``: the largest; ``"SA"``: the smallest; ``"LM"``: the largest in size;
        ``"BE"``: half from each end, one more from the upper if ``k`` is odd.
    tol
        Residuals to reach, relative to the norm of ``A``; zero is as far as rounding lets.
        An eigenvalue's error is of the order of the residual's square.
    v0
        Where to start, shape ``(N,)``: a random vector by default. A sum of eigenvectors of
        a similar matrix saves products.
    ncv
        Most vectors of the basis, between ``k + 2`` and ``N``.
    max_matvecs
        Most products; by default ``max(10 N, 1000)``.
    memory_budget
        Bytes that the basis may take on the device, beyond which it lies on the host; by
        default half of what is free.
    seed
        Of random vectors.
    progress
        Whether to show a progress bar.
    checkpoint
        A file, or a :class:`~torchlinop.Checkpoint`, from which a run that was killed goes
        on: the same call with another ``max_matvecs``, ``memory_budget`` or on another
        device will do. One product more.

    Returns
    -------
    Eigenpairs

    Raises
    ------
    ValueError
        ``A`` is not square or not symmetric, or an argument is out of range.
    StoredFileError
        The checkpoint is of another matrix or call, or truncated.
    numpy.linalg.LinAlgError
        A product is not finite.
    Interrupted
        On Ctrl-C, with the Ritz pairs so far.

    Warns
    -----
    ConvergenceWarning
        ``max_matvecs`` was not enough; the bounds hold nonetheless.

    References
    ----------
    Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems",
    SIAM J. Matrix Anal. Appl. 22 (2000), https://doi.org/10.1137/S0895479898334605

    Examples
    --------
    >>> import torch
    >>> from torchlinop import estimate
    >>> A = torch.diag(torch.arange(1.0, 101.0))
    >>> eigenvalues, eigenvectors = estimate.eigsh(A, k=2)
    >>> eigenvalues.round()
    tensor([ 99., 100.])
    """
    A = square_operator(A, "eigsh")
    n = A.shape[0]
    k = positive_count("k", k)
    one_of("which", which, ("LA", "SA", "LM", "BE"))
    tol = at_least_zero("tol", tol)
    if k > n:
        raise ValueError(f"k has to be at most N = {n}, got {k}.")
    start = None if v0 is None else start_vector(v0, A)
    given = ncv
    ncv, on_device = _basis_size(A, k, ncv, memory_budget)
    limit = max(10 * n, 1000) if max_matvecs is None else max_matvecs
    limit = positive_count("max_matvecs", limit)
    if limit < k:
        raise ValueError(f"max_matvecs has to be at least k = {k}, got {limit}.")
    arguments = {"k": k, "which": which, "tol": tol, "ncv": given, "seed": seed}
    run = begun(Checkpoint.of(checkpoint), "eigsh", {"A": A}, arguments, {"v0": start})
    if run.state is not None:
        if "pairs" in run.state:
            return Eigenpairs(**placed(run.state["pairs"], A.device))
        ncv = run.state["space"]["capacity"]
    space = KrylovSpace(A, ncv, on_device, start, seed)
    with progress_bar(progress, None) as bar:
        try:
            pairs = search(space, k, which, tol, limit, bar.update, run)
        except KeyboardInterrupt as interrupt:
            if not space.size:
                raise
            so_far = look(space, min(k, space.size), which, tol).pairs(space)
            raise Interrupted(so_far) from interrupt
    if pairs.converged.all():
        run.save({"pairs": vars(pairs)})
    else:  # which more products will change
        run.save({"space": space.state(), "plan": None})
    if not pairs.converged.all():
        worst = float(pairs.residual_bounds.max())
        warnings.warn(
            f"eigsh: {int((~pairs.converged).sum())} of {k} eigenpairs have not converged "
            f"after {pairs.num_matvecs} products; the largest residual is {worst:.2e}, "
            f"wanted {tol * space.norm:.2e}. Raise max_matvecs or ncv, or accept a larger "
            "tol.",
            ConvergenceWarning,
            stacklevel=users_frame(),
        )
    return pairs


def _basis_size(
    A: TorchLinearOperator, k: int, ncv: int | None, memory_budget: float | None
) -> tuple[int, int]:
    """Return how many vectors the basis holds, and how many of them on the device."""
    n = A.shape[0]
    least = min(k + 2, n)
    if ncv is not None and not least <= positive_count("ncv", ncv) <= n:
        raise ValueError(f"ncv has to be between k + 2 = {least} and N = {n}, got {ncv}.")
    size = min(n, max(2 * k + 20, 40)) if ncv is None else int(ncv)
    row = n * torch.empty(0, dtype=A.torch_dtype, device="cpu").itemsize
    if memory_budget is None:
        memory_budget = free_memory(A.device)
    fits = int(min(at_least_zero("memory_budget", memory_budget) // row, n))
    if A.device.type == "cpu" and ncv is None:
        size = min(size, max(fits, least))
    return size, fits
