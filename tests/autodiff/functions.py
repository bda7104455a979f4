"""Functions that a model may call and that have no correction, away from their kinks.

A line is ``name: (function, input, input, ...)``, as in ``corrected``.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import linalg, nn, special

from .inputs import inner, module, positive, regular, spread

MEAN, VAR = torch.tensor([0.2, -0.5, 1.0]), torch.tensor([0.7, 1.5, 2.0])
WEIGHT = torch.tensor([0.5, 1.5, 1.0]).double()
LABELS = torch.tensor([0, 2, 1, 1])
PIXEL_LABELS = torch.tensor([[[0, 1], [2, 2]], [[1, 1], [0, 2]]])
SIGNS = torch.tensor([1.0, -1, 1, -1])
INDEX = torch.tensor([[0, 1, 0], [1, 0, 2]])


def gram(X):
    return X @ X.mT + torch.eye(X.shape[0], dtype=X.dtype)


POINTWISE = {
    **{
        f.__name__: (f, spread(4, 6))
        for f in (
            torch.sin,
            torch.cos,
            torch.asinh,
            torch.atan,
            torch.erf,
            torch.erfc,
            torch.sinc,
        )
        + (torch.abs, torch.square, torch.i0, special.i0e, special.i1, special.i1e)
        + (special.ndtr, special.log_ndtr, F.softsign, F.tanhshrink)
    },
    **{
        f.__name__: (f, positive(3, 4))
        for f in (torch.log, torch.log2, torch.log10, torch.log1p, torch.sqrt)
        + (torch.rsqrt, torch.reciprocal, torch.lgamma, torch.digamma, special.entr)
    },
    **{
        f.__name__: (f, inner(3, 4))
        for f in (torch.tan, torch.asin, torch.acos, torch.atanh, torch.erfinv)
        + (torch.logit, special.ndtri, special.erfcx, torch.exp, torch.exp2)
        + (torch.expm1, torch.sinh, torch.cosh)
    },
    **{
        f.__name__: (f, positive(3, 4), positive(3, 4))
        for f in (torch.atan2, torch.hypot, torch.xlogy, torch.logaddexp, torch.pow)
        + (torch.logaddexp2, torch.maximum, torch.div, special.xlog1py)
    },
    "polygamma": (partial(torch.polygamma, 1), positive(3, 4)),
    "acosh": (lambda x: (1 + x).acosh(), positive(3, 4)),
    "cube": (lambda x: x**3, spread(3, 4)),
    "root": (lambda x: x**0.5, positive(3, 4)),
    "power of 2": (lambda x: 2.0**x, (3, 4)),
    "clamp": (torch.clamp, (3, 4), lambda: -1 - torch.rand(3, 4), positive(3, 4)),
    "where": (lambda x, y: torch.where(x > 0, x * y, y), spread(3, 4), (3, 4)),
    "lerp": (torch.lerp, (3, 4), (3, 4), (3, 4)),
    "addcdiv": (torch.addcdiv, (3,), (3,), positive(3)),
    "softplus, threshold": (partial(F.softplus, beta=2, threshold=2), spread(4, 6)),
    "elu, alpha": (partial(F.elu, alpha=0.7), spread(4, 6)),
    "relu, in place": (lambda x: F.relu(1 * x, inplace=True), spread(4, 6)),
    "celu, in place": (lambda x: F.celu(1 * x, 0.7, inplace=True), spread(4, 6)),
    "prelu": (F.prelu, spread(4, 6), (6,)),
    "complex absolute value": (lambda x: torch.view_as_complex(x).abs(), (3, 2)),
    "complex angle": (lambda x: torch.view_as_complex(x).angle(), (3, 2)),
}
NORMALIZATIONS = {
    "batch norm, evaluation": (
        lambda x, w, b: F.batch_norm(x, MEAN.to(x), VAR.to(x), w, b),
        *[(4, 3, 2), (3,), (3,)],
    ),
    "instance norm, evaluation": (
        lambda x: F.instance_norm(x, MEAN.to(x), VAR.to(x), use_input_stats=False),
        (4, 3, 2),
    ),
    "group norm": (lambda x, *wb: F.group_norm(x, 2, *wb), (2, 4, 3), (4,), (4,)),
    "rms norm": (lambda x, w: F.rms_norm(x, (5,), w), (2, 3, 5), (5,)),
    "local response": (partial(F.local_response_norm, size=2, alpha=0.5), (2, 4, 3)),
    **{f"normalize {p}": (partial(F.normalize, p=p), spread(3, 4)) for p in (1, 2, 3)},
    "cosine similarity": (F.cosine_similarity, (3, 4), (3, 4)),
    "spectral norm": module(
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)).eval(), (2, 3)
    ),
    "orthogonal": module(
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), (2, 3)
    ),
    **{f.__name__: (partial(f, dim=-1), (3, 4)) for f in (F.softmax, F.log_softmax)},
}
DIMS = (1, 2, 3)
POOLING = {
    **{
        f"{kind}_pool{d}d": (
            partial(getattr(F, f"{kind}_pool{d}d"), kernel_size=2),
            spread(1, 2, *[4] * d),
        )
        for kind in ("max", "avg")
        for d in DIMS
    },
    **{
        f"adaptive_{kind}_pool{d}d": (
            partial(getattr(F, f"adaptive_{kind}_pool{d}d"), output_size=3),
            spread(1, 2, *[4] * d),
        )
        for kind in ("max", "avg")
        for d in DIMS
    },
    **{
        f"lp_pool{d}d": (
            partial(getattr(F, f"lp_pool{d}d"), norm_type=3.0, kernel_size=2),
            positive(1, 2, *[4] * d),
        )
        for d in DIMS
    },
    "max_unpool": (lambda x: F.max_unpool1d(x, torch.tensor([[0, 3]]), 2), (1, 2)),
}
CONVOLUTIONS = {
    **{
        f"conv{d}d, {padding}": (
            partial(getattr(F, f"conv{d}d"), padding=padding),
            *[(1, 2, *[3] * d), (2, 2, *[3] * d), (2,)],
        )
        for padding in (1, "same")
        for d in DIMS
    },
    **{
        f"conv_transpose{d}d": (
            partial(getattr(F, f"conv_transpose{d}d"), stride=2),
            *[(1, 2, *[3] * d), (2, 2, *[2] * d), (2,)],
        )
        for d in DIMS
    },
    "unfold": (partial(F.unfold, kernel_size=2), (1, 2, 3, 3)),
    "fold": (partial(F.fold, output_size=3, kernel_size=2), (1, 4, 4)),
    **{
        f"pad, {mode}": (partial(F.pad, pad=(1, 1), mode=mode), (1, 2, 4))
        for mode in ("reflect", "replicate", "circular")
    },
}
IMAGES = {
    **{
        f"grid_sample, {mode}, {padding}": (
            partial(F.grid_sample, mode=mode, padding_mode=padding, align_corners=False),
            *[(1, 2, 3, 3), inner(1, 2, 2, 2)],
        )
        for mode in ("bilinear", "bicubic", "nearest")
        for padding in ("zeros", "border", "reflection")
    },
    "grid_sample, volume": (
        partial(F.grid_sample, align_corners=True),
        *[(1, 1, 3, 3, 3), inner(1, 2, 2, 1, 3)],
    ),
    "affine_grid": (lambda t: F.affine_grid(t, [1, 1, 2, 2], False), (1, 2, 3)),
    **{
        f"interpolate, {mode}": (
            partial(F.interpolate, scale_factor=1.7, mode=mode),
            (1, 2, *[3] * d),
        )
        for mode, d in {"linear": 1, "bilinear": 2, "bicubic": 2, "area": 2}.items()
    },
    "interpolate, trilinear": (
        partial(F.interpolate, scale_factor=1.7, mode="trilinear"),
        (1, 1, 3, 3, 3),
    ),
}
LOSSES = {
    **{
        f.__name__: (f, spread(4, 3), lambda: 0.1 * torch.rand(4, 3))
        for f in (F.mse_loss, F.l1_loss, F.huber_loss, F.smooth_l1_loss)
    },
    "huber_loss, delta": (lambda x: F.huber_loss(x, 0 * x, delta=2.2), spread(4, 3)),
    "smooth_l1_loss, beta": (lambda x: F.smooth_l1_loss(x, 0 * x, beta=2.2), spread(4, 3)),
    "kl_div": (partial(F.kl_div, reduction="batchmean"), (4, 3), positive(4, 3)),
    "kl_div, log": (partial(F.kl_div, reduction="sum", log_target=True), (4, 3), (4, 3)),
    "binary cross-entropy": (F.binary_cross_entropy, inner(4, 3), inner(4, 3)),
    "binary cross-entropy with logits": (
        lambda x, y: F.binary_cross_entropy_with_logits(x, y, pos_weight=WEIGHT.to(x)),
        *[(4, 3), inner(4, 3)],
    ),
    "cross_entropy": (
        lambda x: F.cross_entropy(x, LABELS, WEIGHT.to(x), label_smoothing=0.1),
        (4, 3),
    ),
    "cross_entropy, ignore": (lambda x: F.cross_entropy(x, LABELS, ignore_index=1), (4, 3)),
    "cross_entropy, soft": (F.cross_entropy, (4, 3), positive(4, 3)),
    "cross_entropy, pixels": (lambda x: F.cross_entropy(x, PIXEL_LABELS), (2, 3, 2, 2)),
    "gaussian_nll_loss": (F.gaussian_nll_loss, (4, 3), (4, 3), positive(4, 3)),
    "poisson_nll_loss": (F.poisson_nll_loss, (4, 3), positive(4, 3)),
    "poisson_nll_loss, full": (
        partial(F.poisson_nll_loss, log_input=False, full=True),
        *[positive(4, 3), lambda: 2 + torch.rand(4, 3)],
    ),
    "cosine_embedding_loss": (
        lambda x, y: F.cosine_embedding_loss(x, y, SIGNS),
        *[(4, 3), (4, 3)],
    ),
    "hinge_embedding_loss": (lambda x: F.hinge_embedding_loss(x, SIGNS), spread(4)),
    "margin_ranking_loss": (
        lambda x: F.margin_ranking_loss(x, 0 * x, SIGNS, margin=0.1),
        spread(4),
    ),
    "soft_margin_loss": (lambda x: F.soft_margin_loss(x, SIGNS), (4,)),
    "multilabel_soft_margin_loss": (F.multilabel_soft_margin_loss, (4, 3), inner(4, 3)),
    "triplet_margin_loss": (partial(F.triplet_margin_loss, swap=True), *[(4, 3)] * 3),
    "triplet_margin_with_distance_loss": (
        F.triplet_margin_with_distance_loss,
        *[(4, 3)] * 3,
    ),
}
REDUCTIONS = {
    **{
        f.__name__: (partial(f, dim=-1), spread(3, 4))
        for f in (torch.sum, torch.mean, torch.prod, torch.var, torch.std, torch.cumsum)
        + (torch.cumprod, torch.logsumexp, torch.amax, torch.nansum, torch.diff)
    },
    "prod of all": (torch.prod, (4,)),
    "prod, a zero": (lambda x: (x * torch.tensor([0, 1, 1])).prod(-1), (2, 3)),
    "cumprod, a zero": (lambda x: (x * torch.tensor([1, 0, 1])).cumprod(-1), (2, 3)),
    "max": (lambda x: x.max(-1)[0], spread(3, 4)),
    "median": (lambda x: x.median(-1)[0], spread(3, 5)),
    "quantile": (lambda x: x.quantile(0.3, -1), spread(3, 5)),
    "sort": (lambda x: x.sort(-1)[0], spread(3, 4)),
    "topk": (lambda x: x.topk(2)[0], spread(3, 4)),
    "cummax": (lambda x: x.cummax(-1)[0], spread(3, 4)),
    **{
        f"norm {p}": (partial(torch.norm, p=p, dim=-1), spread(3, 4))
        for p in (0.5, 1, 1.5, 2, 2.5, 3, float("inf"))
    },
    **{
        f"vector norm {p}": (partial(linalg.vector_norm, ord=p, dim=-1), spread(3, 4))
        for p in (0.5, 1, 1.5, 2, 2.5, 3, float("inf"))
    },
    "norm of all": (torch.norm, (3, 4)),
    "renorm": (lambda x: x.renorm(2, 0, 1.0), (3, 4)),
    "pairwise_distance": (F.pairwise_distance, (3, 4), (3, 4)),
    "cdist of many": (torch.cdist, (30, 2), lambda: 9 + torch.rand(2, 2)),
    "corrcoef": (torch.corrcoef, (2, 5)),
    "scatter_reduce": (lambda x, y: x.scatter_reduce(0, INDEX, y, "prod"), (3, 3), (2, 3)),
    "index_add": (lambda x, y: x.index_add(0, INDEX[0], y), (3, 2), (3, 2)),
    "gather": (lambda x: x.gather(0, INDEX), (3, 3)),
    "embedding": (partial(F.embedding, INDEX), (3, 2)),
    "embedding, sparse": (partial(F.embedding, INDEX, sparse=True), (3, 2)),
}
MATRICES = {
    "linear": (F.linear, (3, 2), (4, 2), (4,)),
    "bilinear": (F.bilinear, (3, 2), (3, 4), (2, 2, 4), (2,)),
    "einsum": (partial(torch.einsum, "bi,oij,bj->bo"), (3, 2), (2, 2, 4), (3, 4)),
    "baddbmm": (torch.baddbmm, (2, 3, 3), (2, 3, 2), (2, 2, 3)),
    "kron": (torch.kron, (2, 2), (2, 2)),
    **{
        f.__name__: (f, regular(3))
        for f in (linalg.det, linalg.inv, linalg.svdvals, torch.trace)
    },
    "matrix_exp": (torch.matrix_exp, inner(3, 3)),
    "slogdet": (lambda A: linalg.slogdet(A)[1], regular(3)),
    "logdet": (lambda X: gram(X).logdet(), (3, 3)),
    "solve": (linalg.solve, regular(3), (3, 2)),
    "solve_triangular": (partial(linalg.solve_triangular, upper=True), regular(3), (3, 2)),
    "cholesky": (lambda X: linalg.cholesky(gram(X)), (3, 3)),
    "cholesky_solve": (
        lambda B, X: torch.cholesky_solve(B, linalg.cholesky(gram(X))),
        *[(3, 2), (3, 3)],
    ),
    "qr": (lambda A: linalg.qr(A)[0], regular(3)),
    "eigvalsh": (lambda X: linalg.eigvalsh(gram(X)), (3, 3)),
    "nuclear norm": (partial(linalg.matrix_norm, ord="nuc"), (3, 4)),
    "pinv": (linalg.pinv, (4, 3)),
    "lstsq": (lambda A, B: linalg.lstsq(A, B)[0], (4, 3), (4, 2)),
    "rfft": (lambda x: torch.view_as_real(torch.fft.rfft(x)), (2, 5)),
    "stft": (
        lambda x: torch.stft(x, 4, window=torch.ones(4).to(x), return_complex=True).abs(),
        (1, 8),
    ),
}
RECURRENT = {
    **{
        kind.__name__: module(partial(kind, 2, 3, bidirectional=True), (3, 2, 2))
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
    },
    **{
        kind.__name__: module(partial(kind, 2, 3), (2, 2))
        for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    },
}
FUNCTIONS = {
    **POINTWISE,
    **NORMALIZATIONS,
    **POOLING,
    **CONVOLUTIONS,
    **IMAGES,
    **LOSSES,
    **REDUCTIONS,
    **MATRICES,
    **RECURRENT,
}
