"""Threads of the BLAS under NumPy and SciPy, which get in the way of torch's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import ThreadpoolController

#: held by the context that has changed the number of threads and will restore it
_CHANGED = threading.Lock()


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Let SciPy's solvers leave all cores to torch.

    The threads of OpenBLAS, which the wheels of NumPy and SciPy bring along, wait for
    work at full speed for some 20 milliseconds after each call. A solver makes such calls
    between any two products, so that torch multiplies on cores that are taken, up to
    three times more slowly. Within this context OpenBLAS uses one thread. The numbers of
    torch's threads, and of those of a BLAS that shares them (MKL, or one built with
    OpenMP), are as before.

    The number of threads belongs to the process: it holds for all its Python threads.
    A context that is opened while another one is open, here or in another thread, changes
    and restores nothing. Also a decorator.

    Examples
    --------
    >>> import torch, torchlinop
    >>> from scipy.sparse.linalg import eigsh
    >>> A = torchlinop.aslinearoperator(torch.diag(torch.arange(9.0)))
    >>> with torchlinop.single_threaded_blas():
    ...     values = eigsh(A, k=2, return_eigenvectors=False)
    >>> values.round(3)
    array([7., 8.], dtype=float32)
    """
    if not _CHANGED.acquire(blocking=False):
        yield
        return
    try:
        # not those of torch, which has no pool of this kind
        pools = ThreadpoolController().select(threading_layer="pthreads")
        with pools.limit(limits=1):
            yield
    finally:
        _CHANGED.release()
